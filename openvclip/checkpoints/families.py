"""The families of released checkpoints, and how each is converted to open_clip's ``CLIP``.

``FAMILIES`` is the table of all families. To add a family, add an entry to the table. A
translation that no other family shares gets a file of its own, such as ``hugging_face.py``.

The family and the conversion are decided from names alone, before a weight is read. The released
checkpoints of ViFi-CLIP and Vita-CLIP hold prompts as well and are not in the table. See
``released_prompts.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from openvclip.checkpoints.clip_names import missing_names, uneven_blocks
from openvclip.checkpoints.formats import SETTINGS
from openvclip.checkpoints.hugging_face import from_hugging_face, is_hugging_face
from openvclip.checkpoints.translation import (
    Source,
    Translation,
    keep_clip_names,
    keep_names,
    strip_model_prefix,
)

_SETTINGS = tuple(f"{prefix}{name}" for prefix in ("", "model.") for name in sorted(SETTINGS))


@dataclass(frozen=True)
class Family:
    """A family of released checkpoints.

    Attributes:
        name: the name that :func:`inspect_checkpoint` shows and that converted files store.
        recognise: returns whether a file is of this family. It is called with the canonical names
            of the file's entries, and with whether the file is a TorchScript archive.
        translate: maps the names of the file to open_clip's names.
        quick_gelu: whether the family was trained with QuickGELU, which no weight shows.
        ignored: patterns of :mod:`fnmatch` for entries that are not weights, such as position ids.
        single_towers: whether a file may hold one tower alone, with or without its projection.
    """

    name: str
    recognise: Callable[[frozenset[str], bool], bool]
    translate: Translation = keep_names
    quick_gelu: bool = False
    ignored: tuple[str, ...] = ()
    single_towers: bool = False

    @property
    def converted(self) -> bool:
        """Whether entries are renamed or reshaped when a file is loaded."""
        return self.translate is not keep_names


# --- recognition ---------------------------------------------------------------------------------


def _is_froster(names: frozenset[str], torchscript: bool) -> bool:
    has_projectors = any(name.startswith(("projector_v.", "projector_t.")) for name in names)
    return _is_open_vclip(names, torchscript) and has_projectors


def _is_open_vclip(names: frozenset[str], torchscript: bool) -> bool:
    return "model.visual.conv1.weight" in names


def _is_hugging_face(names: frozenset[str], torchscript: bool) -> bool:
    return is_hugging_face(names)


def _is_custom_text(names: frozenset[str], torchscript: bool) -> bool:
    return all(any(name.startswith(tower) for name in names) for tower in ("visual.", "text."))


def _is_openai(names: frozenset[str], torchscript: bool) -> bool:
    return _is_open_clip(names, torchscript) and (torchscript or bool(names & SETTINGS))


def _is_open_clip(names: frozenset[str], torchscript: bool) -> bool:
    return {"visual.conv1.weight", "token_embedding.weight"} <= names


FAMILIES: tuple[Family, ...] = (
    Family("FROSTER", _is_froster, strip_model_prefix, quick_gelu=True, ignored=_SETTINGS),
    Family("Open-VCLIP", _is_open_vclip, strip_model_prefix, quick_gelu=True, ignored=_SETTINGS),
    Family(
        "Hugging Face CLIP",
        _is_hugging_face,
        from_hugging_face,
        ignored=("*embeddings.position_ids",),
        single_towers=True,
    ),
    Family("open_clip CustomTextCLIP", _is_custom_text),
    Family("OpenAI CLIP", _is_openai, keep_clip_names, quick_gelu=True, ignored=_SETTINGS),
    Family("open_clip CLIP", _is_open_clip),
    Family("unknown", lambda names, torchscript: True),
)
"""All families. A file is of the first family that recognises its names."""


def has_quick_gelu(name: str) -> bool:
    """Return whether the family of this name was trained with QuickGELU."""
    return any(family.quick_gelu for family in FAMILIES if family.name == name)


# --- conversion ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How the entries of a file become the entries of open_clip's ``CLIP``.

    Attributes:
        family: the family of the file.
        targets: maps each name of open_clip to the entries of the file that it is made from.
        ignored: entries of the file that are known and are not weights.
        left_over: entries of the file that have no place in the result.
        missing: names of open_clip that the layers of the file require, but that the file lacks.
    """

    family: Family
    targets: dict[str, Source]
    ignored: tuple[str, ...]
    left_over: tuple[str, ...]
    missing: tuple[str, ...]


def plan_conversion(names: Collection[str], *, torchscript: bool = False) -> Plan:
    """Recognise the family of a file and plan its conversion, from names alone.

    Args:
        names: canonical names of the file's entries.
        torchscript: whether the file is a TorchScript archive, as OpenAI's files are.
    """
    entries = frozenset(names)
    family = next(family for family in FAMILIES if family.recognise(entries, torchscript))
    ignored = tuple(
        name for name in names if any(fnmatchcase(name, pattern) for pattern in family.ignored)
    )
    weights = [name for name in names if name not in set(ignored)]
    targets = family.translate(weights)
    used = {name for source in targets.values() for name in source.names}
    left_over = tuple(name for name in weights if name not in used)
    if family.converted:
        missing = missing_names(targets, single_towers=family.single_towers)
    else:
        missing = uneven_blocks(targets)
    return Plan(family, targets, ignored, left_over, missing)


def convert(plan: Plan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under open_clip's names. Entries that are only renamed are not copied.

    Raises:
        CheckpointError: the shape of an entry is not that of CLIP.
    """
    return {name: source.take(weights) for name, source in plan.targets.items()}
