"""Interpolation as a merge method that can be called by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from openvclip.merging.entries import interpolable_entries, matched, require_same_infinities_in
from openvclip.merging.methods import Method, Option
from openvclip.weights.interpolation import Lambda, interpolate
from openvclip.weights.numerics import non_finite_names
from openvclip.weights.relative import FineTuned

LAM = Option(
    "lam", "interpolation weight of the original CLIP, from 0 to 1", required=True, example=0.3
)


def _interpolate(
    base: Mapping[str, Tensor],
    model: FineTuned,
    *,
    lam: Lambda,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return ``interpolate(base, model, lam)``, and refuse NaN and infinity as all methods do."""
    result = interpolate(base, model, lam, dtype=dtype)
    broken = non_finite_names(interpolable_entries(result))
    if broken:
        require_same_infinities_in(matched(base, [model], what_others="models[0]"), broken)
    return result


INTERPOLATE = Method(
    "interpolate",
    "lam * original + (1 - lam) * model, on a straight line",
    "Wortsman et al., CVPR 2022",
    _interpolate,
    most=1,
    options=(LAM,),
)
