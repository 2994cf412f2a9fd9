"""Fixtures of the tests of openvclip.models."""

from tests.world import world

__all__ = ["world"]
