"""Interpolation as a merge method that can be called by name."""

from __future__ import annotations

from openvclip.merging.methods import Method, Option
from openvclip.weights.interpolation import interpolate

LAM = Option(
    "lam", "interpolation weight of the original CLIP, from 0 to 1", required=True, example=0.3
)

INTERPOLATE = Method(
    "interpolate",
    "lam * original + (1 - lam) * model, on a straight line",
    "Wortsman et al., CVPR 2022",
    interpolate,
    most=1,
    options=(LAM,),
)
