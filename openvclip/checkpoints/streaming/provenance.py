"""What a merged file says of its origin, in the metadata of its header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from openvclip.checkpoints.streaming.inputs import WeightInput

RECIPE = "openvclip_recipe"
"""The text of a header that holds the recipe, as JSON."""

_NO_HASH = "0" * 64  # as long as a hash


class Recipe:
    """The texts of a header: those of the inputs, and how the weights were made from them.

    Args:
        method: what was done.
        inputs: the models it was done to.
        settings: how.
    """

    def __init__(
        self, method: str, inputs: Sequence[WeightInput], settings: Mapping[str, object]
    ) -> None:
        import openvclip

        self._inputs = inputs
        self._hashes = [_NO_HASH for _ in inputs]
        self._kept = {key: text for one in inputs for key, text in one.metadata.items()}
        self._said = {"method": method, **settings, "openvclip": openvclip.__version__}

    def seal(self) -> None:
        """Put in the hashes of the inputs, which are read by now, in place of zeros."""
        self._hashes = [one.weights_hash() for one in self._inputs]

    def texts(self) -> dict[str, str]:
        """The metadata, of the same length before and after :meth:`seal`."""
        inputs = [
            {"file": one.path.name, "weights_hash": found, **_own(one.metadata)}
            for one, found in zip(self._inputs, self._hashes, strict=True)
        ]
        return {**self._kept, RECIPE: json.dumps({**self._said, "inputs": inputs})}


def _own(metadata: Mapping[str, str]) -> dict[str, object]:
    """The recipe of an input that was merged itself."""
    if RECIPE not in metadata:
        return {}
    try:
        return {"recipe": json.loads(metadata[RECIPE])}
    except (ValueError, RecursionError):
        return {"recipe": metadata[RECIPE]}
