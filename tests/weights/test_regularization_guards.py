"""What a loop may not do inside interpolated() and step(): each is noticed, and what to write."""

from __future__ import annotations

import copy
import math
import pickle
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schedulefree
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn import functional

from openvclip import InterpolatedWeightRegularizer, SWATracker
from openvclip.errors import LossError, RegularizationError, UsageError
from tests.helpers import (
    Net,
    Smooth,
    assert_same_state,
    batch,
    cross_entropy,
    gradients,
    same_bits,
    snapshot,
)


def regulariser(
    model: nn.Module, optimizer: Any = None, **settings: Any
) -> InterpolatedWeightRegularizer:
    return InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(Smooth(1)), **settings)


def second_loss(iwr: InterpolatedWeightRegularizer, model: nn.Module) -> None:
    (iwr.weight * cross_entropy(model)).backward()


# --- report 06: weights that change inside the block --------------------------------------------


class OldSGD(torch.optim.SGD):
    """Writes through ``.data``, as many optimizers outside of PyTorch do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


IN_BACKWARD: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ".data": lambda p: OldSGD(p, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", IN_BACKWARD)
def test_an_optimizer_in_the_backward_pass_is_refused(kind: str, dtype: torch.dtype) -> None:
    # Report 06 (pytorch#124523): the step was undone, and training was plain fine-tuning.
    model = Smooth().to(dtype)
    own = {p: IN_BACKWARD[kind]([p]) for p in model.parameters()}

    def hook(parameter: Tensor) -> None:
        own[parameter].step()  # type: ignore[index]
        own[parameter].zero_grad()  # type: ignore[index]

    handles = [p.register_post_accumulate_grad_hook(hook) for p in model.parameters()]
    iwr, before = regulariser(model), snapshot(model)
    with (
        pytest.raises(UsageError, match=r"changed inside interpolated\(\).*5 parameters.*before"),
        iwr.interpolated(),
    ):
        (iwr.weight * cross_entropy(model, dtype=dtype)).backward()
    assert_same_state(model.state_dict(), before)
    for handle in handles:
        handle.remove()
    with iwr.interpolated():  # the block counts as ended
        (iwr.weight * cross_entropy(model, dtype=dtype)).backward()


def test_the_optimizer_in_backward_of_torch_distributed_is_refused_by_step() -> None:
    # Report 06 (pytorch#124523).
    model = Smooth()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    iwr = regulariser(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = snapshot(model)
    with pytest.raises(UsageError, match="remove its hooks"):
        iwr.step(lambda: cross_entropy(model))
    assert_same_state(model.state_dict(), before)


def _scale(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("second.bias").mul_(2)


def _replace(model: nn.Module) -> None:
    model.first.bias = nn.Parameter(torch.zeros(6))  # type: ignore[union-attr]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": _scale,
    "load_state_dict": lambda m: m.load_state_dict(snapshot(Smooth(3))),
    "load_state_dict(assign)": lambda m: m.load_state_dict(snapshot(Smooth(3)), assign=True),
    "replaced": _replace,
    "all through .data": lambda m: [p.data.mul_(2) for p in m.parameters()],
    ".data is another tensor": lambda m: [setattr(p, "data", p * 2) for p in m.parameters()],
    "another dtype": lambda m: m.double(),
    "averaged weights": lambda m: m.load_state_dict(snapshot(Smooth(1))),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_other_changes_of_the_weights_inside_the_block(kind: str) -> None:
    # Report 06 (pytorch#124523).
    model = Smooth()
    parameters, iwr = dict(model.named_parameters()), regulariser(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(UsageError, match="changed inside"), iwr.interpolated():
        CHANGES[kind](model)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().float(), before[name], rtol=0, atol=0)


def test_writes_that_change_no_value_are_allowed() -> None:
    """A loss may clamp the temperature, and an average may be tried inside the block."""
    model = Smooth()
    iwr, swa, before = regulariser(model), SWATracker(model), snapshot(model)
    swa.update(model)
    for alpha in (0.0, 0.3, 1.0):
        with iwr.interpolated(alpha):
            with torch.no_grad():
                model.scale.clamp_(-100, 100)
            with swa.applied(model):
                cross_entropy(model)
            second_loss(iwr, model)
    assert_same_state(model.state_dict(), before)


def test_nan_weights_did_not_change() -> None:
    model = Smooth()
    model.first.weight.data[0, 0] = math.nan
    with regulariser(model).interpolated():
        cross_entropy(model).backward()


def test_an_error_of_the_block_comes_before_the_error_about_the_weights() -> None:
    model = Smooth()
    with pytest.raises(ZeroDivisionError), regulariser(model).interpolated():  # noqa: PT012
        _scale(model)
        raise ZeroDivisionError


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_silent_writes_at_the_next_block_or_step() -> None:
    model = Smooth().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(Smooth(1)))
    x, y = (part.cuda() for part in batch())
    before = snapshot(model)
    for _ in range(2):
        with iwr.interpolated():
            functional.cross_entropy(model(x), y).backward()
            CHANGES["all through .data"](model)
        with pytest.raises(UsageError, match="changed inside"), iwr.interpolated():
            pass
        optimizer.zero_grad()

    def closure() -> Tensor:
        return functional.cross_entropy(model(x), y)

    def spoiling(loss: Tensor) -> None:
        loss.backward()
        CHANGES["all through .data"](model)

    with pytest.raises(UsageError, match="changed inside"):
        iwr.step(closure, backward=spoiling)
    for parameter, old in zip(model.parameters(), before.values(), strict=True):
        assert same_bits(parameter, old) or same_bits(parameter, 2 * old)
    iwr.step(closure)


# --- report 07: gradients that step() would clear ------------------------------------------------


@pytest.fixture
def _accelerate_anew() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_accelerate_anew")
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_accelerates_accumulate_around_step_equals_a_loop_by_hand(
    number: int, clip: float | None
) -> None:
    # Report 07 (accelerate#1299): each micro-batch cleared the gradients of the one before.
    models = []
    for framework in (True, False):
        model = Smooth()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        if framework:
            accelerator = Accelerator(gradient_accumulation_steps=number, cpu=True)
            accelerator.prepare(model)
            wrapped: Any = accelerator.prepare(optimizer)
            iwr = regulariser(model, wrapped)
            for micro in range(3 * number):
                before = snapshot(model)
                with accelerator.accumulate(model):
                    iwr.step(
                        lambda net=model, micro=micro: cross_entropy(net, micro),  # type: ignore[misc]
                        backward=accelerator.backward,
                        max_grad_norm=clip,
                    )
                ends = micro % number == number - 1
                assert same_bits(before["scale"], model.scale) != ends
        else:
            iwr = regulariser(model)
            for step in range(3):
                optimizer.zero_grad()
                for micro in range(number * step, number * (step + 1)):
                    with iwr.interpolated():
                        (iwr.weight * cross_entropy(model, micro) / number).backward()
                    (cross_entropy(model, micro) / number).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_gradients_of_the_loop_are_not_cleared_without_a_word() -> None:
    # Report 07 (accelerate#1299): accumulation by hand around step().
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iwr = regulariser(model, optimizer)
    for _ in range(2):
        cross_entropy(model, 1).backward()
        held, before = gradients(model), snapshot(model)
        with pytest.raises(UsageError, match=r"has not used.*interpolated.*zero_grad"):
            iwr.step(lambda: cross_entropy(model, 2))
        assert_same_state(model.state_dict(), before)
        assert all(same_bits(value, held[name]) for name, value in gradients(model).items())
        optimizer.zero_grad()
        iwr.step(lambda: cross_entropy(model, 2))  # its own gradients stay, and were used


def test_gradients_added_to_those_of_a_step_are_noticed() -> None:
    model = Smooth()
    iwr = regulariser(model, torch.optim.SGD(model.parameters(), lr=0.1))
    iwr.step(lambda: cross_entropy(model))
    cross_entropy(model, 1).backward()
    with pytest.raises(UsageError, match="has not used"):
        iwr.step(lambda: cross_entropy(model))


def test_a_step_that_a_wrapper_leaves_out_loses_nothing() -> None:
    """A wrapper that steps in every second call, of which nothing is known."""
    model = Smooth()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)

    class EverySecond:
        def __init__(self) -> None:
            self.optimizer, self.calls = inner, 0
            self.param_groups, self.zero_grad = inner.param_groups, inner.zero_grad

        def step(self) -> None:
            self.calls += 1
            if self.calls % 2 == 0:
                inner.step()

    iwr = regulariser(model, EverySecond())
    iwr.step(lambda: cross_entropy(model))
    with pytest.raises(UsageError, match="has not used"):
        iwr.step(lambda: cross_entropy(model))


LOOPS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], object]] = {
    "a plain step before": lambda m, o: (cross_entropy(m).backward(), o.step()),
    "gradients of zero": lambda m, o: (cross_entropy(m).backward(), o.zero_grad(False)),
    "nothing": lambda m, o: None,
}


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_were_used_or_are_zero_are_cleared(kind: str, fused: bool) -> None:
    model, expected = Smooth(), Smooth()
    for net in (model, expected):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
        iwr = regulariser(net, optimizer)
        for step in range(3):
            LOOPS[kind](net, optimizer)
            if net is expected:
                optimizer.zero_grad()
            iwr.step(lambda step=step: cross_entropy(net, step))  # type: ignore[misc]  # noqa: B023
    assert_same_state(model.state_dict(), expected.state_dict())


def test_gradients_from_before_the_regulariser_are_cleared() -> None:
    """A warm-up loop often leaves its last gradients."""
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cross_entropy(model).backward()
    optimizer.step()
    regulariser(model, optimizer).step(lambda: cross_entropy(model))


def test_a_copy_and_a_pickle_of_a_regulariser_work_on_their_own_optimizer() -> None:
    model = Smooth()
    iwr = regulariser(model, torch.optim.SGD(model.parameters(), lr=0.1))
    iwr.step(lambda: cross_entropy(model))
    for other in (copy.deepcopy(iwr), pickle.loads(pickle.dumps(iwr))):
        before = snapshot(model)
        other.step(lambda other=other: cross_entropy(other.model))
        assert_same_state(model.state_dict(), before)
        cross_entropy(other.model).backward()
        with pytest.raises(UsageError, match="has not used"):
            other.step(lambda other=other: cross_entropy(other.model))


def test_the_regulariser_leaves_no_hook_behind() -> None:
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        regulariser(model, optimizer).step(lambda: cross_entropy(model))
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


# --- report 26: optimizers that evaluate the loss several times ----------------------------------


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: a step up to the sharp point, then a step from there."""

    def __init__(self, parameters: Any, rho: float = 0.05) -> None:
        super().__init__(parameters, {"rho": rho, "lr": 0.1})

    def _all(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norm = torch.stack([p.grad.norm() for p in self._all() if p.grad is not None]).norm()
        for p in self._all():
            self.state[p]["old"] = p.clone()
            if p.grad is not None:
                p.add_(p.grad * 0.05 / norm)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p in self._all():
            p.copy_(self.state[p]["old"])
            if p.grad is not None:
                p.add_(p.grad, alpha=-0.1)
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "needs a closure"


class AsksForAClosure(torch.optim.SGD):
    """Has ``closure=None``, and yet needs one."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is None:
            raise ValueError("a closure is required")


def _instead(error: pytest.ExceptionInfo[UsageError]) -> str:
    """Return the code in the text of an error."""
    return textwrap.dedent("\n".join(re.findall(r"^    .*$", str(error.value), re.MULTILINE)))


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, SAM, AsksForAClosure])
def test_step_refuses_an_optimizer_that_needs_a_closure(kind: Any) -> None:
    # Report 26 (neuromancer#244): TypeError 'closure'.
    model = Smooth()
    optimizer = kind(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # replaces optimizer.step
    iwr, before = regulariser(model, optimizer), snapshot(model)
    with pytest.raises(UsageError, match=rf"^{kind.__name__} .*Write the loop with interpolated"):
        iwr.step(lambda: cross_entropy(model))
    assert_same_state(model.state_dict(), before)


def _objective(model: nn.Module, iwr: InterpolatedWeightRegularizer, alpha: float) -> float:
    with torch.no_grad():
        plain = cross_entropy(model, dtype=torch.float64)
        with iwr.interpolated(alpha):
            second = cross_entropy(model, dtype=torch.float64)
    return float(plain + iwr.weight / (1 - alpha) * second)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_the_code_of_the_error_minimises_equation_7_with_lbfgs(search: str | None) -> None:
    # Report 26 (neuromancer#244): the text says what to write, and the text is run here.
    model = Smooth().double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn=search)
    iwr = InterpolatedWeightRegularizer(
        model, optimizer, anchor=snapshot(Smooth(1).double()), interval=(0.3, 0.5)
    )
    with pytest.raises(UsageError) as error:
        iwr.step(lambda: cross_entropy(model))
    names: dict[str, Any] = {
        "iwr": iwr,
        "optimizer": optimizer,
        "compute_loss": lambda: cross_entropy(model, dtype=torch.float64),
    }
    exec(_instead(error), names)
    alpha = names["alpha"]
    assert 0.3 <= alpha <= 0.5
    start = Smooth().double()
    probe = InterpolatedWeightRegularizer(start, anchor=snapshot(Smooth(1).double()))
    assert _objective(model, iwr, alpha) < 0.5 * _objective(start, probe, alpha)


def test_the_code_of_the_error_is_sam_on_the_gradient_of_equation_9() -> None:
    # Report 26 (neuromancer#244), with SAM.
    model, by_hand = Smooth().double(), Smooth().double()
    optimizer = SAM(model.parameters())
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(Smooth(1).double()))
    with pytest.raises(UsageError) as error:
        iwr.step(lambda: cross_entropy(model))

    def compute_loss() -> Tensor:
        return cross_entropy(model, dtype=torch.float64)

    names: dict[str, Any] = {"iwr": iwr, "optimizer": optimizer, "compute_loss": compute_loss}
    exec(_instead(error), names)
    alpha = names["alpha"]

    theta, clip = snapshot(by_hand), snapshot(Smooth(1).double())

    def gradient(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        mixed = {name: alpha * clip[name] + (1 - alpha) * value for name, value in weights.items()}
        for factor, point in ((1.0, weights), (iwr.weight, mixed)):
            by_hand.load_state_dict(point)
            by_hand.zero_grad()
            cross_entropy(by_hand, dtype=torch.float64).backward()
            for name, value in gradients(by_hand).items():
                total[name] += factor * value
        return total

    up = gradient(theta)
    norm = torch.stack([value.norm() for value in up.values()]).norm()
    down = gradient({name: value + 0.05 * up[name] / norm for name, value in theta.items()})
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), theta[name] - 0.1 * down[name])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, "a"])
def test_alpha_out_of_range(alpha: Any) -> None:
    with (
        pytest.raises(RegularizationError, match="alpha="),
        regulariser(Smooth()).interpolated(alpha),
    ):
        pass


def test_a_given_alpha_draws_none() -> None:
    iwr, other = regulariser(Smooth()), regulariser(Smooth())
    with iwr.interpolated(0.25) as alpha:
        assert alpha == 0.25
    with iwr.interpolated() as one, other.interpolated() as two:
        assert one == two


def test_step_inside_the_step_of_the_optimizer_is_refused() -> None:
    """Lightning's automatic optimization calls the training step there, and steps once more."""
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iwr, before = regulariser(model, optimizer), snapshot(model)
    for _ in range(2):
        with pytest.raises(UsageError, match="automatic_optimization = False"):
            optimizer.step(lambda: iwr.step(lambda: cross_entropy(model)).item())
    assert_same_state(model.state_dict(), before)
    iwr.step(lambda: cross_entropy(model))


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_graph_of_the_gradients_is_refused() -> None:
    """Second-order optimizers would go through the interpolated weights, which are gone."""
    model = Smooth()
    iwr, before = regulariser(model, torch.optim.SGD(model.parameters(), lr=0.1)), snapshot(model)
    with pytest.raises(UsageError, match="create_graph=True"):
        iwr.step(lambda: cross_entropy(model), backward=lambda x: x.backward(create_graph=True))
    assert_same_state(model.state_dict(), before)
    model.zero_grad()


def test_a_schedule_free_optimizer_steps() -> None:
    model = Smooth()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    iwr, before = regulariser(model, optimizer), snapshot(model)
    for step in range(3):
        iwr.step(lambda step=step: cross_entropy(model, step))  # type: ignore[misc]
    assert not same_bits(model.scale, before["scale"])


# --- report 45: closures that do more than return the loss ---------------------------------------


def _with_backward(model: nn.Module, optimizer: Any) -> Tensor:
    loss = cross_entropy(model)
    loss.backward()
    return loss


def _with_silent_backward(model: nn.Module, optimizer: Any) -> Tensor:
    loss = (model.get_parameter("scale") * 2).sum()  # this graph allows two backward passes
    loss.backward()
    return loss


def _with_number(model: nn.Module, optimizer: Any) -> float:
    loss = cross_entropy(model)
    loss.backward()
    return loss.item()


def _with_zero_grad(model: nn.Module, optimizer: Any) -> Tensor:
    optimizer.zero_grad()  # would discard the gradient of the interpolated weights
    return cross_entropy(model)


def _with_zeros(model: nn.Module, optimizer: Any) -> Tensor:
    optimizer.zero_grad(set_to_none=False)
    return cross_entropy(model)


@pytest.mark.parametrize(
    "closure", [_with_backward, _with_silent_backward, _with_number, _with_zero_grad, _with_zeros]
)
@pytest.mark.parametrize("every", [1, 2])
def test_a_closure_that_changes_the_gradients_is_refused(closure: Any, every: int) -> None:
    # Report 45: a closure that calls backward().
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iwr = regulariser(model, optimizer, every=every)
    if every == 2:
        iwr.step(lambda: cross_entropy(model))  # the next step is plain
        if closure in (_with_zero_grad, _with_zeros):
            iwr.step(lambda: closure(model, optimizer))  # here it changes nothing
            return
    before = snapshot(model)
    with pytest.raises(LossError, match="only run the forward pass and return the loss"):
        iwr.step(lambda: closure(model, optimizer))
    assert_same_state(model.state_dict(), before)
    iwr.step(lambda: cross_entropy(model))


def test_the_gradients_of_another_optimizer_are_its_own() -> None:
    """A closure may train a second model, such as a discriminator."""
    model, other = Net(), Smooth()
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    iwr = InterpolatedWeightRegularizer(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def closure() -> Tensor:
        second.zero_grad()
        cross_entropy(other).backward()
        second.step()
        return cross_entropy(model)

    iwr.step(closure)
