"""Values that a model can't use are named when they are loaded: NaN, infinity, whole numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import openvclip
from openvclip.errors import (
    CheckpointError,
    NonFiniteWeightsError,
    OpenVCLIPError,
    WeightTypeError,
)
from openvclip.models.loading import load_model
from tests.checkpoints.test_conversion import clip_state, hugging_face, prefixed, same_entries
from tests.helpers import TEXT, VISION, snapshot, tiny_clip


def damaged(name: str, value: float, position: int = -1) -> dict[str, torch.Tensor]:
    state = {n: v.clone() for n, v in clip_state().items()}
    state[name].view(-1)[position] = value
    return state


def refused(file: Path, model: nn.Module, error: type[OpenVCLIPError]) -> str:
    """Return the error of loading a file, which must leave the model unchanged."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        openvclip.load_checkpoint(file, model)
    same_entries(dict(model.state_dict()), before)
    assert str(file) in str(caught.value)
    return str(caught.value)


# Report 12 (openai/CLIP#222): NaN in a checkpoint gave an accuracy of 0.0 and exit status 0.
@pytest.mark.parametrize(
    ("value", "name", "save"),
    [
        (torch.nan, "logit_scale", torch.save),
        (torch.inf, "visual.conv1.weight", save_file),
        (-torch.inf, "token_embedding.weight", torch.save),
    ],
)
def test_an_entry_that_is_not_finite_is_named(
    tmp_path: Path, value: float, name: str, save: Any
) -> None:
    file = tmp_path / "w"
    save(damaged(name, value), file)
    assert f"NaN or infinity in 1 entries ({name})" in refused(
        file, tiny_clip(), NonFiniteWeightsError
    )
    same_entries(openvclip.load_checkpoint(file), damaged(name, value))  # to look at the values


def test_names_are_those_of_the_model_and_every_dtype_is_checked(tmp_path: Path) -> None:
    broken = damaged("visual.proj", torch.nan)
    for content in (
        hugging_face(broken),
        prefixed(broken, "model."),
        {name: value.half() for name, value in broken.items()},
        {name: value.bfloat16() for name, value in broken.items()},
    ):
        torch.save(content, tmp_path / "w")
        assert "(visual.proj)" in refused(tmp_path / "w", tiny_clip(), NonFiniteWeightsError)


def test_what_is_not_loaded_need_not_be_finite(tmp_path: Path) -> None:
    nan = torch.full((2,), torch.nan)
    content = {
        "state_dict": {**clip_state(), "head.weight": nan},
        "loss": nan,
        "optimizer": {"m": nan},
    }
    torch.save(content, tmp_path / "w")
    openvclip.load_checkpoint(tmp_path / "w", tiny_clip(), allow_unexpected="head.*")


def masked(name: str, value: float) -> nn.Module:
    """Return a model with a buffer that holds one value above its diagonal."""
    model = nn.BatchNorm1d(2)
    model.register_buffer(name, torch.tensor([[0.0, value], [0.0, 0.0]]))
    return model


@pytest.mark.parametrize(
    ("name", "given", "own", "accepted"),
    [
        ("attention", -torch.inf, -torch.inf, True),  # the model has the same mask
        ("attention", -torch.inf, 0.0, False),
        ("attn_mask", -torch.inf, 0.0, True),
        ("attn_mask", torch.inf, 0.0, False),
        ("attn_mask", torch.nan, torch.nan, False),
    ],
)
def test_infinities_of_masks_are_accepted(
    tmp_path: Path, name: str, given: float, own: float, accepted: bool
) -> None:
    state, model = masked(name, given).state_dict(), masked(name, own)
    torch.save(state, tmp_path / "w")
    if not accepted:
        assert f"({name})" in refused(tmp_path / "w", model, NonFiniteWeightsError)
        return
    openvclip.load_checkpoint(tmp_path / "w", model)
    same_entries(dict(model.state_dict()), dict(state))


def test_infinite_statistics_are_no_mask(tmp_path: Path) -> None:
    state = nn.BatchNorm1d(2).state_dict()
    state["running_var"][1] = torch.inf
    torch.save(state, tmp_path / "w")
    text = refused(tmp_path / "w", nn.BatchNorm1d(2), NonFiniteWeightsError)
    assert "(running_var)" in text


def test_values_that_overflow_in_the_model_are_named(tmp_path: Path) -> None:
    torch.save(damaged("visual.proj", 1e6), tmp_path / "w")
    text = refused(tmp_path / "w", tiny_clip().half(), NonFiniteWeightsError)
    assert "(visual.proj) that are too large for the float16 of the model" in text
    openvclip.load_checkpoint(tmp_path / "w", tiny_clip().bfloat16())


@pytest.mark.parametrize("part", ["pretrained", "checkpoint"])
def test_a_model_for_use_has_finite_weights(tmp_path: Path, part: str) -> None:
    (tmp_path / "tiny.json").write_text(
        json.dumps({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT})
    )
    files = {"pretrained": tmp_path / "clip", "checkpoint": tmp_path / "tuned"}
    for name, file in files.items():
        torch.save(damaged("visual.proj", torch.nan) if name == part else clip_state(), file)
    with pytest.raises(NonFiniteWeightsError, match=f"{files[part]} holds NaN"):
        load_model(str(tmp_path / "tiny.json"), files["pretrained"], checkpoint=files["checkpoint"])


def test_weights_that_open_clip_brings_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_clip()
    model.load_state_dict(damaged("visual.proj", torch.inf))
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: model)
    monkeypatch.setattr("openvclip.models.hub.is_offline", lambda repo: False)
    for name, tag in (("local-dir:clip", None), ("ViT-B-16-quickgelu", "openai")):
        with pytest.raises(NonFiniteWeightsError, match=f"of {tag or name} hold NaN .*visual.proj"):
            load_model(name, tag)


# --- whole numbers, complex and sparse entries ---------------------------------------------------


# Report 14 (peft#638): whole numbers with scales beside them were taken for weights.
@pytest.mark.parametrize("names", [("visual.proj",), tuple(clip_state())])
def test_whole_numbers_are_not_weights(tmp_path: Path, names: tuple[str, ...]) -> None:
    state = {n: (v * 10).to(torch.int8) if n in names else v for n, v in clip_state().items()}
    save_file(state, tmp_path / "w")
    text = refused(tmp_path / "w", tiny_clip(), WeightTypeError)
    assert f"{len(names)} entries" in text
    assert "Dequantise" in text
    same_entries(openvclip.load_checkpoint(tmp_path / "w"), state)


def test_a_quantised_model_takes_its_own_weights(tmp_path: Path) -> None:
    model, other = nn.Module(), nn.Module()
    for module, value in ((model, 3), (other, 4)):
        module.register_buffer("weight", torch.full((2, 2), value, dtype=torch.int8))
        module.register_buffer("weight_scale", torch.ones(2, 1))
    openvclip.save_checkpoint(model.state_dict(), tmp_path / "w")
    openvclip.load_checkpoint(tmp_path / "w", other)
    same_entries(dict(other.state_dict()), dict(model.state_dict()))


def test_scales_that_are_left_out_do_not_make_weights_of_float8(tmp_path: Path) -> None:
    state = {**clip_state(), "visual.proj": special("float8")}
    torch.save(state, tmp_path / "w")
    openvclip.load_checkpoint(tmp_path / "w", tiny_clip())  # without scales these are weights
    torch.save({**state, "visual.proj_scale": torch.tensor(3.0)}, tmp_path / "w")
    with pytest.raises(WeightTypeError, match=r"\(visual\.proj\)"):
        openvclip.load_checkpoint(tmp_path / "w", tiny_clip(), allow_unexpected="*_scale")


def test_packed_weights_of_quantised_modules_are_named(tmp_path: Path) -> None:
    packed = {"0.scale": torch.ones(1), "0._packed_params._packed_params": (torch.ones(2), None)}
    torch.save(packed, tmp_path / "w")
    with pytest.raises(CheckpointError, match="packed weights of quantised modules"):
        openvclip.load_checkpoint(tmp_path / "w")


def test_a_lazy_model_has_no_shapes(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w")
    with pytest.raises(WeightTypeError, match="Run one forward pass first"):
        openvclip.load_checkpoint(tmp_path / "w", nn.LazyLinear(2))


def special(kind: str) -> torch.Tensor:
    matrix = torch.eye(8, 16).T.contiguous()  # the shape of visual.proj
    if kind == "quantised":
        return torch.quantize_per_tensor(matrix, 0.1, 0, torch.qint8)
    return {
        "sparse": matrix.to_sparse,
        "rows": matrix.to_sparse_csr,
        "complex": lambda: matrix.to(torch.complex64),
        "meta": lambda: matrix.to("meta"),
        "float8": lambda: matrix.to(torch.float8_e4m3fn),
    }[kind]()


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("quantised", "Dequantise"),
        ("sparse", "to_dense"),
        ("rows", "to_dense"),
        ("complex", "real numbers"),
        ("meta", "have no values"),
    ],
)
def test_special_tensors_are_refused_by_a_model(tmp_path: Path, kind: str, advice: str) -> None:
    torch.save({**clip_state(), "visual.proj": special(kind)}, tmp_path / "w")
    assert advice in refused(tmp_path / "w", tiny_clip(), WeightTypeError)
    assert openvclip.inspect_checkpoint(tmp_path / "w").entries == len(clip_state())


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", ["quantised", "sparse", "rows", "meta"])
def test_special_tensors_are_refused_by_what_writes(tmp_path: Path, kind: str) -> None:
    state = {"w": torch.ones(2), "visual.proj": special(kind)}
    out = tmp_path / "out.safetensors"
    torch.save(state, tmp_path / "w")
    for call in (
        lambda: openvclip.save_checkpoint(state, out),
        lambda: openvclip.convert_checkpoint(tmp_path / "w", out),
        lambda: openvclip.average_files([tmp_path / "w"], out),
        lambda: openvclip.interpolate_files(tmp_path / "w", tmp_path / "w", out, 0.5),
    ):
        with pytest.raises(WeightTypeError, match=r"visual\.proj"):
            call()
    assert not out.exists()
