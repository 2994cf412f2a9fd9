"""The registry of the merge methods: one line for each method."""

from __future__ import annotations

from openvclip.errors import MergeError, did_you_mean, listed
from openvclip.merging.angles import MODEL_STOCK, SLERP
from openvclip.merging.dare_dropping import DARE
from openvclip.merging.lines_scaling import LINES
from openvclip.merging.matrix_merging import ISO_C, ISO_CTS, TSV_MERGE
from openvclip.merging.methods import Method
from openvclip.merging.monosoup_scaling import MONOSOUP
from openvclip.merging.soups import AVERAGE
from openvclip.merging.straight_line import INTERPOLATE
from openvclip.merging.task_arithmetic import TASK_ARITHMETIC
from openvclip.merging.ties_merging import TIES

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        INTERPOLATE,
        SLERP,
        LINES,
        MONOSOUP,
        DARE,
        AVERAGE,
        MODEL_STOCK,
        TASK_ARITHMETIC,
        TIES,
        TSV_MERGE,
        ISO_C,
        ISO_CTS,
    )
}
"""The merge methods that can be called by name, by their names."""


def method(name: str) -> Method:
    """Return the merge method of a name.

    Raises:
        MergeError: there is no such method.
    """
    if name not in METHODS:
        raise MergeError(
            f"There is no merge method {name!r}{did_you_mean(name, METHODS)}. The methods: "
            f"{listed(list(METHODS), len(METHODS))}."
        )
    return METHODS[name]
