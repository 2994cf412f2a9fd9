"""The results file, and the weights of trainings on the disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.shapes.results import Results, load_results
from examples.shapes.trials.cells import Cell
from examples.shapes.trials.settings import Sizes
from examples.shapes.trials.workshop import State
from openvclip.checkpoints import atomic_path

__all__ = ["Choice", "Store", "is_key_of", "key_of", "open_results"]

Choice = dict[str, Any]
"""The settings of a method: ``training``, ``params`` and ``lam``."""


def key_of(name: str, settings: Mapping[str, Any]) -> str:
    """Return the name of a training with its settings, such as ``"plain lr=0.001"``."""
    return " ".join([name, *(f"{key}={value}" for key, value in sorted(settings.items()))])


def is_key_of(key: str, name: str) -> bool:
    """Return whether a key is that of a name with any settings."""
    # The value of a setting can hold spaces.
    return key.startswith(name) and re.match(r"$| \w+=", key[len(name) :]) is not None


def open_results(path: Path, sizes: Sizes, quick: bool) -> Results:
    """Return the results in a file, or empty results if the file does not exist.

    Raises:
        FileExistsError: the results were made with other sizes.
    """
    settings = {"sizes": {**asdict(sizes), "cells": None}, "quick": quick, "version": 1}
    results = load_results(path, settings)
    results.pop("seeds", None)  # of load_results
    for part in ("chosen", "tuning", "cells", "failures"):
        results.setdefault(part, {})
    return results


class Store:
    """The weights of trainings, one file for each training of a cell.

    A file holds the entries that differ from the original CLIP.

    Args:
        folder: folder of all cells.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell, key: str) -> Path:
        """Return the file of a training."""
        return self.folder / cell.name / f"{key}.safetensors"

    def save(self, cell: Cell, key: str, clip: State, ends: Mapping[str, State]) -> None:
        """Save the ends of a training."""
        changed = {
            f"{end}:{name}": value.cpu()
            for end, state in ends.items()
            for name, value in state.items()
            if name not in clip or not torch.equal(value, clip[name])
        }
        path = self.path(cell, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            save_file({name: value.contiguous() for name, value in changed.items()}, partial)

    def load(self, cell: Cell, key: str, clip: State) -> dict[str, State]:
        """Return the ends of a training as whole state dicts."""
        ends: dict[str, dict[str, Tensor]] = {}
        for name, value in load_file(self.path(cell, key)).items():
            end, _, entry = name.partition(":")
            ends.setdefault(end, dict(clip))[entry] = value
        return dict(ends)

    def remove(self, cell: Cell) -> None:
        """Remove the weights of a cell."""
        shutil.rmtree(self.folder / cell.name, ignore_errors=True)
