"""Whether a model is the model of an index."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from openvclip.errors import SearchError
from openvclip.models.video_clip import VideoCLIP
from openvclip.search.storage import IndexSettings
from openvclip.search.windows import WindowOptions, WindowSettings
from openvclip.weights.hashing import weights_hash
from openvclip.weights.names import named_state

__all__ = [
    "model_difference",
    "require_same_model",
    "require_same_windows",
    "window_difference",
]

# The settings that change the vector of a window. The name of the model does not.
_SETTINGS = ("expansion", "pixels", "pooling")
_QUICK = "-quickgelu"


def require_same_model(folder: Path, settings: IndexSettings, model: VideoCLIP) -> None:
    """Check that a model computes the vectors of an index.

    Args:
        folder: the index.
        settings: what the index was made with.
        model: the model.

    Raises:
        SearchError: its weights or settings differ from those of the index. The error shows both.
    """
    contract = model.contract
    windows = replace(settings.windows, num_frames=contract.frames.num_frames)
    found = IndexSettings(contract, weights_hash(named_state(model.model)), windows)
    difference = model_difference(settings, found)
    if difference is not None:
        name, first, second = difference
        source = "" if settings.source is None else f" ({settings.source})"
        raise SearchError(
            f"{folder}: another model made this index: {name} is {first} in the index and "
            f"{second} in the model that is given. Give the model of the index{source}, or "
            "make a new index with this model."
        )


def model_difference(own: IndexSettings, given: IndexSettings) -> tuple[str, Any, Any] | None:
    """Return the first setting of two models that changes the vector of a window, if they differ.

    Args:
        own: the settings of a model.
        given: the settings of another model.

    Returns:
        The name of the setting, and its values; ``None`` if the vectors can be compared.
    """
    first, second = own.contract, given.contract
    pairs = [(name, getattr(first, name), getattr(second, name)) for name in _SETTINGS]
    pairs.append(("frames.num_frames", own.windows.num_frames, given.windows.num_frames))
    names = first.model, second.model
    if names[0] != names[1] and names[0].removesuffix(_QUICK) == names[1].removesuffix(_QUICK):
        pairs.append(("model", *names))  # the same weights with another activation
    pairs.append(("weights_hash", own.weights_hash, given.weights_hash))
    return next((_shown(*pair) for pair in pairs if pair[1] != pair[2]), None)


def _shown(name: str, first: Any, second: Any) -> tuple[str, Any, Any]:
    """Return two values without the settings of a section that are equal."""
    if not is_dataclass(first) or type(first) is not type(second):
        return name, first, second
    names = [f.name for f in fields(first) if getattr(first, f.name) != getattr(second, f.name)]
    texts = [
        ", ".join(f"{n}={getattr(section, n)!r}" for n in names) for section in (first, second)
    ]
    return name, texts[0], texts[1]


def require_same_windows(folder: Path, settings: WindowSettings, windows: WindowOptions) -> None:
    """Check that options for windows agree with an index.

    Args:
        folder: the index.
        settings: the windows of the index.
        windows: the options. An option that is ``None`` agrees with every index.

    Raises:
        SearchError: they differ. The error shows both.
    """
    difference = window_difference(settings, windows)
    if difference is not None:
        name, own, given = difference
        raise SearchError(
            f"{folder}: {name} is {own:g} in the index, but {given:g} is given. Leave the option "
            "out, or make a new index with other windows."
        )


def window_difference(
    own: WindowSettings, given: WindowSettings | WindowOptions
) -> tuple[str, float, float] | None:
    """Return the first length that differs between two settings of windows, if there is one.

    Args:
        own: the settings.
        given: other settings, or options. An option that is ``None`` agrees with every setting.

    Returns:
        The name of the length, and its values; ``None`` if videos are cut into the same windows.
    """
    for name in ("seconds", "step"):
        first, second = getattr(own, name), getattr(given, name)
        if second is not None and not math.isclose(first, second, rel_tol=1e-6):
            return name, first, second
    return None
