"""The weights to evaluate at: interpolations one after another, the original weights afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import openvclip
from openvclip.errors import LambdaError, UsageError
from openvclip.evaluation import Mixture
from tests.helpers import assert_same_state, snapshot


def _model() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, {name: value + 1 for name, value in snapshot(model).items()}


def test_the_weights_are_those_of_interpolate_and_are_restored() -> None:
    model, tuned = _model()
    original = snapshot(model)
    for lams in ((0.3,), (0, 0.5, 1)):
        mixture = Mixture(tuned, lams)
        with mixture.setters(model) as setters:
            assert len(setters) == len(mixture.lams) == len(lams)
            for lam, set_weights in zip(lams, setters, strict=True):
                set_weights()
                expected = openvclip.interpolate(original, tuned, lam)
                assert_same_state(snapshot(model), expected)
        assert_same_state(snapshot(model), original)


def test_the_weights_are_restored_after_an_exception() -> None:
    model, tuned = _model()
    original = snapshot(model)

    def stopped() -> None:
        with Mixture(tuned).setters(model) as setters:
            setters[0]()
            raise OSError("stop")

    with pytest.raises(OSError, match="stop"):
        stopped()
    assert_same_state(snapshot(model), original)


@pytest.mark.parametrize("lam", [float("nan"), float("inf"), "0.5", None])
def test_a_weight_that_is_no_finite_number_is_told_at_once(lam: object) -> None:
    with pytest.raises(LambdaError, match="lam"):
        Mixture(_model()[1], (0.5, lam))  # type: ignore[arg-type]


def test_defaults() -> None:
    model, tuned = _model()
    assert Mixture().lams == ()
    assert Mixture(tuned).lams == Mixture(tuned, []).lams == (0.0,)
    original = snapshot(model)
    with Mixture().setters(model) as (set_weights,):
        set_weights()
        assert_same_state(snapshot(model), original)
    with pytest.raises(UsageError, match=r"lams=\[0.5\] without tuned"):
        Mixture(lams=[0.5])


def test_a_state_dict_without_a_copy_is_noticed() -> None:
    # Report 40: the state dict of the model itself scores the same at every lambda.
    model, _ = _model()
    for tuned in (model.state_dict(), {n: p.detach() for n, p in model.named_parameters()}):
        with (
            pytest.raises(UsageError, match="model and tuned share the memory"),
            Mixture(tuned, (0.0, 0.5)).setters(model),
        ):
            pass
