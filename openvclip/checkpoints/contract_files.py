"""Read the contract of a model from a folder or a file, and combine the contracts of merged models.

The contract is stored as JSON in ``openvclip.json`` beside the weights, and in the header of the
safetensors file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.formats import read_texts
from openvclip.errors import ContractError, near_path

CONTRACT_FILE = "openvclip.json"
"""The name of the file that holds the contract of a folder."""
CONTRACT_KEY = "openvclip"
"""The name of the contract among the texts of a safetensors header. The text is JSON."""


def read_contract(path: str | os.PathLike[str]) -> Contract | None:
    """Return the contract of a model.

    Args:
        path: a folder, whose ``openvclip.json`` is read; a contract in a JSON file; or a file of
            weights. The contract of a safetensors file (or of the index of a sharded model) is in
            its header. A file without a contract in its header has the contract of its folder if
            this contract names the file.

    Returns:
        The contract, or ``None`` if there is none.

    Raises:
        ContractError: there is a contract and it can't be used; see :meth:`Contract.from_json`.
        CheckpointError: there is no such file or folder, or a safetensors file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _read_file(path / CONTRACT_FILE) if (path / CONTRACT_FILE).is_file() else None
    if not path.exists():
        raise ContractError(f"{path}: no such file or folder{near_path(path)}.")
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        return _read_file(path)
    texts = read_texts(path)
    if CONTRACT_KEY in texts:
        return Contract.from_json(texts[CONTRACT_KEY], os.fspath(path))
    beside = path.with_name(CONTRACT_FILE)
    contract = _read_file(beside) if beside.is_file() else None
    return contract if contract is not None and contract.weights == path.name else None


def contract_after_merge(
    texts: Sequence[str | None], files: Sequence[str], *, override: bool = False
) -> Contract | None:
    """Return the contract of a merged model.

    The settings of use are those of the inputs. Results, calibration and the λ of the inputs are
    left out, because they belong to other weights.

    Args:
        texts: the contract of each input as JSON; ``None`` for an input without a contract.
        files: the file of each input, for errors.
        override: whether the contract of the last input is used if the contracts differ.

    Returns:
        The contract, or ``None`` if no input has a contract.

    Raises:
        ContractError: the inputs must be used with different settings.
    """
    pairs = [
        (Contract.from_json(text, file), file)
        for text, file in zip(texts, files, strict=True)
        if text is not None
    ]
    if not pairs:
        return None
    last, last_file = pairs[-1]
    for contract, file in pairs[:-1]:
        difference = contract.difference(last)
        if difference is not None and not override:
            name, value, other = difference
            raise ContractError(
                f"{file} is used with {name} = {_shown(value)} and {last_file} with "
                f"{_shown(other)}, so the merged model would have no right setting. Give "
                f"--override (override=True) to use the settings of {last_file}."
            )
    contracts = [contract for contract, _ in pairs]
    alike = {
        name: value if all(getattr(c, name) == value for c in contracts) else None
        for name in ("method", "base", "licence")
        for value in [getattr(last, name)]
    }
    data = {key: value for contract in contracts for key, value in contract.data.items()}
    return last.with_(
        **alike, weights=None, data=data, results={}, confidence=None, lam=_common_lam(contracts)
    )


def _common_lam(contracts: Sequence[Contract]) -> float | dict[str, float] | None:
    lams = [contract.lam for contract in contracts]
    return lams[0] if all(lam == lams[0] for lam in lams) else None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_file(path: Path) -> Contract:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"{path}: can't be read ({error}).") from error
    return Contract.from_json(text, os.fspath(path))
