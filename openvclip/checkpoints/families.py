"""From the names of released checkpoints to those of open_clip's ``CLIP``.

Everything is decided by names alone, before any weight is read: :func:`plan_conversion` says which
family the names are of, which entries of the file make up each entry of the result, which are of
no use, and which have no place or are not there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openvclip.checkpoints.formats import SETTINGS
from openvclip.errors import CheckpointError

OPENAI = "OpenAI CLIP"
OPEN_CLIP = "open_clip CLIP"
HUGGING_FACE = "Hugging Face CLIP"
OPEN_VCLIP = "Open-VCLIP"
FROSTER = "FROSTER"
CUSTOM_TEXT = "open_clip CustomTextCLIP"
UNKNOWN = "unknown"

UNTOUCHED = frozenset({OPEN_CLIP, CUSTOM_TEXT, UNKNOWN})
"""Families whose entries keep their names: nothing of them is left over."""

QUICK_GELU = frozenset({OPENAI, OPEN_VCLIP, FROSTER})
"""Families that were trained with QuickGELU, which no weight shows."""

_BLOCK = (
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    *(
        f"{part}.{kind}"
        for part in ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ),
)

_IMAGE_ENDS = (
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.conv1.weight",
    *(f"visual.{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")),
)
_TEXT_ENDS = (
    "token_embedding.weight",
    "positional_embedding",
    "ln_final.weight",
    "ln_final.bias",
)
_BLOCK_NAME = re.compile(
    r"(?P<tower>(?:visual\.|text\.)?transformer)\.resblocks\.(?P<layer>\d+)\.(?P<part>.+)"
)
_RESNET_NAME = re.compile(r"visual\.((conv|bn)[123]|layer[1-4]\.\d+|attnpool)\.")


@dataclass(frozen=True)
class Source:
    """Where one entry of the result comes from.

    Attributes:
        names: entries of the file; several are joined along their first axis.
        transposed: whether the entry is the transpose of what the file holds.
    """

    names: tuple[str, ...]
    transposed: bool = False

    def take(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The entry, with every value as it stands in the file.

        Raises:
            CheckpointError: the shapes do not allow for it.
        """
        parts = [weights[name] for name in self.names]
        if len({part.shape for part in parts}) > 1 or (self.transposed and parts[0].ndim != 2):
            given = ", ".join(f"{n} {list(weights[n].shape)}" for n in self.names)
            raise CheckpointError(
                f"The shapes are not those of CLIP: {given}; expected "
                f"{'a matrix' if self.transposed else 'query, key and value of one shape'}."
            )
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.T.contiguous() if self.transposed else whole


@dataclass(frozen=True)
class Plan:
    """How the entries of a file become those of open_clip's ``CLIP``.

    Attributes:
        family: which family the names are of.
        targets: names in open_clip to where they come from.
        ignored: entries of the file that are known and not weights.
        left_over: entries of the file that have no place in the result.
        missing: names in open_clip that the file's own layers call for and that are not there.
    """

    family: str
    targets: dict[str, Source]
    ignored: tuple[str, ...]
    left_over: tuple[str, ...]
    missing: tuple[str, ...]


def plan_conversion(names: Collection[str], *, torchscript: bool = False) -> Plan:
    """Decide, by canonical names alone, what becomes of each entry of a file.

    Args:
        names: the file's entries, under canonical names.
        torchscript: whether the file is a TorchScript archive, as OpenAI's are.
    """
    family = _family(frozenset(names), torchscript)
    if family in UNTOUCHED:
        targets = {name: Source((name,)) for name in names}
        return Plan(family, targets, (), (), _uneven_blocks(targets))
    ignored = tuple(name for name in names if _is_ignored(name, family))
    weights = [name for name in names if name not in set(ignored)]
    if family == HUGGING_FACE:
        targets = _from_hugging_face(weights)
    else:
        prefix = "" if family == OPENAI else "model."
        targets = {
            name.removeprefix(prefix): Source((name,))
            for name in weights
            if name.startswith(prefix) and _is_clip_name(name.removeprefix(prefix))
        }
    used = {name for source in targets.values() for name in source.names}
    left_over = tuple(name for name in weights if name not in used)
    return Plan(family, targets, ignored, left_over, _missing(targets, family))


def convert(plan: Plan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under open_clip's names; those that only change names are not copied.

    Raises:
        CheckpointError: an entry's shape does not allow for it.
    """
    return {name: source.take(weights) for name, source in plan.targets.items()}


# --- recognition -------------------------------------------------------------------------------


def _family(names: frozenset[str], torchscript: bool) -> str:
    if "model.visual.conv1.weight" in names:
        distilled = any(name.startswith(("projector_v.", "projector_t.")) for name in names)
        return FROSTER if distilled else OPEN_VCLIP
    if _is_hugging_face(names):
        return HUGGING_FACE
    if any(n.startswith("visual.") for n in names) and any(n.startswith("text.") for n in names):
        return CUSTOM_TEXT
    if "visual.conv1.weight" in names and "token_embedding.weight" in names:
        return OPENAI if torchscript or names & SETTINGS else OPEN_CLIP
    return UNKNOWN


def _is_hugging_face(names: frozenset[str]) -> bool:
    # A class embedding and separate projections tell CLIP's tower from SigLIP's and from BERT.
    for prefix in ("vision_model.", ""):
        if {f"{prefix}embeddings.class_embedding", f"{prefix}pre_layrnorm.weight"} <= names:
            return True
    if any(name.startswith("vision_model.") for name in names):
        return False
    for prefix in ("text_model.", ""):
        tower = {f"{prefix}embeddings.token_embedding.weight", f"{prefix}final_layer_norm.weight"}
        if tower <= names and f"{prefix}head.weight" not in names:
            return True
    return False


def _is_ignored(name: str, family: str) -> bool:
    if family == HUGGING_FACE:
        return name.endswith("embeddings.position_ids")
    return name.removeprefix("model.") in SETTINGS


def _is_clip_name(name: str) -> bool:
    block = _BLOCK_NAME.fullmatch(name)
    if block:
        return block["part"] in _BLOCK and block["tower"] != "text.transformer"
    ends = (*_IMAGE_ENDS, *_TEXT_ENDS, "visual.proj", "text_projection", "logit_scale")
    return name in ends or _RESNET_NAME.match(name) is not None


# --- what is not there -------------------------------------------------------------------------


def _missing(names: Collection[str], family: str) -> tuple[str, ...]:
    """Names that a CLIP with the towers and layers that are there has, and that are not there."""
    image = any(name.startswith("visual.") for name in names)
    text = any(not name.startswith(("visual.", "logit_scale")) for name in names)
    resnet = any(_RESNET_NAME.match(name) for name in names if name != "visual.conv1.weight")
    # Hugging Face's towers are also kept alone, with their projection or without.
    alone = family == HUGGING_FACE and not (image and text)
    expected = set(_block_names(names))
    if image and not resnet:
        expected |= {*_IMAGE_ENDS} | (set() if alone else {"visual.proj"})
    if text:
        expected |= {*_TEXT_ENDS} | (set() if alone else {"text_projection"})
    if not alone:
        expected |= {"visual.conv1.weight", "token_embedding.weight", "logit_scale"}
    return tuple(sorted(expected - set(names)))


def _block_names(names: Collection[str]) -> list[str]:
    return [
        f"{tower}.resblocks.{layer}.{part}"
        for tower, parts in _blocks(names).items()
        for layer in range(1 + max(parts))
        for part in _BLOCK
    ]


def _blocks(names: Collection[str]) -> dict[str, dict[int, set[str]]]:
    """For each tower, and for each of its layers, the parts that are there."""
    towers: dict[str, dict[int, set[str]]] = {}
    for name in names:
        found = _BLOCK_NAME.fullmatch(name)
        if found:
            layers = towers.setdefault(found["tower"], {})
            layers.setdefault(int(found["layer"]), set()).add(found["part"])
    return towers


def _uneven_blocks(names: Collection[str]) -> tuple[str, ...]:
    """Parts that some blocks of a tower have and others lack, whatever the tower's variant."""
    missing: list[str] = []
    for tower, layers in _blocks(names).items():
        parts = set().union(*layers.values())
        for layer in range(1 + max(layers)):
            lacking = sorted(parts - layers.get(layer, set()))
            missing.extend(f"{tower}.resblocks.{layer}.{part}" for part in lacking)
    return tuple(missing)


# --- Hugging Face ------------------------------------------------------------------------------

_IN_TOWER = {
    "vision": {
        "embeddings.class_embedding": "visual.class_embedding",
        "embeddings.patch_embedding.weight": "visual.conv1.weight",
        "embeddings.position_embedding.weight": "visual.positional_embedding",
        "pre_layrnorm.weight": "visual.ln_pre.weight",
        "pre_layrnorm.bias": "visual.ln_pre.bias",
        "post_layernorm.weight": "visual.ln_post.weight",
        "post_layernorm.bias": "visual.ln_post.bias",
    },
    "text": {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    },
}
_BLOCKS_OF = {"vision": "visual.transformer.resblocks", "text": "transformer.resblocks"}
_IN_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_QKV = ("q_proj", "k_proj", "v_proj")  # the order in which in_proj_weight holds them
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def _from_hugging_face(names: Collection[str]) -> dict[str, Source]:
    there = frozenset(names)
    targets: dict[str, Source] = {}
    for name in names:
        for target, source in _hugging_face_target(name, there):
            if all(part in there for part in source.names):
                targets[target] = source
    return targets


def _hugging_face_target(name: str, there: frozenset[str]) -> list[tuple[str, Source]]:
    if name == "logit_scale":
        return [(name, Source((name,)))]
    if name in ("visual_projection.weight", "text_projection.weight"):
        target = "visual.proj" if name.startswith("visual") else "text_projection"
        return [(target, Source((name,), transposed=True))]
    tower, prefix = _tower_of(name, there)
    inner = name.removeprefix(prefix)
    if inner in _IN_TOWER[tower]:
        return [(_IN_TOWER[tower][inner], Source((name,)))]
    layer = _LAYER.fullmatch(inner)
    if layer is None or not name.startswith(prefix):
        return []
    number, part, kind = layer.groups()
    block = f"{_BLOCKS_OF[tower]}.{number}"
    if part in _IN_BLOCK:
        return [(f"{block}.{_IN_BLOCK[part]}.{kind}", Source((name,)))]
    if part.removeprefix("self_attn.") in _QKV:
        start = f"{prefix}encoder.layers.{number}.self_attn"
        three = tuple(f"{start}.{which}.{kind}" for which in _QKV)
        return [(f"{block}.attn.in_proj_{kind}", Source(three))]
    return []


def _tower_of(name: str, there: frozenset[str]) -> tuple[str, str]:
    """The tower that an entry is of, and what stands before its names there.

    A tower that is kept alone has its names without any prefix.
    """
    for tower in ("vision", "text"):
        if name.startswith(f"{tower}_model."):
            return tower, f"{tower}_model."
    return ("vision" if "embeddings.class_embedding" in there else "text"), ""
