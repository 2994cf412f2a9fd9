"""Released files of every family, built at tiny size from public names, are loaded bit for bit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from open_clip.model import convert_weights_to_fp16
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import openvclip
from openvclip.errors import StateMismatchError
from tests.helpers import TEXT, VISION, assert_same_state, tiny_clip

State = dict[str, Tensor]


def quick_clip(**changes: Any) -> open_clip.CLIP:
    """Return a model of the sizes of ``tiny_clip`` with QuickGELU, as OpenAI and Open-VCLIP use."""
    return open_clip.CLIP(8, {**VISION, **changes}, dict(TEXT), quick_gelu=True).eval()


def clip_state(**vision: Any) -> State:
    return dict(tiny_clip(seed=3, **vision).state_dict())


def same_entries(a: State, b: State) -> None:
    """Check that names and bits are the same. The order of the names may differ."""
    assert_same_state(dict(sorted(a.items())), dict(sorted(b.items())))


# --- files ---------------------------------------------------------------------------------------


def with_settings(state: State) -> State:
    """Add the three integers that OpenAI's files hold among the weights."""
    sizes = {"input_resolution": 8, "context_length": 8, "vocab_size": 64}
    return {**state, **{name: torch.tensor(size) for name, size in sizes.items()}}


def openai_state() -> State:
    """Return float16 matrices and float32 norms and embeddings, as OpenAI's files hold."""
    model = tiny_clip(seed=3)
    convert_weights_to_fp16(model)
    return dict(model.state_dict())


def torchscript(state: State, path: Path) -> None:
    root = nn.Module()
    for name, value in state.items():
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.register_buffer(last, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        torch.jit.script(root).save(path)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def averaged(state: State) -> dict[str, Any]:
    return {"model_state": prefixed(state, "model.")}


def training(state: State, prefix: str = "model.") -> dict[str, Any]:
    """Return a checkpoint of the released trainer, with the moments of the optimizer."""
    weights = prefixed(state, prefix)
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": v} for i, v in enumerate(state.values())}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-5, "params": [0, 1]}]}
    return {"epoch": 21, "model_state": weights, "optimizer_state": optimizer, "cfg": "TRAIN:\n"}


def froster(state: State) -> dict[str, Any]:
    extra = {f"projector_{tower}.{i}.weight": torch.randn(8, 8) for tower in "vt" for i in (0, 2)}
    return {"model_state": {**prefixed(state, "model."), **prefixed(state, "raw_model."), **extra}}


_TO_HUGGING_FACE = (
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.", "text_model.final_layer_norm."),
)
_IN_LAYER = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


def hugging_face(state: State) -> State:
    result: State = {}
    for name, value in state.items():
        if name in ("visual.proj", "text_projection"):
            projection = "visual_projection" if name == "visual.proj" else "text_projection"
            result[f"{projection}.weight"] = value.T.contiguous()
            continue
        for pattern, replacement in _TO_HUGGING_FACE:
            if re.match(pattern, name):
                name = re.sub(f"^{pattern}", replacement, name)
                break
        for clip_part, hf_part in _IN_LAYER:
            name = name.replace(clip_part, hf_part)
        joined = re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", name)
        if joined is None:
            result[name] = value
            continue
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            result[f"{joined[1]}.self_attn.{letter}_proj.{joined[2]}"] = part.clone()
    return result


def with_position_ids(state: State) -> State:
    """Add the position ids that files of older transformers versions hold."""
    ids = {f"{t}_model.embeddings.position_ids": torch.arange(5)[None] for t in ("vision", "text")}
    return {**state, **ids}


def _write(
    content: Callable[[State], Any], save: Callable[[Any, Path], None]
) -> Callable[[Path], State]:
    def build(path: Path) -> State:
        state = clip_state()
        save(content(state), path)
        return state

    return build


def _openai(save: Callable[[State, Path], None]) -> Callable[[Path], State]:
    def build(path: Path) -> State:
        state = openai_state()
        save(with_settings(state), path)
        return state

    return build


def _same(state: State) -> State:
    return state


def _legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


class Release(NamedTuple):
    """A released file: its family, its format, and a function that writes it."""

    family: str
    format: str
    write: Callable[[Path], State]


FILES = {
    "openai-archive": Release("OpenAI CLIP", "TorchScript", _openai(torchscript)),
    "openai-state": Release("OpenAI CLIP", "PyTorch", _openai(torch.save)),
    "open-clip-safetensors": Release("open_clip CLIP", "safetensors", _write(_same, save_file)),
    "open-clip-plain": Release("open_clip CLIP", "PyTorch", _write(_same, torch.save)),
    "open-clip-old-format": Release("open_clip CLIP", "PyTorch", _write(_same, _legacy)),
    "open-clip-training": Release(
        "open_clip CLIP",
        "PyTorch",
        _write(
            lambda s: {"epoch": 3, "name": "x", "state_dict": prefixed(s, "module.")}, torch.save
        ),
    ),
    "hugging-face": Release("Hugging Face CLIP", "safetensors", _write(hugging_face, save_file)),
    "hugging-face-bin": Release(
        "Hugging Face CLIP",
        "PyTorch",
        _write(lambda s: with_position_ids(hugging_face(s)), torch.save),
    ),
    "open-vclip-averaged": Release("Open-VCLIP", "PyTorch", _write(averaged, torch.save)),
    "open-vclip-training": Release("Open-VCLIP", "PyTorch", _write(training, torch.save)),
    "open-vclip-ddp": Release(
        "Open-VCLIP",
        "PyTorch",
        _write(lambda s: training(s, "module.model."), torch.save),
    ),
}
each_file = pytest.mark.parametrize("case", FILES)


# --- laws ----------------------------------------------------------------------------------------


@each_file
def test_every_family_comes_back_bit_for_bit_whatever_the_file_is_called(
    tmp_path: Path, case: str
) -> None:
    file = tmp_path / "a name that says nothing.pdf"
    original = FILES[case].write(file)
    same_entries(openvclip.load_checkpoint(file), original)


@each_file
def test_what_a_file_holds_is_told(tmp_path: Path, case: str) -> None:
    family, file_format, write = FILES[case]
    original = write(tmp_path / "w")
    info = openvclip.inspect_checkpoint(tmp_path / "w")
    assert (info.family, info.format) == (family, file_format)
    assert (info.patch_size, info.image_size) == (4, 8)
    assert (info.vision_width, info.vision_layers, info.embed_dim) == (16, 3, 8)
    assert (info.text_width, info.text_layers) == (16, 1)
    assert (info.context_length, info.vocab_size) == (8, 64)
    assert info.backbone is None
    assert (info.left_over, info.missing) == ((), ())
    assert sum(info.dtypes.values()) == info.entries >= len(original)
    text = str(info)
    assert family in text
    assert "patch 4, resolution 8, width 16, layers 3" in text


@each_file
def test_a_model_takes_the_weights_in_its_own_dtype(tmp_path: Path, case: str) -> None:
    original = FILES[case].write(tmp_path / "w")
    model = quick_clip().double()
    parameters = list(model.parameters())
    openvclip.expand_temporal_attention(model)
    openvclip.load_checkpoint(tmp_path / "w", model)
    same_entries(dict(model.state_dict()), {name: v.double() for name, v in original.items()})
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@each_file
def test_conversion_writes_safetensors_that_say_where_they_come_from(
    tmp_path: Path, case: str
) -> None:
    original = FILES[case].write(tmp_path / "w")
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    openvclip.convert_checkpoint(tmp_path / "w", once)
    openvclip.convert_checkpoint(once, twice)
    for file in (once, twice):
        same_entries(openvclip.load_checkpoint(file), original)
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["source_family"] == FILES[case].family
    converted = openvclip.convert_checkpoint(once, twice, dtype=torch.bfloat16)
    assert converted.family == "open_clip CLIP"
    assert openvclip.load_checkpoint(twice)["visual.proj"].dtype == torch.bfloat16


def test_conversion_keeps_what_a_header_says(tmp_path: Path) -> None:
    source, target = tmp_path / "w", tmp_path / "out.safetensors"
    openvclip.save_checkpoint(clip_state(), source, metadata={"lambda": "0.5"})
    openvclip.convert_checkpoint(source, target)
    expected = {"lambda": "0.5", "source_family": "open_clip CLIP"}
    assert openvclip.inspect_checkpoint(target).metadata == expected


def test_written_files_can_be_read_by_those_who_can_read_other_new_files(tmp_path: Path) -> None:
    plain, file = tmp_path / "plain", tmp_path / "w.safetensors"
    plain.touch()
    openvclip.save_checkpoint({"w": torch.zeros(2)}, file)
    assert file.stat().st_mode == plain.stat().st_mode


def test_what_is_known_to_be_no_weight_is_ignored_and_told(tmp_path: Path) -> None:
    FILES["openai-archive"].write(tmp_path / "archive")
    FILES["hugging-face-bin"].write(tmp_path / "bin")
    FILES["open-vclip-training"].write(tmp_path / "training")
    settings = {"input_resolution", "context_length", "vocab_size"}
    assert set(openvclip.inspect_checkpoint(tmp_path / "archive").ignored) == settings
    assert len(openvclip.inspect_checkpoint(tmp_path / "bin").ignored) == 2
    info = openvclip.inspect_checkpoint(tmp_path / "training")
    assert info.key == "model_state"
    assert info.beside == ("epoch", "optimizer_state", "cfg")
    assert "3: epoch, optimizer_state, cfg" in str(info)


def test_openai_settings_may_be_plain_integers(tmp_path: Path) -> None:
    torch.save({**openai_state(), "input_resolution": 8}, tmp_path / "w")
    same_entries(openvclip.load_checkpoint(tmp_path / "w"), openai_state())


def test_the_distillation_of_froster_is_left_over_unless_allowed(tmp_path: Path) -> None:
    state = clip_state()
    torch.save(froster(state), tmp_path / "w")
    info = openvclip.inspect_checkpoint(tmp_path / "w")
    assert info.family == "FROSTER"
    extra = [f"projector_{tower}.{i}.weight" for tower in "tv" for i in (0, 2)]
    raw = [f"raw_model.{name}" for name in state]
    assert sorted(info.left_over) == sorted([*extra, *raw])
    with pytest.raises(StateMismatchError) as caught:
        openvclip.load_checkpoint(tmp_path / "w", allow_unexpected="projector_*")
    assert caught.value.unexpected == sorted(raw)
    assert "allow_unexpected=['raw_model.*']" in str(caught.value)
    with pytest.raises(StateMismatchError) as caught:
        openvclip.load_checkpoint(tmp_path / "w", quick_clip())
    assert caught.value.unexpected == sorted([*extra, *raw])
    allowed = ("projector_*", "raw_model.*")
    same_entries(openvclip.load_checkpoint(tmp_path / "w", allow_unexpected=allowed), state)
    model = quick_clip()
    openvclip.load_checkpoint(tmp_path / "w", model, allow_unexpected=allowed)
    same_entries(dict(model.state_dict()), state)


def test_adapters_inside_the_tower_are_left_over(tmp_path: Path) -> None:
    adapter = "visual.transformer.resblocks.1.stadapt_up_1.weight"
    torch.save(averaged({**clip_state(), adapter: torch.zeros(2)}), tmp_path / "w")
    assert openvclip.inspect_checkpoint(tmp_path / "w").left_over == (f"model.{adapter}",)
    with pytest.raises(StateMismatchError, match="stadapt_up_1"):
        openvclip.load_checkpoint(tmp_path / "w")
