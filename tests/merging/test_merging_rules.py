"""Rules of all merge methods: memory, names, dtypes, matching, errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from openvclip import merging
from openvclip.errors import LambdaError, MergeError, StateMismatchError, WeightTypeError
from openvclip.merging import (
    apply_task_vectors,
    average,
    dare,
    iso_c,
    iso_cts,
    lines,
    model_stock,
    monosoup,
    slerp,
    task_vector,
    ties,
    tsv_merge,
)
from tests.helpers import assert_same_state, same_bits
from tests.merging.methods import MERGES
from tests.merging.test_merging import State, floats, state


def directions(of: State) -> State:
    return {n: of[n] for n in floats(of)} if isinstance(of, dict) else of


METHODS: dict[str, Callable[[State, State], State]] = {
    "slerp": lambda a, b: slerp(a, b, 0.3),
    "slerp at an end": lambda a, b: slerp(a, b, 1.0),
    "task_vector": task_vector,
    "apply_task_vectors": lambda a, b: apply_task_vectors(a, [directions(b)]),
    "ties": lambda a, b: ties(a, [b, a], density=0.5),
    "ties of whole models": lambda a, b: ties(a, [b], trim="model"),
    "dare": lambda a, b: dare(a, b, drop=0.5),
    "model_stock": lambda a, b: model_stock(a, [b, b]),
    "model_stock of opposed models": lambda a, b: model_stock(a, [a, b]),
    "lines": lambda a, b: lines(a, b, alpha=0.3, beta=0.7),
    "average": lambda a, b: average([a, b]),
    "task_arithmetic": lambda a, b: dict(merging.METHODS["task_arithmetic"].run(a, [b])),
    "monosoup": monosoup,
    "monosoup by entropy": lambda a, b: monosoup(a, b, rule="freevariance"),
    "tsv_merge": lambda a, b: tsv_merge(a, [b, a]),
    "iso_c": lambda a, b: iso_c(a, [b, b]),
    "iso_cts": lambda a, b: iso_cts(a, [b, a], common=0.3),
}


def test_every_method_is_checked_here() -> None:
    """A new method is one file, one line in the registry, ``merging/__init__`` and this dict."""
    checked = {name.split()[0] for name in METHODS}
    no_methods = {"by_depth", "visual_only", "GreedySoup", "lam_of_same_distance"}
    no_methods |= {"METHODS", "Method", "Option", "method"}
    by_name = {"task_arithmetic", "interpolate"}  # made of other functions
    elsewhere = {"greedy_soup"}  # needs scores: see test_merging_soups.py
    assert set(merging.__all__) - no_methods - elsewhere == checked - by_name
    assert set(merging.METHODS) - {"interpolate"} <= checked  # see tests/weights
    no_merge = {"task_vector"}  # the change of one model
    merges = {name.split()[0] for name in MERGES}
    assert set(merging.__all__) - no_methods - no_merge == merges - by_name


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_shared_changed_or_part_of_a_graph(method: str) -> None:
    a, b = state(0), state(1)
    for s in (a, b):
        s["view"] = torch.arange(3.0).expand(4, 3)
        s["tied"] = s["visual.proj"].requires_grad_()
    before = [{n: v.detach().clone() for n, v in s.items()} for s in (a, b)]
    got = METHODS[method](a, b)
    taken = {v.untyped_storage().data_ptr() for s in (a, b) for v in s.values()}
    fresh = [v.untyped_storage().data_ptr() for v in got.values()]
    assert taken.isdisjoint(fresh)
    assert len(set(fresh)) == len(fresh)
    for value in got.values():
        assert value.is_contiguous()
        assert not value.requires_grad
        value.zero_()
    for s, copies in zip((a, b), before, strict=True):
        assert_same_state({n: v.detach() for n, v in s.items()}, copies)


@pytest.mark.parametrize("method", METHODS)
def test_names_are_plain_and_the_dtype_holds_both(method: str) -> None:
    a, b = state(0), state(1, torch.bfloat16)
    wrapped = {f"module._orig_mod.{n}": v for n, v in b.items()}
    got = METHODS[method](a, wrapped)
    assert_same_state(got, METHODS[method](a, b))
    assert {v.dtype for v in got.values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ties of whole models"])
def test_entries_one_by_one_give_the_same(method: str) -> None:
    a, b = state(0, torch.float16), state(1, torch.float16)
    if method == "lines":
        return  # lines counts blocks; see test_merging.py
    whole = METHODS[method](a, b)
    for name in whole:
        assert same_bits(METHODS[method]({name: a[name]}, {name: b[name]})[name], whole[name])


@pytest.mark.parametrize("method", METHODS)
def test_all_that_differs_is_named(method: str) -> None:
    a, b = state(0), state(1)
    del b["scale"]
    b["new"], b["visual.proj"] = torch.zeros(1), torch.zeros(2)
    with pytest.raises(StateMismatchError, match="do not fit together") as caught:
        METHODS[method](a, b)
    assert caught.value.missing == ["scale"]
    assert caught.value.unexpected == ["new"]
    assert caught.value.mismatched == [("visual.proj", (3, 3), (2,))]
    with pytest.raises(WeightTypeError):
        METHODS[method](a, torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_complex_entries_are_pairs_of_numbers() -> None:
    a, b = torch.tensor([1 + 2j, -1j]), torch.tensor([3 - 2j, 4 + 1j])
    pairs = {"w": torch.view_as_real(a)}, {"w": torch.view_as_real(b)}
    for method in ("slerp", "ties", "dare", "model_stock", "average"):
        got = METHODS[method]({"w": a}, {"w": b})["w"]
        expected = METHODS[method](*pairs)["w"]
        torch.testing.assert_close(torch.view_as_real(got), expected)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: ties(s, [s], density=1.5), r"density=1\.5: expected a share in \[0, 1\]"),
        (lambda s: ties(s, [s], trim="all"), "trim='all': expected 'tensor' or 'model'"),
        (lambda s: ties(s, s), "list of one or more state dicts to merge, got one dict"),
        (lambda s: ties(s, []), "to merge, got none"),
        (lambda s: dare(s, s, drop=1.0), r"drop=1\.0: expected a share in \[0, 1\)"),
        (lambda s: dare(s, s, drop=math.nan), "drop=nan"),
        (lambda s: model_stock(s, [s]), "two or more fine-tuned models"),
        (lambda s: apply_task_vectors(s, [task_vector(s, s)], [1, 2]), "2 scales for 1 task"),
        (lambda s: average([]), "one or more state dicts"),
    ],
)
def test_settings_that_make_no_sense(call: Callable[[State], object], text: str) -> None:
    with pytest.raises(MergeError, match=text):
        call(state(0))


def test_scales_that_are_no_numbers() -> None:
    base = state(0)
    with pytest.raises(LambdaError, match="scale"):
        ties(base, [base], scale=math.nan)
    with pytest.raises(LambdaError, match=r"scale\('scale'\)"):
        apply_task_vectors(base, [task_vector(base, base)], lambda n: "x" if n == "scale" else 1)  # type: ignore[arg-type,return-value]
