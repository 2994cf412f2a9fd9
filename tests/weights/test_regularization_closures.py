"""Optimizers that evaluate the loss several times, and closures that do more than return it."""

from __future__ import annotations

import math
import re
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openvclip import InterpolatedWeightRegularizer
from openvclip.errors import LossError, RegularizationError, UsageError
from tests.helpers import (
    Net,
    Smooth,
    assert_same_state,
    cross_entropy,
    gradients,
    same_bits,
    snapshot,
)
from tests.weights.regularised import regulariser

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
    schedulefree = pytest.importorskip("schedulefree")
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
