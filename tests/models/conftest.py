"""Fixtures of the tests of openvclip.models."""

from tests.models.stored_models import folder, model, saved
from tests.world import world

__all__ = ["folder", "model", "saved", "world"]
