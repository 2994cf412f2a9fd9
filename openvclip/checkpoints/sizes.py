"""The sizes of a CLIP, read from the shapes of its weights, and the name of its backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

# Maps (width, layers, embedding) of an image tower to the size in open_clip's model names. The
# table holds the towers of OpenAI and LAION.
_TOWERS: dict[tuple[int | None, ...], str] = {
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
# (width of the first stage, blocks of the four stages)
_RESNETS: dict[tuple[int | None, tuple[int, ...]], str] = {
    (64, (3, 4, 6, 3)): "RN50",
    (64, (3, 4, 23, 3)): "RN101",
    (80, (4, 6, 10, 6)): "RN50x4",
    (96, (6, 8, 18, 8)): "RN50x16",
    (128, (3, 15, 36, 10)): "RN50x64",
}
CLIP_VOCABULARY = 49408  # tokens that the tokenizer of CLIP knows

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a CLIP. A size is ``None`` if the shapes of the weights do not show it.

    Attributes:
        backbone: the name of the image tower in open_clip, such as ``"ViT-B-16"`` or
            ``"ViT-L-14-336"``. The activation is not part of the name, since no weight shows it.
        patch_size: side of a patch, in pixels.
        image_size: side of the image that the positional embedding was made for, in pixels.
        vision_width: number of channels of the image tower.
        vision_layers: number of blocks of the image tower.
        embed_dim: length of the features that image and text share.
        text_width: number of channels of the text tower.
        text_layers: number of blocks of the text tower.
        context_length: number of tokens of a text.
        vocab_size: number of tokens in the vocabulary.
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


def model_sizes(state: Mapping[str, Tensor]) -> Sizes:
    """Return the sizes of a model from the state dict of the model, under canonical names."""
    return sizes_of({name: tuple(value.shape) for name, value in state.items()})


def sizes_of(shapes: Mapping[str, Shape]) -> Sizes:
    """Return the sizes of a CLIP from the shapes of its entries, under open_clip's names."""
    # CustomTextCLIP puts its text tower under the name "text".
    plain = {name.removeprefix("text."): shape for name, shape in shapes.items()}
    embed_dim = _dim(plain, "visual.proj", 1, 2) or _dim(plain, "text_projection", 1, 2)
    embed_dim = embed_dim or _dim(plain, "visual.attnpool.c_proj.weight", 0, 2)
    sizes = Sizes(
        embed_dim=embed_dim,
        text_width=_dim(plain, "ln_final.weight", 0, 1),
        text_layers=_count_numbers(plain, "transformer.resblocks."),
        context_length=_dim(plain, "positional_embedding", 0, 2),
        vocab_size=_dim(plain, "token_embedding.weight", 0, 2),
    )
    is_resnet = _dim(plain, "visual.layer1.0.conv1.weight", 0, 4)
    return _add_resnet(sizes, plain) if is_resnet else _add_transformer(sizes, plain)


def _add_transformer(sizes: Sizes, shapes: Mapping[str, Shape]) -> Sizes:
    sizes = replace(
        sizes,
        patch_size=_dim(shapes, "visual.conv1.weight", 3, 4),
        image_size=_image_size(shapes),
        vision_width=_dim(shapes, "visual.conv1.weight", 0, 4),
        vision_layers=_count_numbers(shapes, "visual.transformer.resblocks."),
    )
    return replace(sizes, backbone=_transformer_name(sizes))


def _add_resnet(sizes: Sizes, shapes: Mapping[str, Shape]) -> Sizes:
    blocks = tuple(_count_numbers(shapes, f"visual.layer{stage}.") or 0 for stage in (1, 2, 3, 4))
    width = _dim(shapes, "visual.layer1.0.conv1.weight", 0, 4)
    positions = _dim(shapes, "visual.attnpool.positional_embedding", 0, 2)
    return replace(
        sizes,
        backbone=_RESNETS.get((width, blocks)),
        image_size=32 * math.isqrt(positions - 1) if positions else None,
        vision_width=width,
        vision_layers=sum(blocks),
    )


def _dim(shapes: Mapping[str, Shape], name: str, axis: int, rank: int) -> int | None:
    """Return one size of an entry, or ``None`` if there is no such entry of this rank."""
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) == rank else None


def _count_numbers(names: Mapping[str, Shape], prefix: str) -> int | None:
    """Return how many different numbers follow the prefix in the names, or ``None`` for none."""
    numbers = {
        name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)
    }
    return len(numbers) or None


def _image_size(shapes: Mapping[str, Shape]) -> int | None:
    patch = _dim(shapes, "visual.conv1.weight", 3, 4)
    positions = _dim(shapes, "visual.positional_embedding", 0, 2)
    if patch is None or not positions:
        return None
    grid = math.isqrt(positions - 1)  # one position is that of the class token
    return patch * grid if grid * grid == positions - 1 else None


def _transformer_name(sizes: Sizes) -> str | None:
    tower = _TOWERS.get((sizes.vision_width, sizes.vision_layers, sizes.embed_dim))
    has_clip_vocabulary = sizes.vocab_size in (None, CLIP_VOCABULARY)
    if tower is None or sizes.image_size is None or not has_clip_vocabulary:
        return None
    letter, _, variant = tower.partition(" ")
    resolution = "" if sizes.image_size == 224 else str(sizes.image_size)
    parts = ["ViT", letter, str(sizes.patch_size), variant, resolution]
    return "-".join(part for part in parts if part)
