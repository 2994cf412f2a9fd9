"""The rows with which ``openvclip inspect`` shows a contract."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.contract_files import contract_of_file
from openvclip.checkpoints.contract_sections import Expansion, Frames, Pixels
from openvclip.errors import ContractError


def contract_text(path: str | os.PathLike[str], texts: Mapping[str, str]) -> str:
    """Return the lines that show the contract of a file, or ``""`` if there is no contract.

    Args:
        path: the file.
        texts: the texts in its header.
    """
    try:
        contract = contract_of_file(Path(path), texts)
    except ContractError as error:
        return f"{'contract':<12} can't be read: {error}"
    return "" if contract is None else rows_text(contract)


def rows_text(contract: Contract) -> str:
    """Return the lines that show a contract."""
    rows = [f"  {title:<11} {text}" for title, text in contract_rows(contract)]
    return "\n".join(["contract", *rows])


def contract_rows(contract: Contract) -> list[tuple[str, str]]:
    """Return the titles and texts that show a contract. Empty texts are left out."""
    base, confidence = contract.base, contract.confidence
    rows = [
        ("model", f"{contract.model} ({contract.library})"),
        ("attention", _attention(contract.expansion)),
        ("frames", _frames(contract.frames)),
        ("pixels", _pixels(contract.pixels)),
        ("templates", _templates(contract.templates)),
        ("pooling", f"{contract.pooling}, texts by the {contract.text} text tower"),
        ("method", contract.method or ""),
        ("lambda", "" if contract.lam is None else f"{contract.lam} of the original CLIP"),
        ("base", "" if base is None else _facts(vars(base))),
        ("calibration", "" if confidence is None else _facts(vars(confidence))),
        ("data", _facts(contract.data)),
        ("results", _facts(contract.results)),
        ("licence", contract.licence or ""),
        ("versions", _facts(contract.versions)),
        ("unknown", ", ".join(contract.unknown)),
    ]
    return [(title, text) for title, text in rows if text]


def _attention(expansion: Expansion | None) -> str:
    if expansion is None:
        return "each frame alone"
    layers = "all layers" if expansion.layers is None else f"layers {list(expansion.layers)}"
    return f"window {expansion.window}, boundary {expansion.boundary}, {layers}"


def _frames(frames: Frames) -> str:
    if frames.sampler == "seconds":
        return f"{frames.num_frames} at most, one for each second"
    distance = f"{frames.sampling_rate} apart at {frames.target_fps:g} frames per second"
    return f"{frames.views} x {frames.num_frames}, {distance}, sampler {frames.sampler}"


def _pixels(pixels: Pixels) -> str:
    colours = [" ".join(f"{value:.4g}" for value in row) for row in (pixels.mean, pixels.std)]
    short_side = "" if pixels.short_side is None else f", short side {pixels.short_side}"
    crops = "" if pixels.crops == 1 else f", {pixels.crops} crops"
    moments = f"mean {colours[0]}, std {colours[1]}"
    return f"{pixels.size}, transform {pixels.name}{short_side}{crops}, {moments}"


def _templates(templates: tuple[str, ...]) -> str:
    more = f" and {len(templates) - 1} more" if len(templates) > 1 else ""
    return f"{templates[0]!r}{more}"


def _facts(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
