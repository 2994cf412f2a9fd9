"""The Hugging Face Hub without a connection."""

from __future__ import annotations

from pathlib import Path

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
