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
        original_hash: hash of the weights of the original CLIP. If the first input turns out to
            have other weights, ``lam`` of the contract becomes unknown. Default: no comparison.
    """

    def __init__(
        self,
        method: str,
        inputs: Sequence[WeightInput],
        settings: Mapping[str, object],
        contract: Contract | None,
        *,
        original_hash: str | None = None,
    ) -> None:
        import openvclip

        self.inputs = inputs
        self._hashes = [_NO_HASH for _ in inputs]
        self._input_texts = {
            key: text for source in inputs for key, text in source.metadata.items()
        }
        self._input_texts.pop(CONTRACT_KEY, None)
        self._contract, self._original_hash = contract, original_hash
        self._method = {"method": method, **settings, "openvclip": openvclip.__version__}

    def add_hashes(self) -> None:
        """Replace the zeros with the hashes of the inputs. Call this after all inputs were read."""
        self._hashes = [source.weights_hash() for source in self.inputs]

    def metadata(self) -> dict[str, str]:
        """Return the metadata for the header of the merged file."""
        inputs = [
            {
                "file": source.path.name,
                "weights_hash": weights_hash,
                **_provenance_of_input(source.metadata),
            }
            for source, weights_hash in zip(self.inputs, self._hashes, strict=True)
        ]
        contract = (
            {} if self._contract is None else {CONTRACT_KEY: self._contract_text(self._contract)}
        )
        return {
            **self._input_texts,
            **contract,
            PROVENANCE_KEY: json.dumps({**self._method, "inputs": inputs}),
        }

    def _contract_text(self, contract: Contract) -> str:
        """Return the contract as JSON. The length is the same before and after the hashes."""
        text, unknown = contract.to_json(), contract.with_(lam=None).to_json()
        if self._original_hash is None:
            return text
        is_other = self._hashes[0] not in (_NO_HASH, self._original_hash)
        return (unknown if is_other else text).ljust(max(len(text), len(unknown)))


def _provenance_of_input(metadata: Mapping[str, str]) -> dict[str, object]:
    """Return the provenance of an input that is itself a merged file."""
    if PROVENANCE_KEY not in metadata:
        return {}
    try:
        return {"recipe": json.loads(metadata[PROVENANCE_KEY])}
    except (ValueError, RecursionError):
        return {"recipe": metadata[PROVENANCE_KEY]}
