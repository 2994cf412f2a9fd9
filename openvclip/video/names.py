"""Class names of the data sets in the papers, and the rules that make them from folder names.

Source: the released code of Open-VCLIP. The three Kinetics-600 sets come from Chen & Huang (ICCV
2021). Each set has 160 of the 220 classes that Kinetics-600 adds to Kinetics-400.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources

from openvclip.errors import VideoOptionError, did_you_mean

__all__ = ["class_name", "class_names"]


def class_names(dataset: str) -> list[str]:
    """Return the class names of a data set in the order of their class indices.

    The names are spelled as in the prompts of the released code.

    Args:
        dataset: ``"ucf101"``, ``"hmdb51"``, ``"kinetics400"``, or one of the zero-shot sets
            ``"kinetics600-1"``, ``"kinetics600-2"``, ``"kinetics600-3"``.

    Raises:
        VideoOptionError: ``dataset`` is not known.
    """
    known = _tables()
    if dataset not in known:
        raise VideoOptionError(
            f"dataset={dataset!r} is not known: choose one of {', '.join(map(repr, known))}"
            f"{did_you_mean(dataset, known)}."
        )
    return list(known[dataset])


def class_name(dataset: str, folder: str) -> str:
    """Return the class name for the name of a class folder.

    Args:
        dataset: ``"ucf101"``: the name is split at capital letters (``ApplyEyeMakeup`` becomes
            "Apply Eye Makeup"), but ``YoYo`` becomes "Yoyo". ``"hmdb51"``: underscores become
            spaces. Kinetics: the name is not changed.
        folder: the name of the folder, or the class in the annotations.
    """
    if dataset == "ucf101":
        return re.sub(r"(?<=.)(?=[A-Z])", " ", folder.replace("YoYo", "Yoyo"))
    return folder.replace("_", " ") if dataset == "hmdb51" else folder


@functools.cache
def _tables() -> dict[str, list[str]]:
    text = resources.files("openvclip.video").joinpath("class_names.json").read_text("utf-8")
    tables: dict[str, list[str]] = json.loads(text)
    return tables
