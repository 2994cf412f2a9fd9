"""The class names of the data sets that the papers use, and the rules that make them.

Source: the released code of Open-VCLIP; the three Kinetics-600 sets are those of Chen & Huang (ICCV
2021), 160 each of the 220 classes that Kinetics-600 adds to Kinetics-400.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources

from openvclip.errors import VideoOptionError

__all__ = ["class_name", "class_names"]


def class_names(dataset: str) -> list[str]:
    """The classes of a data set in the order of their indices, as the prompts spell them.

    Args:
        dataset: ``"ucf101"``, ``"hmdb51"``, ``"kinetics400"``, or one of the zero-shot sets
            ``"kinetics600-1"``, ``"kinetics600-2"``, ``"kinetics600-3"``.

    Raises:
        VideoOptionError: another name.
    """
    known = _tables()
    if dataset not in known:
        raise VideoOptionError(
            f"dataset={dataset!r} is not known: choose one of {', '.join(map(repr, known))}."
        )
    return list(known[dataset])


def class_name(dataset: str, folder: str) -> str:
    """The name of a class from that of its folder.

    Args:
        dataset: ``"ucf101"``: split at capitals (``ApplyEyeMakeup`` is "Apply Eye Makeup"), but
            ``YoYo`` is "Yoyo". ``"hmdb51"``: underscores become spaces. Kinetics: as annotated.
        folder: the folder, or the label as annotated.
    """
    if dataset == "ucf101":
        return re.sub(r"(?<=.)(?=[A-Z])", " ", folder.replace("YoYo", "Yoyo"))
    return folder.replace("_", " ") if dataset == "hmdb51" else folder


@functools.cache
def _tables() -> dict[str, list[str]]:
    text = resources.files("openvclip.video").joinpath("class_names.json").read_text("utf-8")
    tables: dict[str, list[str]] = json.loads(text)
    return tables
