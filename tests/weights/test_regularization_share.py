"""IWR on a share of the batch: the gradient, the cost, the saved state."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from openvclip import InterpolatedWeightRegularizer
from openvclip.errors import UsageError
from tests.helpers import Smooth, assert_same_state, gradients, same_bits, snapshot, through_a_file
from tests.weights.regularised import regulariser

N = 8


def clips(n: int = N, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 2, (n,), generator=generator)


def loss_of(model: nn.Module) -> Any:
    return lambda x, y: functional.cross_entropy(model(x), y)


def double(seed: int) -> Smooth:
    return Smooth(seed).double()


def made(model: nn.Module, lr: float = 0.0, **options: Any) -> InterpolatedWeightRegularizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(double(1)), **options)


@settings(max_examples=15)
@given(st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]), st.integers(1, 9), st.floats(0.0, 0.9))
def test_gradient_is_that_of_the_batch_and_c_times_that_of_the_part(
    share: float, n: int, alpha: float
) -> None:
    model, anchor = double(0), snapshot(double(1))
    iwr = made(model, interval=(alpha, alpha), weight=0.7, share=share, seed=n)
    x, y = clips(n)
    some, labels = copy.deepcopy(iwr).part_of(x, y)
    assert len(some) == max(1, int(share * n + 0.5))
    iwr.step(loss_of(model), x, y)
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    mixed = {name: alpha * anchor[name] + (1 - alpha) * theta[name] for name in theta}
    plain = functional.cross_entropy(functional_call(model, theta, (x,)), y)
    second = functional.cross_entropy(functional_call(model, mixed, (some,)), labels)
    (plain + 0.7 / (1 - alpha) * second).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, theta[name].grad, rtol=1e-10, atol=1e-12)


def test_the_mean_of_the_second_gradient_over_the_parts_is_that_of_the_batch() -> None:
    """With uniform parts, see test_batch_part.py, the estimate is therefore unbiased."""
    model = double(0)
    iwr = made(model, share=1 / N, interval=(0.5, 0.5))
    x, y = clips()

    def second(*batch: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        with iwr.interpolated():
            (iwr.weight * loss_of(model)(*batch)).backward()
        return gradients(model)

    parts = {tuple(some.flatten().tolist()): (some, label) for some, label in
             (iwr.part_of(x, y) for _ in range(200))}  # fmt: skip
    assert len(parts) == N
    expected, found = second(x, y), [second(*part) for part in parts.values()]
    for name, value in expected.items():
        torch.testing.assert_close(sum(one[name] for one in found) / N, value)


def test_share_1_is_iwr_bit_for_bit_and_alphas_do_not_depend_on_the_share() -> None:
    models = [double(0) for _ in range(3)]
    x, y = clips()
    states, alphas = [], []
    for model, options in zip(models, ({}, {"share": 1.0}, {"share": 0.25}), strict=True):
        iwr = made(model, lr=0.01, **options)
        for _ in range(3):
            if options:
                iwr.step(loss_of(model), x, y)
            else:
                iwr.step(lambda model=model: loss_of(model)(x, y))  # type: ignore[misc]
        states.append(snapshot(model))
        alphas.append(iwr.draw_alpha())
    assert_same_state(states[0], states[1])
    assert not torch.equal(states[0]["first.weight"], states[2]["first.weight"])
    assert alphas[0] == alphas[1] == alphas[2]


def test_the_interpolated_pass_sees_the_share_in_every_kth_step() -> None:
    model, sizes = double(0), list[int]()
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    iwr = made(model, share=0.25, every=2)
    x, y = clips(16)
    for _ in range(3):
        loss = iwr.step(loss_of(model), x, y)
    assert sizes == [4, 16, 16, 4, 16]
    assert same_bits(loss, loss_of(model)(x, y).detach())


def test_the_parts_go_through_the_whole_batch() -> None:
    iwr = made(double(0), share=0.25)
    seen = [tuple(iwr.part_of(list(range(16)))[0]) for _ in range(40)]
    assert len(set(seen)) > 35
    assert {number for part in seen for number in part} == set(range(16))


def test_the_loop_of_the_docstring_and_step_are_the_same() -> None:
    one, other = double(0), double(0)
    iwr, looped = made(one, lr=0.01, share=0.5), made(other, share=0.5)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    for seed in range(3):
        x, y = clips(seed=seed)
        iwr.step(loss_of(one), x, y)
        optimizer.zero_grad()
        some, labels = looped.part_of(x, y)
        with looped.interpolated():
            (looped.weight * loss_of(other)(some, labels)).backward()
        loss_of(other)(x, y).backward()
        optimizer.step()
    assert_same_state(snapshot(one), snapshot(other))


def test_a_scaler_and_clipping_change_nothing() -> None:
    one, other = double(0), double(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = clips()
    made(one, lr=0.01, share=0.5).step(loss_of(one), x, y, scaler=scaler, max_grad_norm=0.1)
    made(other, lr=0.01, share=0.5).step(loss_of(other), x, y, max_grad_norm=0.1)
    for name, value in snapshot(one).items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-9, atol=1e-12)


def _train(iwr: InterpolatedWeightRegularizer, steps: range) -> None:
    for step in steps:
        iwr.step(loss_of(iwr.model), *clips(seed=step))


def test_a_resumed_run_continues_the_parts() -> None:
    whole, model = double(0), double(0)
    _train(made(whole, lr=0.01, share=0.25, every=2), range(7))
    stopped = made(model, lr=0.01, share=0.25, every=2)
    _train(stopped, range(3))
    saved = through_a_file({"iwr": stopped.state_dict(), "adamw": stopped.optimizer.state_dict()})
    resumed = made(model, lr=0.01, seed=9)
    resumed.load_state_dict(saved["iwr"])
    assert resumed.optimizer is not None
    resumed.optimizer.load_state_dict(saved["adamw"])
    assert resumed.share == 0.25
    _train(resumed, range(3, 7))
    assert_same_state(snapshot(whole), snapshot(model))


def test_a_state_from_before_the_share_existed_is_resumed_bit_for_bit() -> None:
    whole, model = double(0), double(0)
    _train(made(whole, lr=0.01), range(4))
    stopped = made(model, lr=0.01)
    _train(stopped, range(2))
    saved = stopped.state_dict()
    old = {name: saved[name] for name in saved if name not in ("share", "part_generator")}
    assert set(old) == {"interval", "weight", "every", "steps", "generator", "anchor_fingerprint"}
    resumed = InterpolatedWeightRegularizer(
        model, stopped.optimizer, anchor=snapshot(double(1)), share=0.25
    )
    resumed.load_state_dict(old)
    assert resumed.share == 1
    _train(resumed, range(2, 4))
    assert_same_state(snapshot(whole), snapshot(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda iwr: pickle.loads(pickle.dumps(iwr))])
def test_copies_draw_the_same_parts(copied: Any) -> None:
    iwr = InterpolatedWeightRegularizer(Smooth(), share=0.25)
    iwr.part_of(range(16))
    other = copied(iwr)
    for _ in range(3):
        assert iwr.part_of(range(16)) == other.part_of(range(16))


def test_the_global_random_state_is_untouched() -> None:
    model, before = Smooth(), torch.get_rng_state()
    InterpolatedWeightRegularizer(model, share=0.25).part_of(range(16))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("every", [1, 2])
def test_a_share_without_a_batch_is_refused_in_each_step(every: int) -> None:
    model = Smooth()
    iwr = regulariser(model, torch.optim.SGD(model.parameters(), 0.1), share=0.5, every=every)
    x, y = clips(dtype=torch.float32)
    for _ in range(2):
        before = snapshot(model)
        with pytest.raises(UsageError, match=r"after the closure: iwr\.step\(closure, video"):
            iwr.step(lambda: loss_of(model)(x, y))
        with pytest.raises(UsageError, match="8 clips, but argument 2 has 7"):
            iwr.part_of(x, y[1:])
        assert_same_state(snapshot(model), before)
        iwr.step(loss_of(model), x, y)


def test_parts_of_one_size_compile_once_more_at_most() -> None:
    """The first pass has the size of a part and the second that of a batch. Then all is known."""
    torch.compiler.reset()
    model, graphs = Smooth(), list[int]()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compiled: Any = torch.compile(model, backend=backend)
    iwr = regulariser(model, torch.optim.SGD(model.parameters(), 0.1), share=0.25)
    for seed in range(4):
        iwr.step(loss_of(compiled), *clips(16, seed, torch.float32))
    assert len(graphs) <= 2
