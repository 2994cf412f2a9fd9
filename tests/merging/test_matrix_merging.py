"""Merges by singular values equal the released numbers and float64 references; their laws hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from openvclip import interpolate
from openvclip.errors import MergeError
from openvclip.merging import (
    iso_c,
    iso_cts,
    lam_of_same_distance,
    monosoup,
    singular,
    task_vector,
    tsv_merge,
)
from openvclip.weights import Adapter, LowRank
from tests.helpers import assert_same_state, same_bits

State = dict[str, Tensor]
few_examples = settings(max_examples=10, deadline=None)
GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "merge_methods.safetensors")
MERGES: dict[str, Callable[..., State]] = {"tsv_m": tsv_merge, "iso_c": iso_c, "iso_cts": iso_cts}
each_merge = pytest.mark.parametrize("method", MERGES)


def golden(part: str) -> State:
    return {n[len(part) + 1 :]: v for n, v in GOLDEN.items() if n.startswith(f"{part}.")}


def matrices(seed: int, rows: int = 6, columns: int = 9, dtype: Any = torch.float64) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / max(1e-300, float(b.double().norm())))


# --- references, from the papers ---------------------------------------------------------------


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u, s, v


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    u, _, v = svd(matrix)
    return u @ v


def tsv_m64(changes: list[Tensor]) -> Tensor:
    parts = [svd(change) for change in changes]
    k = min(changes[0].shape) // len(changes)
    u = torch.cat([part[0][:, :k] for part in parts], dim=1)
    s = torch.cat([part[1][:k] for part in parts])
    v = torch.cat([part[2][:k] for part in parts])
    return nearest_orthogonal(u) @ torch.diag(s) @ nearest_orthogonal(v)


def iso_c64(changes: list[Tensor]) -> Tensor:
    u, s, v = svd(torch.stack(changes).double().sum(dim=0))
    return u @ torch.diag(torch.full_like(s, float(s.mean()))) @ v


def iso_cts64(changes: list[Tensor]) -> Tensor:
    rank, n = min(changes[0].shape), len(changes)
    own = round((rank - int(0.8 * rank)) / n)
    common = rank - own * n
    u, s, v = (part for part in svd(torch.stack(changes).double().sum(dim=0)))
    u, s, v = u[:, :common], s[:common], v[:common]
    for change in changes:
        rest = change.double() - u[:, :common] @ u[:, :common].T @ change.double()
        own_u, own_s, own_v = svd(rest)
        u = torch.cat([u, own_u[:, :own]], dim=1)
        s = torch.cat([s, own_s[:own]])
        v = torch.cat([v, own_v[:own]])
    return s.mean() * nearest_orthogonal(u) @ nearest_orthogonal(v)


REFERENCES = {"tsv_m": tsv_m64, "iso_c": iso_c64, "iso_cts": iso_cts64}


def monosoup64(base: Tensor, tuned: Tensor, rule: str, threshold: float) -> Tensor:
    change = (tuned.double() - base.double()).flatten(1)
    u, s, v = svd(change)
    energy = [float(x) ** 2 for x in s]
    if rule == "variance":
        k = next(k for k in range(1, len(s) + 1) if sum(energy[:k]) >= threshold * sum(energy))
    else:
        p = [float(x) / float(s.sum()) for x in s]
        k = min(len(s), math.ceil(math.exp(-sum(x * math.log(x) for x in p))))
    share = sum(energy[:k]) / sum(energy)
    rho = energy[k] / energy[0] if k < len(s) else 0.0
    low = rho + (1 - rho) * math.sqrt(max(0.0, 1 - share))
    scales = [1 - low if i < k else low for i in range(len(s))]
    return base.double() + (u @ torch.diag(s * torch.tensor(scales, dtype=s.dtype)) @ v).reshape(
        base.shape
    )


# --- parity ------------------------------------------------------------------------------------


@each_merge
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_the_released_code_and_the_paper(
    method: str, count: int, dtype: torch.dtype
) -> None:
    """The released numbers are rounded in float32; the references are not."""
    base, *models = (
        {n: v.to(dtype) for n, v in golden(part).items()}
        for part in ("base", *(f"tuned{i}" for i in range(count)))
    )
    got, released = MERGES[method](base, models), golden(f"{method}_{count}")
    for name, value in base.items():
        change = got[name].double() - value.double()
        changes = [model[name].double() - value.double() for model in models]
        is_matrix = value.dim() == 2 and name != "text_projection"
        expected = REFERENCES[method](changes) if is_matrix else torch.stack(changes).mean(dim=0)
        assert distance(change, expected) < (1e-5 if dtype == torch.float32 else 1e-12), name
        assert distance(change, released[name]) < 5e-5, name


@pytest.mark.parametrize("rule", ["variance", "freevariance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_monosoup_has_parity_with_the_released_code_and_the_paper(
    rule: Any, dtype: torch.dtype
) -> None:
    base, tuned = ({n: v.to(dtype) for n, v in golden(p).items()} for p in ("base", "tuned0"))
    got, released = monosoup(base, tuned, rule=rule), golden(f"monosoup_{rule}")
    for name, value in base.items():
        change = got[name].double() - value.double()
        assert distance(change, released[name].double() - value.double()) < 2e-5, name
        if value.dim() < 2:
            assert same_bits(got[name], tuned[name])
            continue
        expected = monosoup64(value, tuned[name], rule, 0.8) - value.double()
        assert distance(change, expected) < (1e-5 if dtype == torch.float32 else 1e-12), name


@few_examples
@given(st.integers(0, 99), st.sampled_from([0.05, 0.3, 0.6, 0.9, 0.999]))
def test_monosoup_equals_the_formula_at_other_thresholds(seed: int, threshold: float) -> None:
    base, tuned = matrices(seed), matrices(seed + 100)
    got = monosoup(base, tuned, threshold=threshold)["w"]
    assert distance(got, monosoup64(base["w"], tuned["w"], "variance", threshold)) < 1e-12


# --- laws --------------------------------------------------------------------------------------


@each_merge
def test_scale_zero_is_the_original_bitwise_and_scale_is_linear(method: str) -> None:
    base, models = golden("base"), [golden("tuned0"), golden("tuned1")]
    merge = MERGES[method]
    assert_same_state(merge(base, models, scale=0.0), base)
    once, half = merge(base, models), merge(base, models, scale=-0.5)
    mixed = merge(base, models, scale=lambda name: 1.0 if name == "visual.proj" else 0.0)
    assert_same_state(mixed, {**base, "visual.proj": once["visual.proj"]})
    for name, value in base.items():
        torch.testing.assert_close(half[name] - value, -0.5 * (once[name] - value))


@each_merge
@few_examples
@given(seed=st.integers(0, 99), n=st.integers(2, 4))
def test_the_order_of_models_and_the_axes_do_not_matter(method: str, seed: int, n: int) -> None:
    """Rotated and permuted rows and columns give the rotated and permuted result."""
    base, merge = matrices(seed), MERGES[method]
    models = [matrices(1000 + 10 * seed + i) for i in range(n)]
    expected = merge(base, models)["w"]
    assert distance(merge(base, models[::-1])["w"], expected) < 1e-9
    left = nearest_orthogonal(matrices(seed + 1, 6, 6)["w"])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    turned = [{"w": (left @ s["w"])[:, order]} for s in (base, *models)]
    assert distance(merge(turned[0], turned[1:])["w"], (left @ expected)[:, order]) < 1e-9
    upright = [{"w": s["w"].T} for s in (base, *models)]
    if method != "iso_cts":  # its projection is on the left side alone
        assert distance(merge(upright[0], upright[1:])["w"], expected.T) < 1e-9


@few_examples
@given(seed=st.integers(0, 99), n=st.integers(1, 5))
def test_the_update_of_iso_has_equal_singular_values(seed: int, n: int) -> None:
    base, models = matrices(seed), [matrices(100 * seed + i + 1) for i in range(n)]
    total = sum(svd(sum(m["w"] for m in models) - n * base["w"])[1])
    for merge in (iso_c, iso_cts):
        values = svd(merge(base, models)["w"] - base["w"])[1]
        assert float(values.max() - values.min()) < 1e-9 * float(values.max())
        if merge is iso_c:
            assert float(values.sum()) == pytest.approx(float(total), rel=1e-9)


@few_examples
@given(seed=st.integers(0, 99), n=st.integers(1, 6))
def test_the_bases_of_tsv_are_orthogonal(seed: int, n: int) -> None:
    """Then the singular values of the update are those of the models that were kept."""
    base, models = matrices(seed), [matrices(100 * seed + i + 1) for i in range(n)]
    got = svd(tsv_merge(base, models)["w"] - base["w"])[1]
    kept = torch.cat([svd(m["w"] - base["w"])[1][: 6 // n] for m in models])
    expected = torch.zeros(6, dtype=torch.float64)
    expected[: len(kept)] = kept.sort(descending=True).values
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_one_model() -> None:
    base, tuned = matrices(0), matrices(1)
    assert distance(tsv_merge(base, [tuned])["w"], tuned["w"]) < 1e-14
    flat = iso_c(base, [tuned])["w"]
    assert distance(flat - base["w"], iso_c64([tuned["w"] - base["w"]])) < 1e-12
    assert distance(iso_cts(base, [tuned], common=0.4)["w"], flat) < 1e-12
    assert distance(iso_cts(base, [tuned, matrices(2)], common=1.0)["w"],
                    iso_c(base, [tuned, matrices(2)])["w"]) < 1e-14  # fmt: skip


@each_merge
def test_equal_models_and_models_without_a_change(method: str) -> None:
    """The nearest orthogonal matrix is not unique here; the result is that of one model."""
    base, tuned = matrices(0), matrices(1)
    merge, change = MERGES[method], tuned["w"] - base["w"]
    u, s, v = svd(change)
    twice = merge(base, [tuned, dict(tuned)])["w"] - base["w"]
    beside = merge(base, [tuned, base])["w"] - base["w"]
    if method == "tsv_m":
        half = (u[:, :3] * s[:3]) @ v[:3]
        assert distance(twice, half) < 1e-9
        assert distance(beside, half) < 1e-9
    elif method == "iso_c":
        assert distance(twice, 2 * s.mean() * u @ v) < 1e-9
        assert distance(beside, s.mean() * u @ v) < 1e-9
    assert bool(torch.isfinite(twice).all())
    assert distance(merge(base, [base, tuned])["w"] - base["w"], beside) < 1e-9
    assert_same_state(merge(base, [base, dict(base)]), base)


@each_merge
def test_a_lora_has_as_many_directions_as_its_rank(method: str) -> None:
    """Rounding fills the other directions with noise, which must not be merged."""
    base = matrices(0, 24, 32, torch.float32)
    adapters = []
    for seed in (1, 2):
        down, up = matrices(seed, 2, 32, torch.float32), matrices(seed + 9, 24, 2, torch.float32)
        adapters.append(Adapter({"w": LowRank(up["w"], down["w"], 0.1)}, {}))
    exact = [0.1 * a.updates["w"].up.double() @ a.updates["w"].down.double() for a in adapters]
    update = MERGES[method](base, adapters)["w"].double() - base["w"].double()
    values = svd(update)[1]
    assert int((values > 1e-4 * values[0]).sum()) == 4
    if method == "iso_c":
        u, s, v = (part for part in svd(sum(exact)))
        assert distance(update, s[:4].mean() * u[:, :4] @ v[:4]) < 1e-4
    if method == "tsv_m":
        assert distance(update, nearest_tsv(exact, 2)) < 1e-4


@each_merge
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
def test_rounding_to_half_precision_adds_no_directions(
    method: str, dtype: torch.dtype, merged: bool
) -> None:
    base = {"w": (0.02 * matrices(0, 48, 64)["w"]).to(dtype)}
    models: list[Any] = []
    for seed in (1, 2):
        down, up = matrices(seed, 2, 64, torch.float32), matrices(seed + 9, 48, 2, torch.float32)
        adapter = Adapter({"w": LowRank(up["w"], down["w"], 0.02)}, {})
        models.append(dict(adapter.merged(base)) if merged else adapter)
    assert not merged or models[0]["w"].dtype == dtype
    update = MERGES[method](base, models, dtype=torch.float32)["w"].double() - base["w"].double()
    exact = [0.02 * matrices(s + 9, 48, 2)["w"] @ matrices(s, 2, 64)["w"] for s in (1, 2)]
    values = svd(update)[1]
    assert int((values > 1e-3 * values[0]).sum()) == 4
    mean = float(svd(sum(exact))[1][:4].mean())
    if method == "iso_c":
        assert float(values[0]) == pytest.approx(mean, rel=0.01)


def nearest_tsv(changes: list[Tensor], rank: int) -> Tensor:
    parts = [svd(change) for change in changes]
    u = nearest_orthogonal(torch.cat([part[0][:, :rank] for part in parts], dim=1))
    v = nearest_orthogonal(torch.cat([part[2][:rank] for part in parts]))
    return u @ torch.diag(torch.cat([part[1][:rank] for part in parts])) @ v


@few_examples
@given(st.integers(0, 99))
def test_monosoup_lies_between_the_models_and_turns_with_the_axes(seed: int) -> None:
    base, tuned = matrices(seed), matrices(seed + 100)
    left, right = (nearest_orthogonal(matrices(seed + 1, k, k)["w"]) for k in (6, 9))
    for rule in ("variance", "freevariance"):
        got = monosoup(base, tuned, rule=rule)["w"]  # type: ignore[arg-type]
        turned = monosoup(
            {"w": left @ base["w"] @ right}, {"w": left @ tuned["w"] @ right}, rule=rule  # type: ignore[arg-type]
        )["w"]  # fmt: skip
        assert distance(turned, left @ got @ right) < 1e-9
        assert (got - base["w"]).norm() <= (1 + 1e-12) * (tuned["w"] - base["w"]).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_monosoup_at_threshold_one_is_the_fine_tuned_model(dtype: torch.dtype) -> None:
    base, tuned = ({n: v.to(dtype) for n, v in golden(p).items()} for p in ("base", "tuned0"))
    assert_same_state(monosoup(base, tuned, threshold=1.0), tuned)
    rank_one = {"w": base["visual.proj"] + torch.outer(torch.ones(24), torch.ones(16)).to(dtype)}
    near = monosoup({"w": base["visual.proj"].double()}, {"w": rank_one["w"].double()})
    assert distance(near["w"], rank_one["w"]) < 0.1  # all of the change is in one direction


def test_what_monosoup_takes_from_the_fine_tuned_model() -> None:
    base, tuned = golden("base"), dict(golden("tuned0"))
    nearly = base["visual.proj"] * (1 + 5e-7)
    tuned["visual.proj"] = nearly
    tuned["text_projection"] = base["text_projection"].clone()
    got = monosoup(base, tuned)
    for name in ("logit_scale", "visual.class_embedding", "visual.proj", "text_projection"):
        assert same_bits(got[name], tuned[name])
    assert not torch.equal(got["visual.conv1.weight"], tuned["visual.conv1.weight"])


def test_which_entries_are_matrices() -> None:
    """Two dimensions, and no text_projection under any name, as in the released code."""
    for name, is_matrix in (
        ("visual.proj", True),
        ("visual_projection.weight", True),
        ("text_projection.weight", False),
        ("text.text_projection", False),
    ):
        base, *models = ({name: matrices(seed)["w"]} for seed in range(3))
        change = iso_c(base, models)[name] - base[name]
        changes = [model[name] - base[name] for model in models]
        expected = iso_c64(changes) if is_matrix else (changes[0] + changes[1]) / 2
        assert distance(change, expected) < 1e-12


def test_a_complex_matrix_counts_as_pairs_and_a_complex_vector_is_no_matrix() -> None:
    a, b = (torch.view_as_complex(matrices(s, 6, 8)["w"].reshape(6, 4, 2)) for s in (0, 1))
    pairs = [{"w": torch.view_as_real(x).reshape(6, 8)} for x in (a, b)]
    for merge in (iso_c, tsv_merge):
        got = torch.view_as_real(merge({"w": a}, [{"w": b}])["w"]).reshape(6, 8)
        assert distance(got, merge(pairs[0], pairs[1:])["w"]) < 1e-12
        got = merge({"w": a[0]}, [{"w": b[0]}])["w"]
        assert distance(torch.view_as_real(got), torch.view_as_real(b[0])) < 1e-12


def test_equal_infinities_are_no_change() -> None:
    mask = torch.full((5, 5), -math.inf).triu(1)
    expected = mask + torch.eye(5)[2:3].T @ torch.ones(1, 5)  # one direction
    base, tuned = {"mask": mask}, {"mask": expected.clone()}
    for got in (monosoup(base, tuned), iso_c(base, [tuned]), tsv_merge(base, [tuned])):
        torch.testing.assert_close(got["mask"], expected)


def test_the_interpolation_of_the_same_distance() -> None:
    base, tuned = golden("base"), golden("tuned0")
    merged = monosoup(base, tuned)
    lam = lam_of_same_distance(base, tuned, merged)
    assert 0.0 < lam < 1.0
    plain = interpolate(base, tuned, lam)
    norms = [
        torch.cat([v.double().flatten() for v in task_vector(base, m).values()]).norm()
        for m in (merged, plain)
    ]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0.0)
    assert lam_of_same_distance(base, tuned, tuned) == 0.0
    assert lam_of_same_distance(base, tuned, base) == 1.0
    with pytest.raises(MergeError, match="a fine-tuned model that differs from base"):
        lam_of_same_distance(base, base, merged)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: monosoup(s, s, threshold=0.0), r"threshold=0\.0: expected a share in \(0, 1\]"),
        (lambda s: monosoup(s, s, threshold=1.1), r"threshold=1\.1"),
        (lambda s: monosoup(s, s, threshold=math.nan), "threshold=nan"),
        (lambda s: monosoup(s, s, rule="all"), "rule='all': expected 'variance' or 'freev"),
        (lambda s: monosoup(s, [s, s]), "one fine-tuned model, got a list of 2"),
        (lambda s: iso_cts(s, [s], common=0.0), r"common=0\.0: expected a share in \(0, 1\]"),
        (lambda s: iso_cts(s, [s], common=2), "common=2"),
        (lambda s: tsv_merge(s, []), "to merge, got none"),
        (lambda s: iso_c(s, s), "list of one or more state dicts to merge, got one dict"),
        (
            lambda s: tsv_merge(s, [{"w": s["w"] + i} for i in range(7)]),
            r"w of shape \[6, 9\] has 6 singular values, which is fewer than the 7 models",
        ),
    ],
)
def test_settings_that_make_no_sense(call: Callable[[State], object], text: str) -> None:
    with pytest.raises(MergeError, match=text):
        call(matrices(0))


def test_more_models_than_directions() -> None:
    """Iso-C and Iso-CTS have no own share then; the rest of Iso-CTS never exceeds the matrix."""
    base, models = matrices(0, 3, 4), [matrices(seed, 3, 4) for seed in range(1, 9)]
    flat = iso_c(base, models)["w"]
    assert distance(iso_cts(base, models, common=0.5)["w"], flat) < 1e-12
    assert bool(torch.isfinite(iso_cts(base, models[:2], common=0.1)["w"]).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_is_named(value: float) -> None:
    base, broken = matrices(0), matrices(1)
    broken["w"][2, 3] = value
    for merge in MERGES.values():
        with pytest.raises(MergeError, match=r"^w holds NaN or infinity in models\[1\]"):
            merge(base, [matrices(2), broken])
        with pytest.raises(MergeError, match=r"^w holds NaN or infinity in base, the original"):
            merge(broken, [base])
    with pytest.raises(MergeError, match=r"^w holds NaN or infinity in tuned"):
        monosoup(base, broken)
    with pytest.raises(MergeError, match=r"^w holds NaN or infinity in base, the original"):
        monosoup(broken, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decomposition_that_does_not_converge(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other algorithm gives the result. If it fails too, the entry is named."""
    base, tuned = matrices(0, dtype=dtype), matrices(1, dtype=dtype)
    expected = iso_c(base, [tuned])["w"]

    def fails(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

    first, second = ("eigh", "svd") if dtype == torch.float32 else ("svd", "eigh")
    monkeypatch.setattr(torch.linalg, first, fails)
    torch.testing.assert_close(iso_c(base, [tuned])["w"], expected)
    monkeypatch.setattr(torch.linalg, second, fails)
    with pytest.raises(MergeError, match=r"^w: the singular values .* two algorithms did not conv"):
        iso_c(base, [tuned])


@few_examples
@given(st.integers(0, 99), st.sampled_from([(5, 40), (40, 5), (20, 20)]))
def test_eigenvectors_are_more_accurate_than_a_float32_decomposition(
    seed: int, shape: tuple[int, int]
) -> None:
    """Also for a wide range of singular values."""
    u, _, v = svd(matrices(seed, *shape)["w"])
    s = torch.logspace(0, -4, min(shape), dtype=torch.float64)
    matrix = ((u * s) @ v).float()
    exact = svd(matrix)
    parts = singular.directions(matrix, "w")
    torch.testing.assert_close(parts.values, exact[1], rtol=1e-7, atol=0.0)
    torch.testing.assert_close(parts.matrix(), matrix.double(), rtol=0.0, atol=1e-10)
    for vectors in (parts.left, parts.right.T):
        eye = torch.eye(vectors.shape[1], dtype=torch.float64)
        torch.testing.assert_close(vectors.T @ vectors, eye, rtol=0.0, atol=1e-7)
