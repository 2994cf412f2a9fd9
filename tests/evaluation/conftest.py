"""Fixtures of the tests of openvclip.evaluation."""

from tests.world import world

__all__ = ["world"]
