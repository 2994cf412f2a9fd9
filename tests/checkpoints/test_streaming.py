"""Merging files gives the same bits as loading, merging and saving."""

from __future__ import annotations

import binascii
import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import openvclip
from openvclip import merging
from openvclip.checkpoints.streaming import pipeline
from openvclip.checkpoints.streaming.inputs import WeightInput, open_inputs
from openvclip.errors import (
    NonFiniteWeightsError,
    WeightTypeError,
)
from tests.helpers import assert_same_state, same_bits, tiny_clip

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use parts of 16 bytes, so that small entries have many parts."""
    monkeypatch.setattr(pipeline, "_LARGEST_PART", 16)
    monkeypatch.setattr(pipeline, "_SMALLEST_PART", 16)


def a_state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "visual.w": torch.randn(7, 5, generator=generator).to(dtype),
        "text.w": torch.randn(3, generator=generator).to(dtype),
        "scale": torch.randn((), generator=generator).to(dtype),
        "half": torch.randn(9, generator=generator).half(),
        "double": torch.randn(5, generator=generator).double(),
        "complex": torch.randn(4, generator=generator).to(torch.complex64),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "mask": torch.full((2, 2), float("-inf")).triu(1).to(dtype),
        "count": torch.tensor([seed, seed + 1]),
        "flags": torch.tensor([True, False, bool(seed % 2)]),
    }


def files(folder: Path, *states: State) -> list[Path]:
    paths = [folder / f"in-{number}.safetensors" for number in range(len(states))]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    return paths


def same_entries(loaded: State, expected: State) -> None:
    assert loaded.keys() == expected.keys()
    assert_same_state({name: loaded[name] for name in expected}, expected)


def weights_hash(state: State) -> str:
    """Compute the hash from whole tensors, as the documentation defines it."""
    lines = ""
    for name in sorted(state):
        value = state[name].contiguous()
        data = bytes(value.reshape(-1).view(torch.uint8).tolist())
        dtype = str(value.dtype).split(".")[1]
        lines += f"{name} {dtype} {list(value.shape)} {binascii.crc32(data):08x}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def recipe_of(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        recipe: dict[str, Any] = json.loads(opened.metadata()["openvclip_recipe"])
    return recipe


# --- interpolation -------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES[:3] for b in DTYPES])
def test_bits_are_those_of_interpolate(
    tmp_path: Path, lam: float, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    states = [a_state(seed, dtype) for seed, dtype in enumerate(dtypes)]
    if torch.float8_e4m3fn in dtypes:  # float8_e4m3fn has no infinity
        for state in states:
            del state["mask"]
    for state in states:
        del state["complex"]  # no other dtype holds complex numbers
    a, b = files(tmp_path, *states)
    for dtype in (None, torch.bfloat16, torch.float32):
        openvclip.interpolate_files(a, b, tmp_path / "out.safetensors", lam, dtype=dtype)
        same_entries(
            load_file(tmp_path / "out.safetensors"),
            openvclip.interpolate(load_file(a), load_file(b), lam, dtype=dtype),
        )


def test_values_are_those_of_the_equation_in_float64(tmp_path: Path) -> None:
    a, b = a_state(0), a_state(1)
    openvclip.interpolate_files(*files(tmp_path, a, b), tmp_path / "out.safetensors", 0.3)
    loaded = load_file(tmp_path / "out.safetensors")
    for name in ("visual.w", "text.w", "scale"):
        exact = 0.3 * a[name].double() + 0.7 * b[name].double()
        torch.testing.assert_close(loaded[name].double(), exact, rtol=2e-7, atol=2e-7)
    assert torch.equal(loaded["count"], b["count"])
    assert torch.equal(loaded["flags"], b["flags"])
    assert torch.equal(loaded["mask"], b["mask"])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    halves=st.tuples(st.booleans(), st.booleans()),
    lam=st.floats(0, 1),
)
def test_any_sizes_in_any_order(
    tmp_path: Path, sizes: list[int], halves: tuple[bool, bool], lam: float
) -> None:
    states = []
    for half in halves:
        state = {f"e{number}": torch.randn(size) for number, size in enumerate(sizes)}
        if half:
            state["e0"] = state["e0"].half()  # gets another place in the file
        states.append(state)
    a, b = files(tmp_path, *states)
    out = tmp_path / "out.safetensors"
    openvclip.interpolate_files(a, b, out, lam)
    same_entries(load_file(out), openvclip.interpolate(states[0], states[1], lam))
    assert [source["weights_hash"] for source in recipe_of(out)["inputs"]] == [
        weights_hash(state) for state in states
    ]


def test_several_weights_in_one_pass(tmp_path: Path) -> None:
    a, b = files(tmp_path, a_state(0), a_state(1))
    lams = [0.0, 0.25, merging.visual_only(0.5), lambda name: 1.0 if name == "half" else 0.5]
    outs = [tmp_path / f"{number}.safetensors" for number in range(len(lams))]
    openvclip.interpolate_files(a, b, outs, lams)
    for out, lam in zip(outs, lams, strict=True):
        same_entries(load_file(out), openvclip.interpolate(load_file(a), load_file(b), lam))
    assert recipe_of(outs[1])["lam"] == 0.25
    assert recipe_of(outs[2])["lam"]["visual.w"] == 0.5
    assert recipe_of(outs[2])["lam"]["text.w"] == 1.0


def test_wrappers_names_are_taken_out(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": value for name, value in a_state(0).items()}
    a, b = files(tmp_path, wrapped, a_state(1))
    openvclip.interpolate_files(a, b, tmp_path / "out.safetensors", 0.5)
    expected = openvclip.interpolate(wrapped, a_state(1), 0.5)
    same_entries(load_file(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ""])
def test_pytorch_files_are_merged_whatever_their_name(ending: str, tmp_path: Path) -> None:
    a, b = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    for path, seed in ((a, 0), (b, 1)):
        torch.save(a_state(seed), path)
    openvclip.interpolate_files(a, b, tmp_path / "out.safetensors", 0.5)
    expected = openvclip.interpolate(a_state(0), a_state(1), 0.5)
    same_entries(load_file(tmp_path / "out.safetensors"), expected)


def test_a_real_model(tmp_path: Path) -> None:
    states = [dict(tiny_clip(seed).state_dict()) for seed in (0, 1)]
    a, b = files(tmp_path, *states)
    openvclip.interpolate_files(a, b, tmp_path / "out.safetensors", 0.5)
    model = tiny_clip(2)
    openvclip.load_checkpoint(tmp_path / "out.safetensors", model)
    same_entries(dict(model.state_dict()), openvclip.interpolate(*states, 0.5))


# --- averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_average_is_the_mean_in_float64(tmp_path: Path, dtype: torch.dtype) -> None:
    states = [a_state(seed, dtype) for seed in range(7)]
    paths = files(tmp_path, *states)
    openvclip.average_files(paths, tmp_path / "swa.safetensors")
    loaded = load_file(tmp_path / "swa.safetensors")
    for name in ("visual.w", "text.w", "scale", "half", "double", "mask"):
        exact = torch.stack([state[name].double() for state in states]).mean(dim=0)
        if states[0][name].dtype == torch.float64:
            torch.testing.assert_close(loaded[name], exact, rtol=1e-15, atol=1e-15)
        else:
            assert same_bits(loaded[name], exact.to(states[0][name].dtype))
    for name in ("count", "flags"):
        assert same_bits(loaded[name], states[-1][name])
    assert recipe_of(tmp_path / "swa.safetensors")["method"] == "average"
    assert len(recipe_of(tmp_path / "swa.safetensors")["inputs"]) == 7


def test_the_average_of_equal_files_and_of_one_is_bitwise_that(tmp_path: Path) -> None:
    paths = files(tmp_path, *[a_state(4)] * 3)
    for some in (paths, paths[:1]):
        openvclip.average_files(some, tmp_path / "swa.safetensors")
        same_entries(load_file(tmp_path / "swa.safetensors"), a_state(4))


def test_an_average_takes_the_narrowest_dtype_that_holds_all(tmp_path: Path) -> None:
    paths = files(tmp_path, {"w": torch.ones(3).half()}, {"w": torch.ones(3).bfloat16()})
    openvclip.average_files(paths, tmp_path / "swa.safetensors")
    assert load_file(tmp_path / "swa.safetensors")["w"].dtype == torch.float32
    openvclip.average_files(paths, tmp_path / "swa.safetensors", dtype=torch.float16)
    assert load_file(tmp_path / "swa.safetensors")["w"].dtype == torch.float16


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_average_with_what_is_not_finite_is_refused(tmp_path: Path, value: str) -> None:
    broken = a_state(1)
    broken["visual.w"][6, 4] = float(value)
    paths = files(tmp_path, a_state(0), broken, a_state(2))
    with pytest.raises(NonFiniteWeightsError, match=r"visual\.w holds NaN or infinity in .*in-1"):
        openvclip.average_files(paths, tmp_path / "swa.safetensors")
    assert sorted(tmp_path.iterdir()) == paths


# --- any method ----------------------------------------------------------------------------------

BLOCKS = [f"{tower}transformer.resblocks.{k}.w" for tower in ("", "visual.") for k in range(3)]


def a_state_with_blocks(seed: int, dtype: torch.dtype) -> State:
    generator = torch.Generator().manual_seed(100 + seed)
    blocks = {name: torch.randn(4, 3, generator=generator).to(dtype) for name in BLOCKS}
    return {**a_state(seed, dtype), **blocks}


METHODS: dict[str, Callable[[list[State]], State]] = {
    "slerp": lambda states: merging.slerp(states[0], states[1], 0.3),
    "ties": lambda states: merging.ties(states[0], states[1:]),
    "dare": lambda states: merging.dare(states[0], states[1]),
    "negation": lambda states: merging.apply_task_vectors(
        states[0], [merging.task_vector(states[0], states[1])], -0.5
    ),
    "lines": lambda states: merging.lines(
        states[0], states[1:], alpha=0.25, beta=0.5, blocks=BLOCKS
    ),
    "model stock": lambda states: merging.model_stock(states[0], states[1:]),
    "soup": merging.average,
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_method_on_single_entries_streams(
    tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    states = [a_state_with_blocks(seed, dtype) for seed in range(3)]
    for state in states:
        del state["mask"]
    paths = files(tmp_path, *states)
    openvclip.merge_files(paths, tmp_path / "out.safetensors", METHODS[case], method=case)
    same_entries(load_file(tmp_path / "out.safetensors"), METHODS[case](states))
    assert recipe_of(tmp_path / "out.safetensors")["method"] == case


def test_a_method_that_goes_by_depth_streams(tmp_path: Path) -> None:
    states = [a_state_with_blocks(seed, torch.float64) for seed in range(2)]
    paths, out = files(tmp_path, *states), tmp_path / "out.safetensors"

    def lines(states: list[State]) -> State:
        return merging.lines(states[0], states[1], alpha=0.25, beta=0.5, blocks=3)

    openvclip.merge_files(paths, out, lines)
    merged = load_file(out)
    same_entries(merged, merging.lines(states[0], states[1], alpha=0.25, beta=0.5))
    for name, share in zip(BLOCKS, [0.25, 0.5, 0.75] * 2, strict=True):
        expected = states[0][name] + share * (states[1][name] - states[0][name])
        torch.testing.assert_close(merged[name], expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(
    ("merge", "reason"),
    [
        (lambda states: {}, r"gave \{\}"),
        (lambda states: [1], r"gave \[1\]"),
        (lambda states: {**states[0], "more": torch.zeros(1)}, "expected {'double': tensor}"),
        (lambda states: {name: v[:1] for name, v in states[0].items()}, r"expected .*\[5\]"),
        (lambda states: {name: v.float() for name, v in states[0].items()}, "as torch.float32"),
    ],
)
def test_what_a_method_must_give(
    tmp_path: Path, merge: Callable[[list[State]], State], reason: str
) -> None:
    paths = files(tmp_path, {"double": torch.ones(5).double()})
    with pytest.raises(WeightTypeError, match=reason):
        openvclip.merge_files(paths, tmp_path / "out.safetensors", merge)
    assert sorted(tmp_path.iterdir()) == paths


# --- reading, arithmetic and writing at the same time --------------------------------------------


class Meetings:
    """Work on a part waits for other work on the next part, so one thread would never finish."""

    def __init__(self, parts: int) -> None:
        self._begun: dict[str, list[Event]] = {
            work: [Event() for _ in range(parts)] for work in ("read", "compute", "write")
        }

    def at(self, work: str, part: int, other: str | None = None) -> None:
        self._begun[work][part].set()
        if other is not None and part + 1 < len(self._begun[other]):
            begun = self._begun[other][part + 1].wait(timeout=10)
            assert begun, f"no {other} of part {part + 1} before the end of {work} of part {part}"


@pytest.mark.parametrize("whole", [False, True])
def test_the_next_part_is_read_while_one_is_computed_and_the_last_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Part n is filled with n, so its values show which part is read, computed or written."""
    numbers = torch.arange(8.0).repeat_interleave(4)
    entries = 8 if whole else 2
    state = {f"w{k}": part.clone() for k, part in enumerate(numbers.chunk(entries))}
    meetings, written = Meetings(8), []
    fill = WeightInput.read

    def read(self: WeightInput, name: str, start: int, into: Tensor) -> None:
        fill(self, name, start, into)
        meetings.at("read", int(into[0]))

    def compute(name: str, values: list[Tensor], results: list[Tensor]) -> None:
        meetings.at("compute", int(values[0][0]), "read")
        results[0].copy_(values[0])

    class Output:
        def write(self, flat: Tensor) -> None:
            meetings.at("write", int(flat[0]), "compute")
            written.append(flat.clone())

    monkeypatch.setattr(WeightInput, "read", read)
    with ExitStack() as stack:
        inputs = open_inputs(files(tmp_path, state), stack)
        pipeline.stream(inputs, [Output()], inputs[0].sizes, compute, whole=whole)
    assert torch.equal(torch.cat(written), numbers)
