"""Every name of open_clip, timm and transformers that the package uses and that can disappear.

If a new version of a library breaks the package, many tests fail. The tests of this file say which
name is gone and what the package needs it for. They use neither the package nor the other helpers,
so that they still run if the package can't be imported.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

PACKAGE = Path(__file__).resolve().parents[2] / "openvclip"
PROJECTS = {"open_clip": "open_clip_torch", "timm": "timm", "transformers": "transformers"}
# The only files that use the parts of open_clip's towers.
OPEN_CLIP_FILES = [PACKAGE / "towers" / "open_clip.py", PACKAGE / "towers" / "open_clip_text.py"]

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8}


def open_clip_model(kind: str = "CLIP", **vision: Any) -> Any:
    open_clip = importlib.import_module("open_clip")
    return getattr(open_clip, kind)(
        embed_dim=8, vision_cfg={**VISION, **vision}, text_cfg=dict(TEXT)
    )


def timm_model(name: str, *arguments: Any, **settings: Any) -> Any:
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), kind)(*arguments, **settings)


def hugging_face_tower(kind: str, **more: int) -> Any:
    transformers = importlib.import_module("transformers")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "eos_token_id": 1,
        **more,
    }
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))


TIMM_SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
OWNERS = {
    "VisionTransformer": lambda: open_clip_model().visual,
    "VisionTransformer.transformer": lambda: open_clip_model().visual.transformer,
    "a block": lambda: open_clip_model().visual.transformer.resblocks[0],
    "the attention of a block": lambda: open_clip_model().visual.transformer.resblocks[0].attn,
    "Attention": lambda: open_clip_model(qk_norm=True).visual.transformer.resblocks[0].attn,
    "CLIP": open_clip_model,
    "CLIP.transformer": lambda: open_clip_model().transformer,
    "TextTransformer": lambda: open_clip_model("CustomTextCLIP").text,
    "timm's VisionTransformer": lambda: timm_model(
        "timm.models.vision_transformer.VisionTransformer", **TIMM_SIZES
    ),
    "timm's PatchEmbed": lambda: timm_model("timm.layers.PatchEmbed", 8, 4, 3, 16),
    "timm's Eva": lambda: timm_model("timm.models.eva.Eva", **TIMM_SIZES),
    "timm's NaFlexVit": lambda: timm_model("timm.models.naflexvit.NaFlexVit", depth=1),
    "NaFlexVit.embeds of timm": lambda: (
        timm_model("timm.models.naflexvit.NaFlexVit", depth=1).embeds
    ),
    "timm's Attention": lambda: timm_model("timm.layers.Attention", 16, 2),
    "timm's EvaAttention": lambda: (
        timm_model("timm.models.eva.Eva", qkv_fused=True, **TIMM_SIZES).blocks[0].attn
    ),
    "CLIPVisionModel": lambda: hugging_face_tower("CLIPVision"),
    "MetaClip2VisionModel": lambda: hugging_face_tower("MetaClip2Vision"),
    "AltCLIPVisionModel": lambda: hugging_face_tower("AltCLIPVision"),
    "ChineseCLIPVisionModel": lambda: hugging_face_tower("ChineseCLIPVision"),
    "CLIPSegVisionModel": lambda: hugging_face_tower("CLIPSegVision"),
    "the embeddings of a Siglip2VisionModel": lambda: (
        hugging_face_tower("Siglip2Vision", num_patches=4).embeddings
    ),
    "a text CLIPTextModel": lambda: hugging_face_tower("CLIPText", vocab_size=8),
    "a text SiglipTextModel": lambda: hugging_face_tower("SiglipText", vocab_size=8),
    "the embeddings of a CLIPTextModel": lambda: (
        hugging_face_tower("CLIPText", vocab_size=8).embeddings
    ),
    "SiglipVisionModel": lambda: hugging_face_tower("SiglipVision"),
}
_TIMM_TOWER = {
    "patch_embed": "the patches of a frame, and the size of a frame",
    "_pos_embed": "the tokens of a frame with their positions",
    "norm_pre": "the normalisation before the first block",
    "norm": "the normalisation after the last block",
    "blocks": "the layers",
    "grad_checkpointing": "activation checkpointing of videos",
    "forward_features": "the tokens of images",
    "forward_head": "the features of tokens",
    "dynamic_img_size": "the check of the frame size",
    "num_prefix_tokens": "the place of the patch tokens",
    "cls_token": "the sizes that prompts need",
    "embed_dim": "the sizes that prompts need",
    "num_classes": "the sizes that prompts need",
}
_TIMM_ATTENTION = {
    "qkv": "queries, keys and values",
    "q_norm": "normalised queries",
    "k_norm": "normalised keys",
    "num_heads": "the heads",
    "head_dim": "the heads",
    "attn_drop": "dropout of the attention weights",
    "norm": "the normalisation inside the attention",
    "proj": "the output of the attention",
    "proj_drop": "the output of the attention",
}
_ATTENTION = {
    "in_proj_weight": "queries, keys and values",
    "in_proj_bias": "queries, keys and values",
    "out_proj": "the output of the attention",
    "num_heads": "the heads",
    "head_dim": "the heads",
}
_TEXT_TOWER = {
    "embeddings": "the tokens of a text",
    "encoder": "the layers",
    "final_layer_norm": "the feature of a text",
}
_CLIP_TOWER = {
    "embeddings": "the tokens of a frame",
    "pre_layrnorm": "the normalisation before the first layer",
    "encoder": "the layers",
    "post_layernorm": "the feature of a frame",
    "_can_record_outputs": "hidden states of expanded models",
}
USES: dict[str, dict[str, str]] = {
    "VisionTransformer": {
        "conv1": "the patches of a frame",
        "class_embedding": "the class token",
        "positional_embedding": "the positions of the patches",
        "patch_dropout": "dropped patches in training",
        "ln_pre": "the normalisation before the first block",
        "transformer": "the layers",
        "_pool": "the feature of the tokens of a frame",
        "proj": "the projection of the feature",
        "output_tokens": "whether the tokens are returned too",
        "image_size": "the check of the frame size",
        "patch_size": "the sizes that prompts need",
        "output_dim": "the sizes that prompts need",
    },
    "VisionTransformer.transformer": {
        "resblocks": "the layers",
        "width": "the sizes that prompts need",
        "grad_checkpointing": "activation checkpointing of prompted towers",
    },
    "a block": {"attn": "the attention that is expanded"},
    "the attention of a block": _ATTENTION,
    "Attention": {
        **_ATTENTION,
        "ln_q": "normalised queries",
        "ln_k": "normalised keys",
        "logit_scale": "scaled cosine attention",
        "logit_scale_max": "scaled cosine attention",
        "attn_drop": "dropout of the attention weights",
        "head_scale": "the scale of each head",
        "ln_inner": "the normalisation inside the attention",
        "out_drop": "the output of the attention",
    },
    "CLIP": {
        "visual": "the image tower",
        "transformer": "the layers of the text tower",
        "token_embedding": "text prompts",
        "positional_embedding": "text prompts",
        "attn_mask": "the causal mask of texts",
        "ln_final": "the feature of a text",
        "text_projection": "the feature of a text",
        "text_pool_type": "the place of the feature in a text",
        "text_eos_id": "the place of the feature in a text",
        "context_length": "the number of tokens of a text",
        "vocab_size": "the sizes in a file of prompts",
    },
    "CLIP.transformer": {
        "resblocks": "the layers of the text tower",
        "width": "the width of text prompts",
        "grad_checkpointing": "activation checkpointing of texts",
        "get_cast_dtype": "the dtype of the tokens of texts",
    },
    "TextTransformer": {
        "transformer": "the layers of the text tower",
        "_embeds": "the tokens of a text, and their mask",
        "token_embedding": "text prompts",
        "positional_embedding": "text prompts",
        "ln_final": "the feature of a text",
        "text_projection": "the feature of a text",
        "cls_emb": "CoCa's class token",
        "pool_type": "the place of the feature in a text",
        "eos_id": "the place of the feature in a text",
        "context_length": "the number of tokens of a text",
        "vocab_size": "the sizes in a file of prompts",
    },
    "timm's VisionTransformer": {**_TIMM_TOWER, "patch_drop": "dropped patches in training"},
    "timm's PatchEmbed": {
        "img_size": "the check of the frame size",
        "dynamic_img_pad": "the check of the frame size",
        "feat_ratio": "the size of a patch",
    },
    "timm's Eva": {**_TIMM_TOWER, "rope_mixed": "rotary angles of their own in each layer"},
    "timm's NaFlexVit": {
        "embeds": "the tokens of a frame with their positions",
        "rope": "rotary angles",
        "rope_is_mixed": "rotary angles of their own in each layer",
        "patch_drop": "dropped patches in training",
        "norm_pre": "the normalisation before the first block",
        "norm": "the normalisation after the last block",
        "blocks": "the layers",
        "grad_checkpointing": "activation checkpointing of videos",
        "forward_features": "the tokens of images",
        "forward_head": "the features of tokens",
        "num_prefix_tokens": "the place of the patch tokens",
        "embed_dim": "the sizes that prompts need",
        "num_classes": "the sizes that prompts need",
    },
    "NaFlexVit.embeds of timm": {
        "in_chans": "telling towers for images from towers for audio",
        "patch_size": "the check of the frame size",
        "dynamic_img_pad": "the check of the frame size",
        "proj": "the dtype of the tower",
        "cls_token": "the sizes that prompts need",
    },
    "timm's Attention": _TIMM_ATTENTION,
    "timm's EvaAttention": {
        **_TIMM_ATTENTION,
        "num_prefix_tokens": "the tokens that are not rotated",
        "q_bias": "queries, keys and values",
        "qkv_bias_separate": "queries, keys and values",
    },
    "CLIPVisionModel": _CLIP_TOWER,
    "MetaClip2VisionModel": _CLIP_TOWER,
    "AltCLIPVisionModel": _CLIP_TOWER,
    "ChineseCLIPVisionModel": _CLIP_TOWER,
    "CLIPSegVisionModel": _CLIP_TOWER,
    "the embeddings of a Siglip2VisionModel": {
        "patch_size": "the patches of a frame",
        "patch_embedding": "the tokens of a frame",
        "position_embedding": "the positions of the patches",
        "position_embedding_size": "the positions of the patches",
        "resize_positional_embeddings": "frames of another size",
    },
    "a text CLIPTextModel": _TEXT_TOWER,
    "a text SiglipTextModel": {**_TEXT_TOWER, "head": "the feature of a text"},
    "the embeddings of a CLIPTextModel": {
        "token_embedding": "the words of a text",
        "position_embedding": "the positions of the words",
    },
    "SiglipVisionModel": {
        "embeddings": "the tokens of a frame",
        "encoder": "the layers",
        "post_layernorm": "the feature of a frame",
        "use_head": "the feature of a frame",
        "head": "the feature of a frame",
        "_can_record_outputs": "hidden states of expanded models",
    },
}


def library_of(owner: str) -> str:
    if "timm" in owner:
        return "timm"
    return "transformers" if owner.endswith(("VisionModel", "TextModel")) else "open_clip"


def gone(library: str, name: str, use: str) -> str:
    version = importlib.metadata.version(PROJECTS[library])
    return f"{library} {version} has no {name} any more; used for: {use}"


@pytest.mark.parametrize("owner", USES)
def test_parts_of_models(owner: str) -> None:
    library = library_of(owner)
    pytest.importorskip(library)
    part = OWNERS[owner]()
    missing = [
        gone(library, f"{owner}.{name}", use)
        for name, use in USES[owner].items()
        if not hasattr(part, name)
    ]
    assert not missing, "\n".join(missing)


# --- names that are imported -------------------------------------------------------------------


@functools.cache
def imported_names() -> list[tuple[str, str, str]]:
    """``(module, name, file)`` for each name that the package imports from the libraries."""
    return list(_imported_names())


def _imported_names() -> Iterator[tuple[str, str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if not any(
            f"import {library}" in source or f"from {library}" in source for library in PROJECTS
        ):
            continue
        tree = ast.parse(source)
        file = str(path.relative_to(PACKAGE))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and _library(node.module) in PROJECTS:
                yield from ((str(node.module), alias.name, file) for alias in node.names)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if _library(alias.name) in PROJECTS:
                        yield alias.name, "", file
        used = {
            (node.value.id, node.attr)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        yield from ((library, name, file) for library, name in sorted(used) if library in PROJECTS)


def _library(module: str | None) -> str:
    return (module or "").partition(".")[0]


@pytest.mark.parametrize("library", PROJECTS)
def test_imported_names(library: str) -> None:
    pytest.importorskip(library)
    missing = []
    for module, name, file in imported_names():
        if _library(module) != library:
            continue
        try:
            loaded = importlib.import_module(module)
            if name and not hasattr(loaded, name):
                importlib.import_module(f"{module}.{name}")
        except ImportError:
            missing.append(gone(library, f"{module}.{name}", f"openvclip/{file}"))
    assert not missing, "\n".join(missing)


def test_parts_of_open_clip_are_imported_in_one_place() -> None:
    """All other files use what ``import open_clip`` gives."""
    others = {
        (module, name, file)
        for module, name, file in imported_names()
        if module.startswith("open_clip.") and PACKAGE / file not in OPEN_CLIP_FILES
    }
    assert others == set()


def test_the_tables_are_complete() -> None:
    """Each attribute in the files for open_clip is in ``USES``, PyTorch's or the package's own."""
    read: set[str] = set()
    own = {"__name__"}
    for path in [*OPEN_CLIP_FILES, *(PACKAGE / "towers").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and path in OPEN_CLIP_FILES:
                read.add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
    linear, attention = nn.Linear(1, 1), nn.MultiheadAttention(2, 1)
    torchs = (torch, nn, torch.empty(1), nn.functional, linear, attention, nn.Dropout(), {})
    unknown = {name for name in read - own if not any(hasattr(owner, name) for owner in torchs)}
    listed = {
        name for owner, names in USES.items() if library_of(owner) == "open_clip" for name in names
    }
    assert unknown - listed == {"_module", "_is_clip"}  # of TextTower itself
