"""Names of backbones, other kinds of towers, and files that keep their names."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import openvclip
from openvclip.checkpoints import Sizes
from openvclip.errors import ActivationWarning, CheckpointError, StateMismatchError
from tests.checkpoints.test_conversion import (
    FILES,
    clip_state,
    quick_clip,
    same_entries,
    torchscript,
    with_settings,
)
from tests.helpers import same_bits, tiny_clip

# --- what passes untouched -----------------------------------------------------------------------


def test_custom_text_models_pass_untouched_and_fit_their_model(tmp_path: Path) -> None:
    vision = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w")
    info = openvclip.inspect_checkpoint(tmp_path / "w")
    assert (info.family, info.converted) == ("open_clip CustomTextCLIP", False)
    assert (info.vision_layers, info.text_layers, info.embed_dim) == (2, 1, 8)
    assert "names unchanged" in str(info)
    same_entries(openvclip.load_checkpoint(tmp_path / "w", model), state)


SIGLIP_TEXT = (
    "text_model.embeddings.token_embedding.weight",
    "text_model.final_layer_norm.weight",
)


@pytest.mark.parametrize(
    "names",
    [
        ["weight", "bias"],
        ["vision_model.head.probe", "vision_model.embeddings.patch_embedding.weight"],
        ["embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"],
        [*SIGLIP_TEXT, "text_model.head.weight"],
        [*SIGLIP_TEXT, "vision_model.embeddings.patch_embedding.weight"],
        ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"],
        ["class_embedding", "conv1.weight", "transformer.resblocks.0.ln_1.weight"],
    ],
)
def test_other_models_pass_untouched(tmp_path: Path, names: list[str]) -> None:
    state = {name: torch.randn(3) for name in names}
    for save in (save_file, torch.save):
        save(state, tmp_path / "w")
        assert openvclip.inspect_checkpoint(tmp_path / "w").family == "unknown"
        same_entries(openvclip.load_checkpoint(tmp_path / "w"), state)


def test_part_of_a_state_dict_is_returned_as_it_is_and_not_converted(tmp_path: Path) -> None:
    state = clip_state()
    missing_name = "visual.transformer.resblocks.1.ln_1.weight"
    del state[missing_name]
    save_file(state, tmp_path / "w")
    same_entries(openvclip.load_checkpoint(tmp_path / "w"), state)
    assert openvclip.inspect_checkpoint(tmp_path / "w").missing == (missing_name,)
    out = tmp_path / "out.safetensors"
    with pytest.raises(StateMismatchError) as caught:
        openvclip.convert_checkpoint(tmp_path / "w", out)
    assert caught.value.missing == [missing_name]
    assert not out.exists()
    openvclip.convert_checkpoint(tmp_path / "w", out, allow_missing=missing_name)
    same_entries(openvclip.load_checkpoint(out), state)


@pytest.mark.parametrize(
    "vision",
    [{"no_ln_pre": True}, {"pool_type": "avg"}, {"ls_init_value": 0.1}, {"attentional_pool": True}],
)
def test_variants_of_open_clip_towers_are_whole(tmp_path: Path, vision: dict[str, Any]) -> None:
    vision = {"attn_pooler_heads": 2, **vision} if "attentional_pool" in vision else vision
    state = clip_state(**vision)
    save_file(state, tmp_path / "w")
    info = openvclip.inspect_checkpoint(tmp_path / "w")
    assert (info.family, info.missing, info.left_over) == ("open_clip CLIP", (), ())
    openvclip.convert_checkpoint(tmp_path / "w", tmp_path / "out.safetensors")
    same_entries(openvclip.load_checkpoint(tmp_path / "out.safetensors"), state)


def test_archives_are_openai_s_and_the_names_do_without_the_settings(tmp_path: Path) -> None:
    state = clip_state()
    torchscript(state, tmp_path / "w")
    assert openvclip.inspect_checkpoint(tmp_path / "w").family == "OpenAI CLIP"
    same_entries(openvclip.load_checkpoint(tmp_path / "w"), state)


def test_resnets_of_openai_are_known(tmp_path: Path) -> None:
    vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    state = dict(open_clip.CLIP(8, vision, text).state_dict())
    torchscript(with_settings(state), tmp_path / "w")
    info = openvclip.inspect_checkpoint(tmp_path / "w")
    assert (info.family, info.left_over, info.missing) == ("OpenAI CLIP", (), ())
    assert (info.image_size, info.vision_width, info.vision_layers) == (32, 8, 4)
    same_entries(openvclip.load_checkpoint(tmp_path / "w"), state)


# --- names of backbones --------------------------------------------------------------------------

PLAIN_NAMES = [
    "RN50",
    "RN101",
    "RN50x4",
    "RN50x16",
    "RN50x64",
    "ViT-S-16",
    "ViT-S-32-alt",
    "ViT-M-16",
    "ViT-M-32-alt",
    "ViT-B-16",
    "ViT-B-32",
    "ViT-B-32-256",
    "ViT-B-16-plus-240",
    "ViT-B-32-plus-256",
    "ViT-L-14",
    "ViT-L-14-280",
    "ViT-L-14-336",
    "ViT-L-16-320",
    "ViT-H-14",
    "ViT-H-14-378",
    "ViT-g-14",
    "ViT-bigG-14",
    "ViT-e-14",
]


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_backbones_are_named_as_open_clip_names_them(tmp_path: Path, name: str) -> None:
    """The header has the real sizes. The values are a hole that takes no space on disk."""
    info = openvclip.inspect_checkpoint(_header_of(name, tmp_path / "w"))
    config = open_clip.get_model_config(name)
    assert info.backbone == name
    assert (info.embed_dim, info.image_size) == (
        config["embed_dim"],
        config["vision_cfg"]["image_size"],
    )
    assert info.missing == ()


@pytest.mark.parametrize("name", ["ViT-L-14-CLIPA", "ViT-H-14-worldwide"])
def test_the_same_tower_with_other_words_has_no_such_name(tmp_path: Path, name: str) -> None:
    assert openvclip.inspect_checkpoint(_header_of(name, tmp_path / "w")).backbone is None


def _header_of(name: str, path: Path) -> Path:
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    header: dict[str, Any] = {}
    end = 0
    for entry, value in model.state_dict().items():
        start, end = end, end + value.numel() * value.element_size()
        dtype = "F32" if value.is_floating_point() else "I64"
        header[entry] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # a hole of up to 19 GB, which takes no space
    return path


@pytest.mark.parametrize("case", ["openai-archive", "open-vclip-averaged"])
def test_loading_into_a_model_with_another_activation_warns(tmp_path: Path, case: str) -> None:
    original = FILES[case].write(tmp_path / "w")
    converted = tmp_path / "w.safetensors"
    openvclip.convert_checkpoint(tmp_path / "w", converted)
    for file in (tmp_path / "w", converted):
        model = tiny_clip(seed=9)
        with pytest.warns(ActivationWarning, match="-quickgelu") as warned:
            openvclip.load_checkpoint(file, model)
        assert warned[0].filename == __file__
        assert same_bits(model.visual.proj.data, original["visual.proj"].float())
        openvclip.load_checkpoint(file, quick_clip())  # without a warning
        openvclip.load_checkpoint(file)


def test_quickgelu_is_told_where_the_family_is_known_to_use_it(tmp_path: Path) -> None:
    name = "ViT-B-16"
    text = f"{name} with QuickGELU (in open_clip: {name}-quickgelu)"
    sizes = Sizes(backbone=name)
    assert text in str(openvclip.CheckpointInfo(sizes=sizes, family="Open-VCLIP"))
    assert text not in str(openvclip.CheckpointInfo(sizes=sizes, family="open_clip CLIP"))
    converted = openvclip.CheckpointInfo(
        sizes=sizes, family="open_clip CLIP", metadata={"source_family": "FROSTER"}
    )
    assert text in str(converted)


# --- inspection reads no weights -----------------------------------------------------------------


def test_of_safetensors_only_the_header_is_read(tmp_path: Path) -> None:
    elements = 2**40
    entry = {"dtype": "F16", "shape": [elements], "data_offsets": [0, 2 * elements]}
    header = json.dumps({"w": entry, "__metadata__": {"lambda": "0.5"}}).encode()
    file = tmp_path / "w"
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        try:
            opened.truncate(8 + len(header) + 2 * elements)  # 2 TiB of hole
        except OSError:
            pytest.skip("no holes in files here")
    start = time.monotonic()
    info = openvclip.inspect_checkpoint(file)
    assert time.monotonic() - start < 60
    assert info.dtypes == {"float16": 1}
    assert "lambda=0.5" in str(info)


def test_of_pytorch_files_only_the_sizes_are_read(tmp_path: Path) -> None:
    FILES["open-vclip-averaged"].write(tmp_path / "whole")
    with zipfile.ZipFile(tmp_path / "whole") as source, zipfile.ZipFile(tmp_path / "w", "w") as cut:
        for name in source.namelist():
            values = "/data/" in name
            cut.writestr(name, b"" if values else source.read(name))
    assert openvclip.inspect_checkpoint(tmp_path / "w").vision_layers == 3
    with pytest.raises(CheckpointError, match="can't be read to its end"):
        openvclip.load_checkpoint(tmp_path / "w")


def test_bytes_behind_the_last_entry_are_no_whole_file(tmp_path: Path) -> None:
    FILES["open-clip-safetensors"].write(tmp_path / "w")
    with (tmp_path / "w").open("ab") as file:
        file.write(b"more")
    for read in (openvclip.inspect_checkpoint, openvclip.load_checkpoint):
        with pytest.raises(CheckpointError, match="by its header it should have"):
            read(tmp_path / "w")


@pytest.mark.parametrize(
    ("changes", "length", "reason"),
    [
        ({}, 2**31, "its header would have 2147483648 bytes"),
        ({"shape": [-2, -1]}, None, r"'w' has the shape \[-2, -1\]"),
        ({"dtype": "F4"}, None, "'w' has the dtype F4, which openvclip does not read"),
        ({"data_offsets": [0, 16]}, None, r"'w' has 16 bytes, but F32 of shape \[2\] needs 8"),
        ({"shape": "ab"}, None, "'w' has the shape ab"),
    ],
)
def test_headers_that_make_no_sense_are_refused(
    tmp_path: Path, changes: dict[str, Any], length: int | None, reason: str
) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"w": {**entry, **changes}}).encode()
    start = (length or len(header)).to_bytes(8, "little")
    (tmp_path / "w").write_bytes(start + header + bytes(8))
    for read in (openvclip.inspect_checkpoint, openvclip.load_checkpoint):
        with pytest.raises(CheckpointError, match=reason):
            read(tmp_path / "w")
