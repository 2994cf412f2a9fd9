"""Runnable examples of openvclip."""
