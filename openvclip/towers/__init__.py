"""The image tower of a CLIP, expanded over time or with prompts.

:mod:`~openvclip.towers.temporal` expands and restores a model, and encodes videos. The towers of
each library are in one file or several: ``open_clip.py``, ``timm.py`` and ``hf.py`` (Hugging Face).
Importing this package imports none of these libraries.

To add a family of towers, write one file and add one entry to the registry. The docstring of
:mod:`openvclip.towers.families` explains what the file must give.
"""

from openvclip.towers.family import Family, TowerFacts
from openvclip.towers.prompted import VisionPrompts
from openvclip.towers.temporal import (
    encode_frames,
    encode_images,
    encode_video,
    expand_temporal_attention,
    expansion_of,
    is_expanded,
    restore_spatial_attention,
)
from openvclip.towers.view import Boundary, ExpansionSettings, FrameView, Pooling

__all__ = [
    "Boundary",
    "ExpansionSettings",
    "Family",
    "FrameView",
    "Pooling",
    "TowerFacts",
    "VisionPrompts",
    "encode_frames",
    "encode_images",
    "encode_video",
    "expand_temporal_attention",
    "expansion_of",
    "is_expanded",
    "restore_spatial_attention",
]
