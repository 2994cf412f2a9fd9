"""Read the folders of results that ``openvclip evaluate`` writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openvclip.errors import RecordsError, listed, near_path
from openvclip.evaluation.predictions import PREDICTIONS_FILE, Predictions, read_predictions
from openvclip.evaluation.saving import RESULTS_FILE

__all__ = ["Results", "read_results", "results_folders"]

_SETTINGS_FILE = "settings.json"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Results:
    """A folder of results.

    Attributes:
        folder: the folder.
        settings: the settings of the evaluation.
        entries: for each protocol and each λ: accuracies, as in ``results.json``.
        unreadable: number of videos that could not be read.
        predictions: the answers on each video, ``None`` if the folder does not have them.
        original: whether the user says that the model is the original CLIP.
    """

    folder: Path
    settings: dict[str, Any]
    entries: list[dict[str, Any]]
    unreadable: int
    predictions: Predictions | None
    original: bool = False

    @property
    def protocols(self) -> list[str]:
        """The protocols, in the order of the file. ``""`` is the user's own list of videos."""
        return list(dict.fromkeys(entry["protocol"] for entry in self.entries))

    @property
    def resumable(self) -> bool:
        """Whether an evaluation kept its features in the folder."""
        return (self.folder / _SETTINGS_FILE).exists()

    def of(self, protocol: str) -> list[dict[str, Any]]:
        """Return the accuracies on a protocol, smallest λ first."""
        own = [entry for entry in self.entries if entry["protocol"] == protocol]
        return sorted(own, key=lambda entry: entry["lam"] or 0.0)


def results_folders(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the folders of results that paths name, each once.

    Args:
        paths: folders of results, folders above them, or files ``results.json``.

    Raises:
        RecordsError: a path does not exist, or there are no results in it.
    """
    if not paths:
        raise RecordsError("There are no folders of results; expected at least one.")
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        for folder in _folders_of(path):
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def _folders_of(path: Path) -> list[Path]:
    if not path.exists():
        raise RecordsError(f"{path}: no such folder of results{near_path(path)}.")
    if path.is_file():
        if path.name == RESULTS_FILE:
            return [path.parent]
        raise RecordsError(f"{path} is a file; expected a folder with a file {RESULTS_FILE}.")
    if (path / RESULTS_FILE).is_file():
        return [path]
    below = sorted(file.parent for file in path.rglob(RESULTS_FILE))
    if not below:
        begun = " An evaluation was begun there: run the same command again to finish it."
        raise RecordsError(
            f"{path} holds no file {RESULTS_FILE}, and no folder below does."
            + (begun if any(path.rglob(_SETTINGS_FILE)) else "")
            + " Expected a folder that 'openvclip evaluate --out FOLDER' wrote."
        )
    return below


def read_results(folder: Path) -> Results | None:
    """Read a folder of results.

    Returns:
        The results; ``None`` if they are results of retrieval, which have no classes.

    Raises:
        RecordsError: a file is damaged or of an unknown version, or the files of the folder belong
            to different evaluations.
    """
    path = folder / RESULTS_FILE
    content = _object(path)
    entries = content.get("results")
    if not isinstance(entries, list) or not entries:
        raise _damaged(path, 'it has no list "results"')
    if all(isinstance(entry, dict) and "text_to_video" in entry for entry in entries):
        return None
    for entry in entries:
        _check_entry(path, entry)
    _require_equal_splits(path, entries)
    settings, unreadable = content.get("settings"), content.get("unreadable") or []
    if not isinstance(settings, dict):
        raise _damaged(path, 'it has no "settings"')
    if not isinstance(unreadable, list):
        raise _damaged(path, '"unreadable" is no list')
    _require_own_settings(folder, settings)
    predictions = None
    if (folder / PREDICTIONS_FILE).exists():
        predictions = read_predictions(folder / PREDICTIONS_FILE)
        _require_same_run(folder, entries, predictions)
    return Results(folder, settings, entries, len(unreadable), predictions)


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it is no JSON object")
    return content


def _damaged(path: Path, reason: str) -> RecordsError:
    return RecordsError(
        f"{path} can't be read as results of 'openvclip evaluate' ({reason}). Run the same command "
        "again: the features are kept, so it takes seconds."
    )


def _check_entry(path: Path, entry: Any) -> None:
    """Check the parts of an entry of ``results.json`` that a page shows."""
    try:
        good = isinstance(entry["protocol"], str) and _is_number(entry["lam"])
        for k in ("top1", "top5"):
            good &= _is_number(entry[k]["mean"]) and _is_number(entry[k]["std"])
            good &= all(_is_number(split[k]) for split in entry["splits"])
        for split in entry["splits"]:
            good &= isinstance(split["name"], str)
            good &= all(isinstance(split[key], int) for key in ("classes", "clips", "left_out"))
            good &= _has_good_classes(split)
    except KeyError as error:
        raise _damaged(path, f"an entry has no {error}") from error
    except TypeError:
        good = False
    if not good or not entry["splits"]:
        raise _damaged(path, "an entry has a value of a wrong type")


def _has_good_classes(split: Mapping[str, Any]) -> bool:
    """Return whether the optional parts of a split fit: accuracies and confusions of classes."""
    number = split["classes"]
    if "per_class" in split:
        per_class = split["per_class"]
        if not isinstance(per_class, dict) or not all(map(_is_number, per_class.values())):
            return False
    if "confusion" not in split:
        return True
    names, rows = split["class_names"], split["confusion"]
    if not all(isinstance(part, list) and len(part) == number for part in (names, rows)):
        return False
    return len({*names}) == number and all(
        isinstance(row, list) and len(row) == number and all(type(n) is int for n in row)
        for row in rows
    )


def _require_equal_splits(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Check that each λ of a protocol is there once, and that all have the same splits."""
    splits: dict[str, list[tuple[str, int]]] = {}
    lams = set()
    for entry in entries:
        protocol, lam = entry["protocol"], entry["lam"]
        own = [(split["name"], split["classes"]) for split in entry["splits"]]
        if (protocol, lam) in lams or splits.setdefault(protocol, own) != own:
            raise _damaged(path, "two entries of a protocol do not fit together")
        lams.add((protocol, lam))


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and math.isfinite(value))  # type: ignore[arg-type]


def _require_own_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that ``results.json`` and ``settings.json`` are of one evaluation."""
    path = folder / _SETTINGS_FILE
    if not path.exists():
        return
    stored = _object(path)
    names = sorted(n for n in stored.keys() & settings.keys() if stored[n] != settings[n])
    if names:
        raise RecordsError(
            f"{folder} holds the files of two evaluations: {RESULTS_FILE} and {_SETTINGS_FILE} "
            f"differ in {listed(names)}. Give each evaluation a folder of its own, and run "
            "'openvclip evaluate' again."
        )


def _require_same_run(
    folder: Path, entries: Sequence[Mapping[str, Any]], predictions: Predictions
) -> None:
    """Check that the accuracies of the predictions are those of ``results.json``."""
    counted = {
        (split.protocol, lam, split.name): _top1(split.ranks[i].tolist())
        for split in predictions.splits
        for i, lam in enumerate(predictions.lams)
    }
    stated = {
        (entry["protocol"], entry["lam"], split["name"]): split["top1"]
        for entry in entries
        for split in entry["splits"]
    }
    if counted.keys() != stated.keys() or not all(
        _equal(value, stated[key]) for key, value in counted.items()
    ):
        raise RecordsError(
            f"{folder} holds the files of two evaluations: {PREDICTIONS_FILE} has other "
            f"accuracies than {RESULTS_FILE}. Run 'openvclip evaluate' again with this version: "
            "it writes both files."
        )


def _equal(a: float | None, b: float | None) -> bool:
    return a is b is None or (a is not None and b is not None and abs(a - b) < _ROUNDING)


def _top1(ranks: list[int]) -> float | None:
    return sum(rank == 0 for rank in ranks) / len(ranks) if ranks else None
