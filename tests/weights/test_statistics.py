"""update_statistics: running statistics made anew; the warnings of averages that need it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import openvclip
from openvclip import EMATracker, GaussianTracker, LAWATracker, SWATracker, update_statistics
from openvclip.errors import (
    NonFiniteWeightsError,
    OptimizerModeWarning,
    StatisticsWarning,
    UsageError,
)
from openvclip.weights.statistics import statistics_modules
from tests.helpers import Net, Smooth, assert_same_state, batch, cross_entropy, jump, snapshot


def batches(number: int = 4, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [batch(step, size) for step in range(number)]


def deep(dropout: float = 0.0) -> nn.Sequential:
    """Two batch norms, the second of which sees what the first one does."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.BatchNorm1d(6)
    )


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_statistics_are_those_of_update_bn(training: bool, momentum: float | None) -> None:
    # Reports 08 (davda54/sam#17) and 38.
    ours, theirs = deep().train(training), deep().train(training)
    for model in (ours, theirs):
        for layer in (model[1], model[4]):
            layer.momentum = momentum
            layer.running_mean.fill_(7)
    assert update_statistics(ours, batches()) == ["1", "4"]
    update_bn(batches(), theirs)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert modes(ours) == [training] * len(modes(ours))
    assert ours[1].momentum == momentum


def test_one_batch_gives_the_mean_and_variance_of_what_the_layer_sees() -> None:
    model = deep()
    (x, y) = batch(n=50)
    update_statistics(model, [(x, y)])
    hidden = model[0](x).detach()
    torch.testing.assert_close(model[1].running_mean, hidden.mean(dim=0))
    torch.testing.assert_close(model[1].running_var, hidden.var(dim=0))


def test_the_averaged_model_predicts_as_well_as_its_parts() -> None:
    """Report 38: without new statistics, the average of two models is off."""
    swa, model = SWATracker(Net()), Net()
    for seed in range(2):
        jump(model, seed)
        update_statistics(model, batches())
        swa.update(model)
    model.load_state_dict(swa.averaged_state_dict())
    update_statistics(model, batches())
    expected = Net()
    expected.load_state_dict(model.state_dict())
    update_bn(batches(), expected)
    assert_same_state(model.state_dict(), expected.state_dict())
    with swa.applied(model):
        update_statistics(model, batches())
        assert_same_state(model.state_dict(), expected.state_dict())


def test_dropout_is_off_and_random_numbers_stay() -> None:
    model, expected = deep(dropout=0.5), deep()
    before = torch.get_rng_state()
    update_statistics(model, batches())
    update_statistics(expected, batches())
    assert_same_state(model.state_dict(), expected.state_dict())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_frozen_layer_of_a_model_in_training_keeps_its_statistics() -> None:
    model = deep()
    model[1].eval()
    before, states = snapshot(model), modes(model)
    assert update_statistics(model, batches()) == ["4"]
    assert torch.equal(model[1].running_mean, before["1.running_mean"])  # type: ignore[arg-type]
    assert modes(model) == states
    model.eval()
    assert update_statistics(model, batches()) == ["1", "4"]


def test_a_model_that_freezes_its_layers_in_train() -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

    model = Frozen().train()
    assert update_statistics(model, batches()) == []
    assert update_statistics(model.eval(), batches()) == ["norm"]
    assert not model.norm.training


def test_a_layer_that_no_batch_reaches_keeps_its_statistics() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm1d(4), "unused": nn.BatchNorm1d(4)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    before = copy.deepcopy(model["unused"].state_dict())
    before["running_mean"].fill_(3)
    model["unused"].load_state_dict(before)
    assert update_statistics(model, batches()) == ["used"]
    assert_same_state(model["unused"].state_dict(), before)


def test_instance_norm_gathers_the_mean_of_its_batches() -> None:
    layer = nn.InstanceNorm1d(2, track_running_stats=True, momentum=0.3)
    inputs = [x.view(-1, 2, 2) for x, _ in batches()]
    assert update_statistics(layer, inputs) == [""]
    mean = torch.stack([x.mean(dim=(0, 2)) for x in inputs]).mean(dim=0)
    torch.testing.assert_close(layer.running_mean, mean)
    assert layer.momentum == 0.3


class Named(nn.Module):
    """Takes its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.norm(scale * x)


KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda x, y: x,
    "tuple": lambda x, y: (x, y, ["names"]),
    "list": lambda x, y: [x, y],
    "mapping": lambda x, y: {"x": x, "labels": y, "path": "a.mp4"},
    "mapping in a tuple": lambda x, y: ({"x": x}, y),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", [None, "parallel", "compiled"])
def test_batches_of_every_kind(kind: str, wrapped: str | None) -> None:
    model, expected = Named(), Named()
    called: Any = {
        None: model,
        "parallel": nn.DataParallel(model),
        "compiled": torch.compile(model, backend="eager"),
    }[wrapped]
    assert update_statistics(called, (KINDS[kind](*one) for one in batches())) == ["norm"]
    update_bn(batches(), expected)
    assert_same_state(model.state_dict(), expected.state_dict())


def test_batches_that_only_the_caller_understands(device: torch.device) -> None:
    model, expected = Named(), Named()
    with pytest.raises(UsageError, match="Give `forward`"):
        update_statistics(model, ["a", "b"])
    with pytest.raises(UsageError, match="Give `forward`"):
        update_statistics(model, [{"clip": batch()[0]}])
    loader = [{"clip": x, "nested": [x, (y,)]} for x, y in batches()]
    update_statistics(model, loader, forward=lambda one: model(one["clip"]), device=device)
    update_bn(batches(), expected)
    assert_same_state(model.state_dict(), expected.state_dict())


class Video(nn.Module):
    """A frame-by-frame classifier: ``[B, T, C, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, video: Tensor) -> Tensor:
        return self.norm(video.flatten(0, 1)).unflatten(0, video.shape[:2]).mean(dim=(1, 3, 4))


def test_batches_of_videos() -> None:
    model = Video()
    videos = [torch.randn(2, 5, 3, 4, 4) + step for step in range(3)]
    update_statistics(model, [(video, torch.zeros(2)) for video in videos])
    mean = torch.stack([video.mean(dim=(0, 1, 3, 4)) for video in videos]).mean(dim=0)
    torch.testing.assert_close(model.norm.running_mean, mean)


def _broken() -> Iterator[tuple[Tensor, Tensor]]:
    yield batch()
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("loader", "error"),
    [
        (list, UsageError),
        (_broken, ZeroDivisionError),
        (lambda: [batch(), (torch.full((6, 4), torch.nan), None)], NonFiniteWeightsError),
    ],
)
def test_after_an_error_statistics_and_modes_are_back(loader: Any, error: Any) -> None:
    model = deep()
    model(batch()[0])
    model[4].eval()
    before, states = snapshot(model), modes(model)
    with pytest.raises(error):
        update_statistics(model, loader())
    assert_same_state(model.state_dict(), before)
    assert modes(model) == states
    assert model[1].momentum == 0.1


@pytest.mark.parametrize(
    "model",
    [Smooth(), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))],
)
def test_a_model_without_statistics_reads_no_batch(model: nn.Module) -> None:
    assert update_statistics(model, _broken()) == []


# --- averages ----------------------------------------------------------------------------------

TRACKERS = [SWATracker, EMATracker, LAWATracker, partial(GaussianTracker, mu=2.0, sigma=1.0)]


@pytest.mark.parametrize("kind", TRACKERS)
@pytest.mark.parametrize("read", ["averaged_state_dict", "applied"])
def test_an_average_says_that_its_statistics_are_old(kind: Any, read: str) -> None:
    # Reports 08 (davda54/sam#17) and 38: 11.1 % for 19.9 %, without a word.
    model = Net()
    tracker = kind(model)

    def use() -> None:
        if read == "applied":
            with tracker.applied(model):
                pass
        else:
            tracker.averaged_state_dict()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.update(model)
        use()  # one model: its statistics are right
    jump(model, 0)
    tracker.update(model)
    with pytest.warns(StatisticsWarning, match=r"1 layers .*update_statistics\(model, loader\)"):
        use()


@pytest.mark.parametrize("model", [Smooth(), nn.Sequential(nn.BatchNorm1d(4)).eval()])
def test_an_average_without_moving_statistics_says_nothing(model: nn.Module) -> None:
    tracker = SWATracker(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            tracker.update(model)
        tracker.averaged_state_dict()


@pytest.mark.parametrize("kind", TRACKERS)
def test_training_weights_of_a_schedule_free_optimizer_are_noticed(kind: Any) -> None:
    # Report 34: the average is one of training weights.
    model, other = Smooth(), Smooth()
    schedulefree = pytest.importorskip("schedulefree")
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    tracker, unrelated = kind(model), kind(other)
    expected = []
    for step in range(3):
        optimizer.zero_grad()
        cross_entropy(model, step).backward()
        optimizer.step()
        with pytest.warns(OptimizerModeWarning, match=r"AdamWScheduleFree .*optimizer.eval\(\)"):
            kind(model).update(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            unrelated.update(other)
            optimizer.eval()
            tracker.update(model)
            expected.append(snapshot(model))
            optimizer.train()
    if kind is SWATracker:
        for name, value in tracker.averaged_state_dict().items():
            mean = torch.stack([weights[name] for weights in expected]).mean(dim=0)
            torch.testing.assert_close(value, mean)


def test_an_optimizer_without_parameters_steps_beside_a_tracker() -> None:
    SWATracker(Smooth())  # looks at each optimizer of the process
    optimizer = torch.optim.SGD(Smooth().parameters(), lr=0.1)
    optimizer.param_groups.clear()
    optimizer.step()


def test_the_public_name() -> None:
    assert openvclip.update_statistics is update_statistics
    assert list(statistics_modules(nn.DataParallel(deep()))) == ["1", "4"]
