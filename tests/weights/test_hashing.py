"""The hash of all values and the fingerprint of 64 values: definitions, invariances."""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from openvclip import interpolate_files, load_checkpoint, save_checkpoint
from openvclip.errors import StateMismatchError, WeightTypeError
from openvclip.weights import InterpolatedWeightRegularizer, weights_hash
from openvclip.weights.hashing import WeightsHash, fingerprint
from tests.helpers import Net, snapshot

FLAT_DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "visual.w": torch.randn(5, 3, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "scale": torch.tensor(0.5),
        "steps": torch.tensor([3, 4]),
        "none": torch.empty(0, 2),
        "mask": torch.tensor([True, False]),
    }


def as_documented(entries: dict[str, Tensor]) -> str:
    lines = ""
    for name in sorted(entries):
        value = entries[name].contiguous()
        checksum = zlib.crc32(bytes(value.reshape(-1).view(torch.uint8).tolist()))
        dtype = str(value.dtype).split(".")[1]
        lines += f"{name} {dtype} {list(value.shape)} {checksum:08x}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


# --- all values --------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_documentation() -> None:
    assert weights_hash(state()) == as_documented(state())


def test_the_hash_depends_on_the_weights_alone() -> None:
    entries = state()
    expected = weights_hash(entries)
    assert weights_hash(dict(reversed(entries.items()))) == expected
    assert weights_hash({f"module._orig_mod.{n}": v for n, v in entries.items()}) == expected
    strided = dict(entries, **{"visual.w": entries["visual.w"].T.contiguous().T})
    strided["steps"] = torch.tensor([3, 0, 4, 0])[::2]
    assert weights_hash(strided) == expected


@settings(max_examples=25)
@given(st.sampled_from(sorted(state())), st.integers(0, 10**6))
def test_every_bit_of_every_entry_counts(name: str, place: int) -> None:
    entries = {n: v.clone() for n, v in state().items()}
    if entries[name].dtype == torch.bool:
        entries[name][0] = False
    elif entries[name].numel():
        flat = entries[name].view(-1).view(torch.uint8)
        flat[place % flat.numel()] ^= 1 << (place % 7)
    else:
        entries[name] = torch.empty(2, 0)
    assert weights_hash(entries) != weights_hash(state())
    renamed = {("other" if n == name else n): v for n, v in state().items()}
    assert weights_hash(renamed) != weights_hash(state())


@settings(max_examples=25)
@given(st.lists(st.integers(0, 60), max_size=5), st.sampled_from(FLAT_DTYPES))
def test_parts_have_the_hash_of_the_whole(cuts: list[int], dtype: torch.dtype) -> None:
    value = torch.arange(60).reshape(3, 20).to(dtype)
    hashed = WeightsHash({"w": value})
    edges = [0, *sorted(cuts), 60]
    for start, end in itertools.pairwise(edges):
        hashed.update("w", value.view(-1)[start:end])
    assert hashed.hexdigest() == weights_hash({"w": value})


def test_a_recipe_holds_the_hash_of_its_inputs(tmp_path: Path) -> None:
    files = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, file in enumerate(files):
        save_checkpoint(snapshot(Net(seed)), file)
    interpolate_files(files[0], files[1], tmp_path / "out.safetensors", 0.5, progress=False)
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        recipe = json.loads(opened.metadata()["openvclip_recipe"])
    hashes = [weights_hash(load_checkpoint(file)) for file in files]
    assert [entry["weights_hash"] for entry in recipe["inputs"]] == hashes


def test_what_is_no_state_dict_has_no_hash() -> None:
    with pytest.raises(WeightTypeError, match=r"pass its \.state_dict\(\)"):
        weights_hash(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(StateMismatchError, match="Several names become the same"):
        weights_hash({"w": torch.zeros(1), "_orig_mod.w": torch.zeros(1)})


# --- some values -------------------------------------------------------------------------------


def ramp_model() -> nn.Module:
    """A model whose values are the same in every version of PyTorch."""
    model = nn.Sequential(nn.Linear(100, 7), nn.Linear(7, 3))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.float32) / 8 - number
            parameter.copy_(ramp.view_as(parameter))
    return model


def test_the_fingerprint_of_checkpoints_keeps_its_value() -> None:
    """Checkpoints of earlier runs hold this value. With another value they could not resume."""
    state_of_run = InterpolatedWeightRegularizer(ramp_model()).state_dict()
    assert state_of_run["anchor_fingerprint"] == "22b1ebff4a43801fbde68061df963024"


def test_the_fingerprint_tells_weights_apart() -> None:
    model = ramp_model()
    parameters = dict(model.named_parameters())
    values = snapshot(model)
    original = fingerprint(values, parameters)
    assert fingerprint(dict(reversed(values.items())), parameters) == original
    values["1.bias"] += 1
    assert fingerprint(values, parameters) != original
