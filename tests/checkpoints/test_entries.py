"""Entries that are no plain weights, in files: extra state, float8, scales, factors of adapters."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import openvclip
from openvclip.checkpoints.model_files import save_model_file
from openvclip.errors import CheckpointError, StateMismatchError, WeightTypeError
from openvclip.weights.hashing import weights_hash
from tests.checkpoints.test_conversion import same_entries
from tests.helpers import assert_same_state, same_bits, tiny_clip

# --- extra state ---------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """A layer with extra state, as Transformer Engine's layers have."""

    def __init__(self, value: Any, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(2, 2)
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, value: Any) -> None:
        self.value = value


VALUES: dict[str, Any] = {
    "dict": {"amax": 1.5, "history": torch.arange(3.0), "names": ["a"]},
    "bytes": b"\x80\x04abc",
    "empty": b"",
    "buffer": io.BytesIO(b"\x80\x04abc"),
    "tensor": torch.arange(5, dtype=torch.uint8),
    "floats": torch.tensor([0.1, torch.inf]),
    "none": None,
}


def same_value(a: Any, b: Any) -> bool:
    if isinstance(a, io.BytesIO):
        return isinstance(b, io.BytesIO) and a.getvalue() == b.getvalue()
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and same_bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def weights_in(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict without the extra state."""
    state = model.state_dict()
    return {name: state[name].clone() for name in state if "_extra_state" not in name}


# Report 22 (TransformerEngine#199): extra state passes through every file.
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("kind", ["safetensors", "torch", "lightning"])
def test_extra_state_passes_through_files(tmp_path: Path, value: str, kind: str) -> None:
    model, file = nn.Sequential(Scaled(VALUES[value]), nn.Linear(2, 2)), tmp_path / "w"
    if kind == "safetensors":
        openvclip.save_checkpoint(model.state_dict(), file, dtype=torch.bfloat16)
        model.bfloat16()
        expected = weights_in(model)
        assert openvclip.inspect_checkpoint(file).dtypes == {"bfloat16": 4}
    else:
        prefix = "model." if kind == "lightning" else ""
        state = {f"{prefix}{name}": entry for name, entry in model.state_dict().items()}
        torch.save({"state_dict": state}, file)
        expected = weights_in(model)
    target = nn.Sequential(Scaled(None, seed=1), nn.Linear(2, 2))
    loaded = openvclip.load_checkpoint(file, target)
    assert same_value(VALUES[value], target[0].value)
    assert same_value(VALUES[value], loaded["0._extra_state"])
    if kind != "lightning":  # without a model, the prefix of an unknown model stays
        other = nn.Sequential(Scaled(None, seed=1), nn.Linear(2, 2))
        other.load_state_dict(openvclip.load_checkpoint(file))
        assert same_value(VALUES[value], other[0].value)
        openvclip.convert_checkpoint(file, tmp_path / "twice.safetensors")
        again = openvclip.load_checkpoint(tmp_path / "twice.safetensors")
        assert same_value(VALUES[value], again["0._extra_state"])
    same_entries({name: loaded[name] for name in expected}, expected)


@pytest.mark.parametrize(
    ("first", "last", "value"),
    [
        ("torch", "safetensors", "dict"),
        ("safetensors", "torch", "dict"),
        ("safetensors", "safetensors", "floats"),
        ("torch", "torch", "tensor"),
    ],
)
def test_merged_files_have_the_extra_state_of_the_last_file(
    tmp_path: Path, first: str, last: str, value: str
) -> None:
    models = (Scaled({"amax": torch.zeros(99)}), Scaled(VALUES[value], seed=1))
    files = tmp_path / "a", tmp_path / "b"
    for model, file, kind in zip(models, files, (first, last), strict=True):
        save: Any = torch.save if kind == "torch" else openvclip.save_checkpoint
        save(model.state_dict(), file)
    hashes = [weights_hash(model.state_dict()) for model in models]
    plain = [weights_in(model) for model in models]
    out = tmp_path / "out.safetensors"
    calls = {
        "interpolate": lambda: openvclip.interpolate_files(*files, out, 0.25),
        "average": lambda: openvclip.average_files(files, out, dtype=torch.float64),
        "first": lambda: openvclip.merge_files(files, out, lambda states: states[0]),
    }
    for method, call in calls.items():
        call()
        target = Scaled(None)
        state = openvclip.load_checkpoint(out)
        target.load_state_dict(state)
        assert same_value(VALUES[value], target.value), method
        lam = {"interpolate": 0.25, "average": 0.5, "first": 1.0}[method]
        expected = openvclip.interpolate(*plain, lam)
        for name, entry in expected.items():
            torch.testing.assert_close(state[name].float(), entry)
    recipe = openvclip.inspect_checkpoint(out).metadata["openvclip_recipe"]
    assert all(text in recipe for text in hashes)


def test_the_safe_classes_of_the_user_stay(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save(Scaled(VALUES["buffer"]).state_dict(), tmp_path / "w")
    openvclip.load_checkpoint(tmp_path / "w", Scaled(None))
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([io.BytesIO]):
        openvclip.load_checkpoint(tmp_path / "w", Scaled(None))
        assert io.BytesIO in torch.serialization.get_safe_globals()


def test_extra_state_that_needs_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"_extra_state holds a Linear"):
        openvclip.save_checkpoint(Scaled(nn.Linear(1, 1)).state_dict(), tmp_path / "w")
    openvclip.save_checkpoint(Scaled({"amax": 1.0}).state_dict(), tmp_path / "w.safetensors")
    raw, out = load_file(tmp_path / "w.safetensors"), tmp_path / "bad.safetensors"
    metadata = openvclip.inspect_checkpoint(tmp_path / "w.safetensors").metadata
    assert metadata == {}
    raw["_extra_state"][10:90] = 0
    save_file(raw, out, metadata={"openvclip_extra_state": '["_extra_state"]'})
    with pytest.raises(CheckpointError, match="extra state _extra_state can't be read"):
        openvclip.load_checkpoint(out)


# --- dtypes --------------------------------------------------------------------------------------

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


# Report 19 (ComfyUI#4989): float8 is computed in float32 and rounded once.
@pytest.mark.parametrize("dtype", FLOAT8)
def test_files_of_float8(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = [{"w": torch.randn(40, 9).to(dtype), "v": torch.randn(7).to(dtype)} for _ in "ab"]
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    if safetensors.__version__ < "0.8" and dtype in FLOAT8[2:]:
        with pytest.raises(CheckpointError, match=r"can't store torch\.float8.*safetensors 0\.8"):
            openvclip.save_checkpoint(states[0], files[0])
        assert not files[0].exists()
        return
    for state, file in zip(states, files, strict=True):
        openvclip.save_checkpoint(state, file)
        assert_same_state(load_file(file), dict(sorted(state.items())))
    out = tmp_path / "out.safetensors"
    openvclip.interpolate_files(*files, out, 0.3)
    loaded = openvclip.load_checkpoint(out)
    for name in states[0]:
        a, b = (state[name].float() for state in states)
        assert same_bits(loaded[name], torch.lerp(b, a, 0.3).to(dtype))
    openvclip.average_files(files, out, dtype=torch.float32)
    for name, value in openvclip.load_checkpoint(out).items():
        assert torch.equal(value, (states[0][name].float() + states[1][name].float()) / 2)
    model = nn.ParameterDict({name: torch.zeros(value.shape) for name, value in states[0].items()})
    openvclip.load_checkpoint(files[0], model)
    assert torch.equal(model["w"].data, states[0]["w"].float())
    openvclip.interpolate_files(files[0], files[1], out, 0.5, dtype=torch.bfloat16)
    assert openvclip.inspect_checkpoint(out).dtypes == {"bfloat16": 2}


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32])
def test_dtypes_that_safetensors_lacks_are_named(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=f"w has the dtype={dtype}.*Convert the entry"):
        openvclip.save_checkpoint({"w": torch.zeros(2, dtype=dtype)}, tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("view", [lambda x: x.conj(), lambda x: x.conj().imag])
def test_lazy_views_of_complex_numbers_are_stored(tmp_path: Path, view: Any) -> None:
    value = view(torch.complex(torch.arange(3.0), torch.arange(1.0, 4.0)))
    openvclip.save_checkpoint({"w": value}, tmp_path / "w")
    assert torch.equal(load_file(tmp_path / "w")["w"], value.resolve_conj().resolve_neg())


# --- quantised weights and factors of adapters ---------------------------------------------------


def quantised(weight: Tensor, names: tuple[str, str]) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {names[0]: (weight / scale).round().to(torch.int8), names[1]: scale}


# Report 14 (peft#638): whole numbers of one model with the mean of the scales.
@pytest.mark.parametrize(
    "names",
    [
        ("fc.weight", "fc.scale"),
        ("fc.weight", "fc.SCB"),
        ("fc.weight", "fc.weight_scale"),
        ("fc.qweight", "fc.scales"),
        ("fc.weight_packed", "fc.weight_scale"),
        ("fc.weight", "fc.weight.absmax"),
    ],
)
def test_files_of_quantised_weights_are_not_merged(tmp_path: Path, names: tuple[str, str]) -> None:
    torch.manual_seed(0)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        openvclip.save_checkpoint(quantised(torch.randn(4, 8), names), file)
    out = tmp_path / "out.safetensors"
    for call in (
        lambda: openvclip.interpolate_files(*files, out, 0.5),
        lambda: openvclip.average_files(files, out),
        lambda: openvclip.merge_files(files, out, lambda states: states[0]),
    ):
        with pytest.raises(WeightTypeError, match=rf"(?s)safetensors.*{names[0]}.*Dequantise"):
            call()
    assert not out.exists()
    assert openvclip.inspect_checkpoint(files[0]).quantized == (names[0],)
    openvclip.average_files(files[:1], out)  # one model, and equal models, need no arithmetic
    assert_same_state(load_file(out), load_file(files[0]))
    openvclip.interpolate_files(files[0], files[0], out, 0.5)
    assert_same_state(load_file(out), load_file(files[0]))


ADAPTERS = {
    "peft": ("base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight"),
    "peft, named": ("fc.lora_A.default.weight", "fc.lora_B.default.weight"),
    "embedding": ("fc.lora_embedding_A", "fc.lora_embedding_B"),
    "diffusers": ("unet.fc.lora.down.weight", "unet.fc.lora.up.weight"),
    "kohya": ("lora_te_fc.lora_down.weight", "lora_te_fc.lora_up.weight"),
    "loha": ("fc.hada_w1_a", "fc.hada_w1_b"),
    "lokr": ("fc.lokr_w1", "fc.lokr_w2"),
    "loralib": ("fc.lora_A", "fc.lora_B"),
}


# Report 13 (peft#1155): the means of the factors are not the mean of the weights.
@pytest.mark.parametrize("names", ADAPTERS.values(), ids=ADAPTERS)
def test_files_of_factors_are_not_merged(tmp_path: Path, names: tuple[str, str]) -> None:
    torch.manual_seed(0)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    states: list[Mapping[str, Tensor]] = []
    for file in files:
        states.append({names[0]: torch.randn(2, 4), names[1]: torch.randn(3, 2)})
        save_file(dict(states[-1]), file)
    out = tmp_path / "out.safetensors"
    for call in (
        lambda: openvclip.interpolate_files(*files, out, 0.5),
        lambda: openvclip.average_files(files, out),
        lambda: openvclip.merge_files(files, out, lambda states: states[0]),
    ):
        with pytest.raises(WeightTypeError, match="merge_and_unload"):
            call()
    assert not out.exists()
    assert len(openvclip.inspect_checkpoint(files[0]).factors) == 2
    with pytest.raises(StateMismatchError, match="merge_and_unload"):
        openvclip.load_checkpoint(files[0], tiny_clip())
    # With one factor in common, the product is linear in the other factor.
    common = {names[0]: states[0][names[0]], names[1]: states[1][names[1]]}
    save_file(common, files[1])
    openvclip.interpolate_files(*files, out, 0.5)
    mean = torch.lerp(states[1][names[1]], states[0][names[1]], 0.5)
    assert torch.equal(load_file(out)[names[1]], mean)


def test_the_index_of_a_model_in_shards_lists_extra_state(tmp_path: Path) -> None:
    model = nn.Sequential(Scaled({"amax": 1.5}), Scaled({"amax": 2.5}))
    name = save_model_file(model.state_dict(), tmp_path, "model", metadata={}, max_shard_size=20)
    loaded = openvclip.load_checkpoint(tmp_path / name)
    assert loaded.keys() == model.state_dict().keys()
    assert loaded["1._extra_state"] == {"amax": 2.5}
