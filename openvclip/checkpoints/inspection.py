"""What a file of weights holds: family, backbone, sizes, and what fits nowhere."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from torch import Tensor

from openvclip.checkpoints.families import QUICK_GELU, UNTOUCHED, Plan, plan_conversion
from openvclip.checkpoints.formats import TORCHSCRIPT, WeightFile, read_weights

# (width, layers, embedding) of the image towers that open_clip names; CLIP's own and LAION's.
_TOWERS = {
    (384, 12, 384): "S",
    (384, 12, 256): "S alt",
    (512, 12, 512): "M",
    (512, 12, 384): "M alt",
    (768, 12, 512): "B",
    (896, 12, 640): "B plus",
    (1024, 24, 768): "L",
    (1280, 32, 1024): "H",
    (1408, 40, 1024): "g",
    (1664, 48, 1280): "bigG",
    (1792, 56, 1280): "e",
}
# (width of the stem's half, blocks of the four stages)
_RESNETS: dict[tuple[int, tuple[int, ...]], str] = {
    (64, (3, 4, 6, 3)): "RN50",
    (64, (3, 4, 23, 3)): "RN101",
    (80, (4, 6, 10, 6)): "RN50x4",
    (96, (6, 8, 18, 8)): "RN50x16",
    (128, (3, 15, 36, 10)): "RN50x64",
}
CLIP_VOCABULARY = 49408  # tokens that CLIP's tokenizer knows
_SHOWN_NAMES = 12

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a CLIP, read from the shapes of its weights; None where they do not tell.

    Attributes:
        backbone: the name of the image tower as open_clip has it, such as ``"ViT-B-16"`` or
            ``"ViT-L-14-336"``, without its activation, which no weight shows.
        patch_size: side of a patch, in pixels.
        image_size: side of the image that the positional embedding was made for, in pixels.
        vision_width: channels of the image tower.
        vision_layers: blocks of the image tower.
        embed_dim: length of the features that image and text share.
        text_width: channels of the text tower.
        text_layers: blocks of the text tower.
        context_length: tokens of a text.
        vocab_size: known tokens.
    """

    backbone: str | None = None
    patch_size: int | None = None
    image_size: int | None = None
    vision_width: int | None = None
    vision_layers: int | None = None
    embed_dim: int | None = None
    text_width: int | None = None
    text_layers: int | None = None
    context_length: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class CheckpointInfo(Sizes):
    """What a file of weights holds; ``str()`` of it is a report.

    Attributes:
        path: the file.
        format: ``"safetensors"``, ``"PyTorch"`` or ``"TorchScript"``.
        family: which project's names the entries have.
        entries: the number of tensors in the file.
        dtypes: names of dtypes to the number of tensors that have it.
        key: the top-level entry that the weights are under, or ``""``.
        beside: the other top-level entries (optimizer, epoch, ...).
        ignored: entries that are known and not weights.
        left_over: entries that have no place in open_clip's ``CLIP``.
        missing: open_clip's names that the file's own layers call for and that are not there.
        converted: whether entries are renamed or reshaped on loading.
        metadata: texts of a safetensors header.
    """

    path: str = ""
    format: str = ""
    family: str = ""
    entries: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    key: str = ""
    beside: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    converted: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f" under {self.key!r}" if self.key else ""
        how = "" if self.converted else " (names as they are)"
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        rows = [
            ("file", f"{self.path} ({self.format})"),
            ("family", f"{self.family}{where}{how}"),
            ("backbone", self._backbone()),
            ("image tower", _row(patch=self.patch_size, resolution=self.image_size,
                                 width=self.vision_width, layers=self.vision_layers)),
            ("text tower", _row(width=self.text_width, layers=self.text_layers,
                                context=self.context_length, vocabulary=self.vocab_size)),
            ("embedding", _row(length=self.embed_dim)),
            ("entries", f"{self.entries} ({dtypes})"),
            ("metadata", ", ".join(f"{key}={value}" for key, value in self.metadata.items())),
            ("beside", _listed(self.beside)),
            ("ignored", _listed(self.ignored)),
            ("left over", _listed(self.left_over)),
            ("missing", _listed(self.missing)),
        ]  # fmt: skip
        return "\n".join(f"{title:<12} {text}" for title, text in rows if text)

    @property
    def source_family(self) -> str:
        """The family that the weights came from, also after :func:`convert_checkpoint`."""
        return self.metadata.get("source_family", self.family)

    @property
    def quick_gelu(self) -> bool:
        """Whether the weights are known to have been trained with QuickGELU."""
        return self.source_family in QUICK_GELU

    def _backbone(self) -> str:
        if self.backbone is None:
            return "not recognised"
        if not self.quick_gelu:
            return self.backbone
        return f"{self.backbone} with QuickGELU (in open_clip: {self.backbone}-quickgelu)"


def _row(**values: int | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _listed(names: tuple[str, ...]) -> str:
    if not names:
        return ""
    more = len(names) - _SHOWN_NAMES
    shown = ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"{len(names)}: {shown}"


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Tell what a file of weights holds, from its content, without loading it.

    Of a safetensors file only the header is read, of a PyTorch file only names and shapes.

    Args:
        path: the file; its name is not looked at.

    Raises:
        CheckpointError: there is no such file, it is truncated or of another kind, or it holds
            no weights.
        UnsafeCheckpointError: it can't be read without running code that it names.
        StateMismatchError: two names are the same but for a wrapper's prefix.
    """
    file = read_weights(path, sizes_only=True)
    return describe(file, plan_of(file))


def plan_of(file: WeightFile) -> Plan:
    """What becomes of the entries of a file."""
    return plan_conversion(file.weights, torchscript=file.format == TORCHSCRIPT)


def describe(file: WeightFile, plan: Plan) -> CheckpointInfo:
    """What a file holds, once it is known what becomes of its entries."""
    dtypes: dict[str, int] = {}
    for value in file.weights.values():
        name = str(value.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + 1
    shapes: dict[str, Shape] = {}
    for target, source in plan.targets.items():
        shape = tuple(file.weights[source.names[0]].shape)
        if len(source.names) == 1:  # no size is told by entries that are joined
            shapes[target] = shape[::-1] if source.transposed else shape
    sizes = sizes_of(shapes)
    return CheckpointInfo(
        **{entry.name: getattr(sizes, entry.name) for entry in fields(Sizes)},
        path=os.fspath(file.path),
        format=file.format,
        family=plan.family,
        entries=len(file.weights),
        dtypes=dict(sorted(dtypes.items())),
        key=file.key,
        beside=file.beside,
        ignored=plan.ignored,
        left_over=plan.left_over,
        missing=plan.missing,
        converted=plan.family not in UNTOUCHED,
        metadata=file.metadata,
    )


# --- sizes ---------------------------------------------------------------------------------------


def model_sizes(state: Mapping[str, Tensor]) -> Sizes:
    """The sizes of a live model, from its entries under canonical names."""
    return sizes_of({name: tuple(value.shape) for name, value in state.items()})


def sizes_of(shapes: Mapping[str, Shape]) -> Sizes:
    """The sizes of a CLIP from the shapes of its entries, under open_clip's names."""
    # A CustomTextCLIP keeps its text tower under a name of its own.
    plain = {name.removeprefix("text."): shape for name, shape in shapes.items()}
    embed_dim = _dim(plain, "visual.proj", 1, 2) or _dim(plain, "text_projection", 1, 2)
    embed_dim = embed_dim or _dim(plain, "visual.attnpool.c_proj.weight", 0, 2)
    text = {
        "embed_dim": embed_dim,
        "text_width": _dim(plain, "ln_final.weight", 0, 1),
        "text_layers": _layers(plain, "transformer.resblocks."),
        "context_length": _dim(plain, "positional_embedding", 0, 2),
        "vocab_size": _dim(plain, "token_embedding.weight", 0, 2),
    }
    if _dim(plain, "visual.layer1.0.conv1.weight", 0, 4):
        return Sizes(**text, **_resnet(plain))  # type: ignore[arg-type]
    vision = {
        "patch_size": _dim(plain, "visual.conv1.weight", 3, 4),
        "image_size": _image_size(plain),
        "vision_width": _dim(plain, "visual.conv1.weight", 0, 4),
        "vision_layers": _layers(plain, "visual.transformer.resblocks."),
    }
    return Sizes(backbone=_name({**vision, **text}), **vision, **text)


def _dim(shapes: Mapping[str, Shape], name: str, axis: int, rank: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) == rank else None


def _layers(shapes: Mapping[str, Shape], prefix: str) -> int | None:
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in shapes
               if name.startswith(prefix)}  # fmt: skip
    return len(numbers) or None


def _image_size(shapes: Mapping[str, Shape]) -> int | None:
    patch = _dim(shapes, "visual.conv1.weight", 3, 4)
    positions = _dim(shapes, "visual.positional_embedding", 0, 2)
    if patch is None or not positions:
        return None
    grid = math.isqrt(positions - 1)  # one position is the class token's
    return patch * grid if grid * grid == positions - 1 else None


def _name(sizes: Mapping[str, int | None]) -> str | None:
    key = (sizes["vision_width"], sizes["vision_layers"], sizes["embed_dim"])
    tower = _TOWERS.get(key) if None not in key else None  # type: ignore[arg-type]
    patch, image = sizes["patch_size"], sizes["image_size"]
    if tower is None or image is None or sizes["vocab_size"] not in (None, CLIP_VOCABULARY):
        return None
    letter, _, variant = tower.partition(" ")
    parts = ["ViT", letter, str(patch), variant, "" if image == 224 else str(image)]
    return "-".join(part for part in parts if part)


def _resnet(shapes: Mapping[str, Shape]) -> dict[str, int | str | None]:
    stages = tuple(_layers(shapes, f"visual.layer{stage}.") or 0 for stage in (1, 2, 3, 4))
    width = _dim(shapes, "visual.layer1.0.conv1.weight", 0, 4)
    positions = _dim(shapes, "visual.attnpool.positional_embedding", 0, 2)
    return {
        "backbone": _RESNETS.get((width or 0, stages)),
        "image_size": 32 * math.isqrt(positions - 1) if positions else None,
        "vision_width": width,
        "vision_layers": sum(stages),
    }
