"""The families of released checkpoints, and how each is converted to open_clip's ``CLIP``.

``FAMILIES`` is the table of all families. To add a family, add an entry to the table. A
translation that no other family shares gets a file of its own, such as ``hugging_face.py``.

The family and the conversion are decided from names alone, before a weight is read. The released
checkpoints of ViFi-CLIP and Vita-CLIP hold prompts as well and are not in the table. See
``released_prompts.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
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
from openvclip.errors import CheckpointError, listed

_SETTINGS = tuple(f"{prefix}{name}" for prefix in ("", "model.") for name in sorted(SETTINGS))


@dataclass(frozen=True)
class Origin:
    """What a file shows beside the names of its entries.

    Attributes:
        torchscript: whether the file is a TorchScript archive, as OpenAI's files are.
        key: the top-level entry that holds the weights, or ``""``.
        beside: the other top-level entries.
        gelu: whether the code of a TorchScript archive calls GELU.
    """

    torchscript: bool = False
    key: str = ""
    beside: tuple[str, ...] = ()
    gelu: bool = False


@dataclass(frozen=True)
class Family:
    """A family of released checkpoints.

    Attributes:
        name: the name that :func:`inspect_checkpoint` shows and that converted files store.
        recognise: returns whether a file is of this family. It is called with the canonical names
            of the file's entries, and with the :class:`Origin` of the file.
        translate: maps the names of the file to open_clip's names.
        quick_gelu: whether the family was trained with QuickGELU, which no weight shows.
        ignored: patterns of :mod:`fnmatch` for entries that are not weights, such as position ids.
        single_towers: whether a file may hold one tower alone, with or without its projection.
    """

    name: str
    recognise: Callable[[frozenset[str], Origin], bool]
    translate: Translation = keep_names
    quick_gelu: bool = False
    ignored: tuple[str, ...] = ()
    single_towers: bool = False

    @property
    def converted(self) -> bool:
        """Whether entries are renamed or reshaped when a file is loaded."""
        return self.translate is not keep_names


# --- recognition ---------------------------------------------------------------------------------


def _is_froster(names: frozenset[str], origin: Origin) -> bool:
    has_projectors = any(name.startswith(("projector_v.", "projector_t.")) for name in names)
    return _is_open_vclip(names, origin) and has_projectors


def _is_open_vclip(names: frozenset[str], origin: Origin) -> bool:
    # Many modules keep a CLIP as "model", with any activation. The trainer of Open-VCLIP also
    # stores its weights as "model_state": alone, or with its settings and the optimizer.
    by_trainer = not origin.beside or {"cfg", "optimizer_state"} <= set(origin.beside)
    return "model.visual.conv1.weight" in names and origin.key == "model_state" and by_trainer


def _is_hugging_face(names: frozenset[str], origin: Origin) -> bool:
    return is_hugging_face(names)


def _is_custom_text(names: frozenset[str], origin: Origin) -> bool:
    return all(any(name.startswith(tower) for name in names) for tower in ("visual.", "text."))


def _is_openai(names: frozenset[str], origin: Origin) -> bool:
    has_settings = bool(names & SETTINGS)
    return _is_open_clip(names, origin) and (
        has_settings or (origin.torchscript and not origin.gelu)
    )


def _is_open_clip(names: frozenset[str], origin: Origin) -> bool:
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
    Family("unknown", lambda names, origin: True),
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
        prefix: the text that was removed from the front of the names, or ``""``.
        prefixes: the prefixes of the CLIPs in a file that holds several CLIPs, or none.
    """

    family: Family
    targets: dict[str, Source]
    ignored: tuple[str, ...]
    left_over: tuple[str, ...]
    missing: tuple[str, ...]
    prefix: str = ""
    prefixes: tuple[str, ...] = ()

    @property
    def converted(self) -> bool:
        """Whether entries are renamed or reshaped."""
        return self.family.converted or bool(self.prefix)


def plan_conversion(
    names: Collection[str],
    origin: Origin | None = None,
    *,
    left_out: Callable[[str], bool] = lambda name: False,
) -> Plan:
    """Recognise the family of a file and plan its conversion, from names alone.

    A CLIP that is a submodule of another module, such as ``model.`` of a Lightning module, is found
    under its prefix.

    Args:
        names: canonical names of the file's entries.
        origin: what the file shows beside its names. Default: nothing.
        left_out: returns whether an entry may be left out. If a file holds several CLIPs, and all
            but one may be left out, the remaining CLIP is converted.
    """
    entries = frozenset(names)
    origin = origin or Origin()
    family = next(f for f in FAMILIES if f.recognise(entries, origin))
    if origin.torchscript:  # an archive stores buffers that a state dict leaves out
        family = replace(family, ignored=(*family.ignored, "attn_mask"))
    if family.name == FAMILIES[-1].name:
        prefixes = _prefixes_of_clips(entries)
        prefix = chosen_prefix(prefixes, entries, left_out)
        if prefix is not None:
            return plan_under_prefix(names, prefix)
        return replace(_plan_of_family(family, names), prefixes=tuple(prefixes))
    return _plan_of_family(family, names)


def chosen_prefix(
    prefixes: Sequence[str], names: Collection[str], left_out: Callable[[str], bool]
) -> str | None:
    """Return the prefix of the model to load, or ``None`` if there is no or more than one choice.

    Args:
        prefixes: the prefixes of all models in a file.
        names: the names of all entries.
        left_out: returns whether an entry may be left out. A model is left out if all its entries
            may be left out.
    """
    if len(prefixes) == 1:
        return prefixes[0]
    wanted = [
        prefix
        for prefix in prefixes
        if not all(left_out(name) for name in names if name.startswith(prefix))
    ]
    return wanted[0] if len(wanted) == 1 else None


def plan_under_prefix(names: Collection[str], prefix: str, *, as_named: bool = False) -> Plan:
    """Plan the conversion of the entries whose names start with ``prefix``.

    Only entries under the prefix are converted. The other entries are left over.

    Args:
        names: canonical names of the file's entries.
        prefix: the text before the names, such as ``"model."``.
        as_named: whether the names behind the prefix are kept. Default: they become open_clip's.
    """
    inner = _names_under(prefix, names)
    plan = plan_conversion(inner)
    plan = plan_as_named(plan, inner) if as_named else plan
    beside = tuple(name for name in names if not name.startswith(prefix))

    def outer(parts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prefix + part for part in parts)

    return replace(
        plan,
        targets={
            name: replace(source, names=outer(source.names))
            for name, source in plan.targets.items()
        },
        ignored=outer(plan.ignored),
        left_over=(*outer(plan.left_over), *beside),
        prefix=prefix + plan.prefix,
    )


def plan_as_named(plan: Plan, names: Collection[str], wanted: Collection[str] = ()) -> Plan:
    """Return the plan that keeps the names of all entries.

    Args:
        plan: the conversion of the file.
        names: canonical names of the file's entries.
        wanted: names to keep even if ``plan`` ignores them. Other ignored entries are left out.
    """
    ignored = tuple(name for name in plan.ignored if name not in wanted)
    targets = keep_names([name for name in names if name not in set(ignored)])
    family = replace(plan.family, translate=keep_names)
    return Plan(family, targets, ignored, (), (), prefixes=plan.prefixes)


def require_one_model(plan: Plan, path: str) -> None:
    """Check that a file does not hold several models under several prefixes.

    Raises:
        CheckpointError: the file holds several models.
    """
    if len(plan.prefixes) > 1:
        first, *others = plan.prefixes
        patterns = [f"{prefix}*" for prefix in others]
        raise CheckpointError(
            f"{path} holds {len(plan.prefixes)} models, under the prefixes "
            f"{listed([repr(prefix) for prefix in plan.prefixes])}. Choose one of them: "
            f"allow_unexpected={patterns} leaves out all but {first!r}."
        )


def _plan_of_family(family: Family, names: Collection[str]) -> Plan:
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


# One entry of each family, which stands at the top of the names of a CLIP of the family.
_FIRST_ENTRIES = (
    "visual.conv1.weight",
    "visual.trunk.patch_embed.proj.weight",
    "vision_model.embeddings.class_embedding",
)

# The first parts of all names of a CLIP of open_clip, OpenAI or Hugging Face.
_PARTS_OF_CLIP = SETTINGS | {
    *("visual", "text", "transformer", "token_embedding", "positional_embedding", "ln_final"),
    *("text_projection", "logit_scale", "logit_bias", "attn_mask"),
    *("vision_model", "text_model", "visual_projection"),
}


def _prefixes_of_clips(names: frozenset[str]) -> list[str]:
    """Return the prefixes under which the names of whole CLIPs stand, sorted."""
    prefixes = {
        name.removesuffix(first)
        for name in names
        for first in _FIRST_ENTRIES
        if name.endswith(f".{first}")
    }
    return sorted(prefix for prefix in prefixes if _is_clip_under(prefix, names))


def _is_clip_under(prefix: str, names: frozenset[str]) -> bool:
    inner = frozenset(_names_under(prefix, names))
    is_clip = any(family.recognise(inner, Origin()) for family in FAMILIES[:-1])
    only_clip = {name.partition(".")[0] for name in inner} <= _PARTS_OF_CLIP
    # "model." is the prefix of Lightning and of the released trainers, and often holds more.
    return is_clip and (only_clip or prefix == "model.")


def _names_under(prefix: str, names: Collection[str]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def convert(plan: Plan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under open_clip's names. Entries that are only renamed are not copied.

    Raises:
        CheckpointError: the shape of an entry is not that of CLIP.
    """
    return {name: source.take(weights) for name, source in plan.targets.items()}
