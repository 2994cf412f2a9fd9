"""NaN and infinity in the models: refused by every merge method, in memory and from files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from openvclip.checkpoints.streaming import (
    average_files,
    interpolate_files,
    merge_files,
    task_vector_file,
)
from openvclip.errors import MergeError, NonFiniteMergeError, NonFiniteWeightsError
from openvclip.merging import (
    METHODS,
    Method,
    apply_task_vectors,
    average,
    greedy_soup,
    monosoup,
    slerp,
    task_vector,
    ties,
)
from tests.on_device import placed

State = dict[str, Tensor]
WHERE = {"visual.proj": (6, 5), "visual.transformer.resblocks.0.b": (9,), "scale": ()}
LARGE = (1 << 19) + 3  # elements: more than the pieces in which an entry is computed
values = st.sampled_from([math.nan, math.inf, -math.inf])
methods = st.sampled_from(sorted(METHODS))
few = settings(max_examples=60, deadline=None)


def model(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    start = {name: torch.randn(s, generator=torch.Generator()) for name, s in WHERE.items()}
    return {
        n: (v + 0.1 * torch.randn(v.shape, generator=generator)).to(dtype) for n, v in start.items()
    }


def put(state: State, name: str, place: int, value: float) -> None:
    state[name].view(-1)[place % state[name].numel()] = value


def merge(method: Method, models: Sequence[State]) -> dict[str, Tensor]:
    base, others = (models[0], models[1:]) if method.base else (None, models)
    others = others[:1] if method.most == 1 else others
    return dict(method.run(base, others, **method.example()))


def merge_to_file(method: Method, files: list[Path], out: Path) -> None:
    if method.name == "interpolate":
        interpolate_files(files[0], files[1], out, 0.3)
    elif method.name == "average":
        average_files(files, out)
    else:
        merge_files(files, out, lambda states: merge(method, states), base=method.base)


def label(method: Method, position: int) -> str:
    """Return a pattern of the name of a model in the error."""
    if not method.base:
        return rf"models\[{position}\]"
    if method.name == "slerp":
        return "theta_a" if position == 0 else "theta_b"
    if position == 0:
        return "base, the original model"
    return r"tuned\." if method.name in ("dare", "monosoup") else rf"\w+\[{position - 1}\]"


@few
@given(
    name=methods,
    entry=st.sampled_from(sorted(WHERE)),
    place=st.integers(0, 29),
    value=values,
    position=st.integers(0, 2),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_every_method_names_the_model_and_the_entry(
    name: str, entry: str, place: int, value: float, position: int, dtype: torch.dtype
) -> None:
    method = METHODS[name]
    position = min(position, 1) if method.most == 1 else position
    models = [model(seed, dtype) for seed in range(3)]
    merge(method, models)
    put(models[position], entry, place, value)
    pattern = rf"^{entry} holds NaN or infinity in {label(method, position)}"
    with pytest.raises(NonFiniteMergeError, match=pattern):
        merge(method, models)


@few
@given(
    name=methods,
    entry=st.sampled_from(sorted(WHERE)),
    place=st.integers(0, 29),
    value=st.sampled_from([math.inf, -math.inf]),
)
def test_infinities_that_all_models_hold_are_kept(
    name: str, entry: str, place: int, value: float
) -> None:
    models = [model(seed) for seed in range(3)]
    for one in models:
        put(one, entry, place, value)
    got = merge(METHODS[name], models)
    for key, tensor in got.items():
        assert torch.equal(tensor.isinf(), models[0][key].isinf())
        assert not bool(tensor.isnan().any())
    assert got[entry].view(-1)[place % got[entry].numel()] == value


@few
@given(name=methods, place=st.integers(0, 29), value=values, position=st.integers(0, 2))
def test_files_are_named_and_nothing_is_written(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: int, value: float, position: int
) -> None:
    method, folder = METHODS[name], tmp_path_factory.mktemp("files")
    models = [model(seed) for seed in range(2 if method.most == 1 else 3)]
    position = min(position, len(models) - 1)
    put(models[position], "visual.proj", place, value)
    files = [folder / f"{k}.safetensors" for k in range(len(models))]
    for state, file in zip(models, files, strict=True):
        save_file(state, file)
    out = folder / "out.safetensors"
    pattern = rf"^visual\.proj holds NaN or infinity in {files[position]}"
    with pytest.raises(NonFiniteMergeError, match=pattern):
        merge_to_file(method, files, out)
    assert sorted(folder.iterdir()) == files


def test_a_method_of_the_users_own_is_checked_too(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        state = model(seed)
        state["scale"] += math.nan if seed else 0.0
        save_file(state, file)
    with pytest.raises(NonFiniteMergeError, match=rf"^scale holds NaN or infinity in {files[1]}"):
        merge_files(files, tmp_path / "out.safetensors", lambda s: {n: s[1][n] * 1 for n in s[1]})
    with pytest.raises(NonFiniteMergeError, match=rf"in {files[1]}, the original model"):
        task_vector_file(files[1], files[0], tmp_path / "out.safetensors")
    # A model whose weight is 0 is not used.
    interpolate_files(*files, tmp_path / "out.safetensors", 1.0)
    written = placed(load_file(tmp_path / "out.safetensors")["scale"])
    assert torch.equal(written, model(0)["scale"])


@pytest.mark.parametrize("place", [0, LARGE - 1, (1 << 19) - 1])
def test_a_value_anywhere_in_a_large_entry(place: int) -> None:
    models = [{"w": torch.full((LARGE,), float(k))} for k in range(2)]
    assert torch.equal(average(models)["w"], torch.full((LARGE,), 0.5))
    assert torch.equal(apply_task_vectors(models[0], [models[1]], 2.0)["w"], models[1]["w"] * 2)
    models[1]["w"][place] = math.nan
    for call in (
        lambda: average(models),
        lambda: slerp(models[0], models[1], 0.3),
        lambda: apply_task_vectors(models[0], [models[1]]),
    ):
        with pytest.raises(NonFiniteMergeError, match=r"^w holds NaN"):
            call()


def test_functions_that_have_no_name() -> None:
    good, broken = model(0), model(1)
    broken["scale"].fill_(math.inf)
    nan = {**good, "scale": torch.tensor(math.nan)}

    def never(_: object) -> float:
        raise AssertionError("evaluated")

    for call, text in (
        (lambda: greedy_soup([good, broken], never), r"scale .* in models\[1\]\."),
        (lambda: task_vector(good, broken), r"scale .* in tuned\."),
        (lambda: ties(good, [good, broken], trim="model"), r"scale .* in tuned\[1\]\."),
        (lambda: monosoup(good, broken, threshold=1.0), r"scale .* in tuned\."),
        (lambda: apply_task_vectors(good, [good, broken]), r"scale .* in vectors\[1\]\."),
        (lambda: apply_task_vectors(nan, [good]), r"scale .* in base, the original model\."),
    ):
        with pytest.raises(NonFiniteMergeError, match=text) as caught:
            call()
        assert isinstance(caught.value, (MergeError, NonFiniteWeightsError))
    mask = {"w": torch.tensor([-math.inf, 1.0])}
    got = apply_task_vectors(mask, [task_vector(mask, mask)])
    assert got["w"].tolist() == [-math.inf, 1.0]


def test_a_change_beyond_the_range_of_the_dtype(tmp_path: Path) -> None:
    states = {"w": torch.tensor([-3e38])}, {"w": torch.tensor([3e38])}
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    for call in (
        lambda: ties(states[0], states[1:]),
        lambda: task_vector_file(*files, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(NonFiniteMergeError, match=r"^w: the change .* range of torch\.float32"):
            call()
