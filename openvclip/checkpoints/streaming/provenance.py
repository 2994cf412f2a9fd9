"""The provenance of a merged file: its input files, its merge method and its settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.contract_files import CONTRACT_KEY
from openvclip.checkpoints.streaming.inputs import WeightInput

PROVENANCE_KEY = "openvclip_recipe"
"""The name of the provenance in the metadata of a file. The value is JSON."""

_NO_HASH = "0" * 64  # has the length of a hash


class Provenance:
    """The metadata of a merged file: the texts of its inputs, and its provenance.

    The metadata hold a hash of the weights of each input. The hashes are zeros until
    :meth:`add_hashes` is called, and have the same length before and after the call.

    Args:
        method: name of the merge method.
        inputs: the models that are merged. If two inputs have a text of the same name, the text
            of the later input is kept.
        settings: the settings of the method, such as ``{"lam": 0.5}``.
        contract: the contract of the merged model.
    """

    def __init__(
        self,
        method: str,
        inputs: Sequence[WeightInput],
        settings: Mapping[str, object],
        contract: Contract | None,
    ) -> None:
        import openvclip

        self._inputs = inputs
        self._hashes = [_NO_HASH for _ in inputs]
        self._input_texts = {
            key: text for source in inputs for key, text in source.metadata.items()
        }
        if contract is not None:
            self._input_texts[CONTRACT_KEY] = contract.to_json()
        self._method = {"method": method, **settings, "openvclip": openvclip.__version__}

    def add_hashes(self) -> None:
        """Replace the zeros with the hashes of the inputs. Call this after all inputs were read."""
        self._hashes = [source.weights_hash() for source in self._inputs]

    def metadata(self) -> dict[str, str]:
        """Return the metadata for the header of the merged file."""
        inputs = [
            {
                "file": source.path.name,
                "weights_hash": weights_hash,
                **_provenance_of_input(source.metadata),
            }
            for source, weights_hash in zip(self._inputs, self._hashes, strict=True)
        ]
        return {**self._input_texts, PROVENANCE_KEY: json.dumps({**self._method, "inputs": inputs})}


def _provenance_of_input(metadata: Mapping[str, str]) -> dict[str, object]:
    """Return the provenance of an input that is itself a merged file."""
    if PROVENANCE_KEY not in metadata:
        return {}
    try:
        return {"recipe": json.loads(metadata[PROVENANCE_KEY])}
    except (ValueError, RecursionError):
        return {"recipe": metadata[PROVENANCE_KEY]}
