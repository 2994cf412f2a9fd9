"""Read the contract of a model from a folder or a file, and combine the contracts of merged models.

The contract is stored as JSON in ``openvclip.json`` beside the weights, and in the header of the
safetensors file.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openvclip.checkpoints.atomic import write_text
from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.exported_files import is_exported, read_exported_texts
from openvclip.checkpoints.formats import read_texts
from openvclip.checkpoints.paths import require_path
from openvclip.checkpoints.texts import add_texts
from openvclip.errors import ContractError, ContractWarning, near_path

CONTRACT_FILE = "openvclip.json"
"""The name of the file that holds the contract of a folder."""
CONTRACT_KEY = "openvclip"
"""The name of the contract among the texts of a safetensors header. The text is JSON."""


def read_contract(path: str | os.PathLike[str]) -> Contract | None:
    """Return the contract of a model.

    Args:
        path: a folder, whose ``openvclip.json`` is read; a contract in a JSON file; or a file of
            weights. The contract of a safetensors file (or of the index of a sharded model) is in
            its header. If the header has no contract, the contract of the folder is returned, if
            this contract names the file. An exported model (``.onnx``, ``.pt2``) holds its
            contract.

    Returns:
        The contract, or ``None`` if there is none.

    Raises:
        ContractError: there is a contract and it can't be used; see :meth:`Contract.from_json`.
        CheckpointError: there is no such file or folder, or a safetensors file is damaged.
        UsageError: ``path`` is no path.
    """
    path = Path(require_path(path, "path", "a folder or a file of weights"))
    if path.is_dir():
        return _read_file(path / CONTRACT_FILE) if (path / CONTRACT_FILE).is_file() else None
    if not path.exists():
        raise ContractError(f"{path}: no such file or folder{near_path(path)}.")
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        return _read_file(path)
    if is_exported(path):
        return contract_of_file(path, read_exported_texts(path))
    return contract_of_file(path, read_texts(path))


def contract_to_merge(
    path: Path, texts: Mapping[str, str], *, override: bool = False
) -> Contract | None:
    """Return the contract of a file that is merged or converted; see :func:`contract_of_file`.

    Args:
        path: the file.
        texts: the texts in its header.
        override: whether a contract that can't be read is left out, with a warning.

    Raises:
        ContractError: there is a contract, and it can't be read.

    Warns:
        ContractWarning: a contract that can't be read is left out.
    """
    try:
        return contract_of_file(path, texts)
    except ContractError as error:
        if not override:
            raise ContractError(
                f"{error} Give --override (override=True) to go on without this contract."
            ) from error
        warnings.warn(
            f"{path} is used without its contract, which can't be read: {error}",
            ContractWarning,
            stacklevel=4,
        )
        return None


def contract_of_file(path: Path, texts: Mapping[str, str]) -> Contract | None:
    """Return the contract of a file of weights, from the texts in its header.

    Args:
        path: the file.
        texts: the texts in its header.

    Raises:
        ContractError: see :func:`read_contract`.
    """
    if CONTRACT_KEY in texts:
        return Contract.from_json(texts[CONTRACT_KEY], os.fspath(path))
    beside = path.parent / CONTRACT_FILE
    contract = _read_file(beside) if beside.is_file() else None
    return contract if contract is not None and contract.weights == path.name else None


def store_confidence(
    folder: str | os.PathLike[str], contract: Contract, weights: Path
) -> list[Path]:
    """Store the calibration of a contract in the folder of a model.

    The contract of the folder is written, and the calibration in the header of the weights. Each
    file is written atomically. After a kill in between, the folder has its old calibration.

    Args:
        folder: the folder of the model.
        contract: the contract of the model with its calibration.
        weights: the file of weights in the folder.

    Returns:
        The files that were written.

    Raises:
        CheckpointError: a file can't be written. It is unchanged then.
    """
    written = []
    text = read_texts(weights).get(CONTRACT_KEY)
    if text is not None:
        header = Contract.from_json(text, os.fspath(weights))
        add_texts(weights, {CONTRACT_KEY: header.with_(confidence=contract.confidence).to_json()})
        written.append(weights)
    path = Path(folder) / CONTRACT_FILE
    write_text(path, [contract.with_(weights=weights.name).to_json(), "\n"])
    return [path, *written]


def merged_contract(
    contracts: Sequence[tuple[Path, Contract | None]], *, override: bool = False
) -> Contract | None:
    """Return the contract of a merged model.

    The settings of use are those of the inputs. Results and calibration are left out, because they
    belong to other weights.

    Args:
        contracts: file and contract of each input; ``None`` for an input without a contract.
        override: whether the contract of the last input is used if the contracts differ.

    Returns:
        The contract, or ``None`` if no input has a contract.

    Raises:
        ContractError: the inputs must be used with different settings.
    """
    known = [(file, contract) for file, contract in contracts if contract is not None]
    if not known:
        return None
    last_file, last = known[-1]
    for file, contract in known:
        difference = contract.difference(last)
        if difference is not None and not override:
            name, value, other = difference
            raise ContractError(
                f"{file} is used with {name} = {_shown(value)} and {last_file} with "
                f"{_shown(other)}, so the merged model would have no right setting. Give "
                f"--override (override=True) to use the settings of {last_file}."
            )
    alike: dict[str, Any] = {
        name: getattr(last, name)
        if all(getattr(contract, name) == getattr(last, name) for _, contract in known)
        else None
        for name in ("method", "lam", "base", "licence")
    }
    data = {key: value for _, contract in known for key, value in contract.data.items()}
    return last.with_(**alike, weights=None, data=data, results={}, confidence=None)


def contract_of_mean(
    contracts: Sequence[tuple[Path, Contract | None]], *, override: bool = False
) -> Contract | None:
    """Return the contract of a mean of models; see :func:`merged_contract`.

    If an input has no contract, it may be the original CLIP, so ``lam`` is not known.
    """
    contract = merged_contract(contracts, override=override)
    if contract is not None and any(one is None for _, one in contracts):
        return contract.with_(lam=None)
    return contract


def interpolated_lam(
    a: Contract | None, b: Contract | None, lam: object, *, a_is_original: bool
) -> float | None:
    """Return the weight of the original CLIP in ``lam * A + (1 - lam) * B``.

    Args:
        a: the contract of A.
        b: the contract of B.
        lam: the interpolation weight of A.
        a_is_original: whether A is the original CLIP if A has no contract. If not, its share of the
            original CLIP is not known.

    Returns:
        The weight, or ``None`` if it is not known, or differs from entry to entry.
    """
    share_a = (1.0 if a_is_original else None) if a is None else a.lam
    share_b = None if b is None else b.lam
    shares = (lam, share_a, share_b)
    if not all(isinstance(share, (int, float)) for share in shares):
        return None
    return lam * share_a + (1 - lam) * share_b  # type: ignore[operator]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_file(path: Path) -> Contract:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"{path}: can't be read ({error}).") from error
    return Contract.from_json(text, os.fspath(path))
