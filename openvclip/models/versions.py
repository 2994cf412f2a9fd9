"""The versions of the packages that a model is made with."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("openvclip", "torch", "open_clip_torch", "transformers", "av", "webdataset", "numpy")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed, by name."""
    return dict(_versions())


@cache  # the files of the packages are searched once
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
