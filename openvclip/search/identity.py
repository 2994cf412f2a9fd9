"""Whether a model is the model of an index."""

from __future__ import annotations

from typing import Any

from openvclip.errors import SearchError
from openvclip.models.video_clip import VideoCLIP
from openvclip.search.storage import Storage
from openvclip.search.windows import WindowOptions
from openvclip.weights.hashing import weights_hash
from openvclip.weights.names import named_state

__all__ = ["require_same_model", "require_same_windows"]

# The settings that change the vector of a window.
_SETTINGS = ("library", "model", "expansion", "pixels", "pooling")


def require_same_model(storage: Storage, model: VideoCLIP) -> None:
    """Check that a model computes the vectors of an index.

    Raises:
        SearchError: its weights or settings differ from those of the index. The error shows both.
    """
    settings, contract = storage.settings, model.contract
    for name in _SETTINGS:
        own, given = getattr(settings.contract, name), getattr(contract, name)
        if own != given:
            raise _other_model(storage, name, own, given)
    frames = settings.windows.num_frames, contract.frames.num_frames
    if frames[0] != frames[1]:
        raise _other_model(storage, "frames.num_frames", *frames)
    given_hash = weights_hash(named_state(model.model))
    if given_hash != settings.weights_hash:
        raise _other_model(storage, "weights_hash", settings.weights_hash, given_hash)


def require_same_windows(storage: Storage, windows: WindowOptions) -> None:
    """Check that options for windows agree with an index.

    Raises:
        SearchError: they differ. The error shows both.
    """
    own = storage.settings.windows
    for name in ("seconds", "step"):
        given = getattr(windows, name)
        if given is not None and abs(given - getattr(own, name)) > 1e-9:
            raise SearchError(
                f"{storage.folder}: the index has windows of {own}, but {name}={given:g} is given. "
                f"Leave {name} out, or make a new index."
            )


def _other_model(storage: Storage, name: str, own: Any, given: Any) -> SearchError:
    source = storage.settings.source
    where = f" The index was made with the model {source}." if source is not None else ""
    return SearchError(
        f"{storage.folder}: another model made this index: {name} is {_shown(own)} in the index, "
        f"and {_shown(given)} in the model that is given.{where} Give that model, or make a new "
        "index with this model."
    )


def _shown(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 60 else str(value)
