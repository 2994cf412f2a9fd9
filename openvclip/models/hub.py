"""The Hugging Face Hub: names without a connection, and image processors."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

_CONNECT = 5.0  # seconds


def is_offline(name: str) -> bool:
    """Return whether ``name`` is on the Hugging Face Hub and the Hub can't be reached.

    huggingface_hub tries again and again, for half a minute, before it says so. With
    ``local_files_only=True``, files that were downloaded before are loaded from its cache at once.

    Args:
        name: a folder, or a name on the Hub.
    """
    from huggingface_hub import constants, get_session

    if Path(name).is_dir():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT)
    except Exception:  # the errors of its libraries have no common class in all versions
        return True
    return False


def is_cached(repository: str, file: str) -> bool:
    """Return whether a file of a repository of the Hub was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file), str)


def image_processor_of(name: str) -> Any | None:
    """Return the image processor that is stored with a model of transformers, or ``None``.

    Args:
        name: a folder, or a name on the Hub. A name on the Hub is looked up once in a program.
    """
    return _load_processor(name) if Path(name).is_dir() else _load_processor_once(name)


def _load_processor(name: str) -> Any | None:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name, local_files_only=is_offline(name))
    except (ImportError, OSError, ValueError, KeyError):
        return None


_load_processor_once = lru_cache(maxsize=None)(_load_processor)
