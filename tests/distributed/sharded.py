"""Regulariser and averages of a model under fully_shard (FSDP2), in two processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from openvclip import (
    EMATracker,
    GaussianTracker,
    InterpolatedWeightRegularizer,
    L2ToAnchor,
    LAWATracker,
    SWATracker,
    interpolate,
    save_checkpoint,
)
from openvclip.checkpoints import load_checkpoint
from openvclip.errors import CheckpointError, NonFiniteWeightsError, UsageError
from openvclip.weights.shards import full_state, local
from openvclip.weights.tracker import WeightTracker
from tests.distributed.training import (
    ALPHA,
    STEPS,
    WORLD,
    Net,
    assert_close,
    batch,
    check,
    loss_of,
    mean,
    regulariser,
    skips_where_one_overflows,
    snapshot,
    train,
    trained_by_hand,
)

DECAY, LATEST, MU, SIGMA = 0.7, 2, 5.0, 0.5
TRACKERS = (
    SWATracker,
    partial(EMATracker, decay=DECAY),
    partial(LAWATracker, k=LATEST),
    partial(GaussianTracker, mu=MU, sigma=SIGMA),  # later models weigh much more: sums are rescaled
)


def sharded(seed: int = 0, **settings: Any) -> Net:
    model = Net(seed)
    fully_shard(model.body, **settings)
    fully_shard(model.again, **settings)
    return fully_shard(model, ignored_params={model.temperature}, **settings)


def local_size(model: nn.Module) -> int:
    return sum(local(p).numel() for p in model.parameters() if p.requires_grad)


def full(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return full_state(state)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def ema(path: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    average = path[0]
    for weights in path[1:]:
        average = {n: DECAY * value + (1 - DECAY) * weights[n] for n, value in average.items()}
    return average


def gaussian(path: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    weights = [math.exp(-((t - MU) ** 2) / (2 * SIGMA**2)) for t in range(1, len(path) + 1)]
    return {
        n: sum(w * state[n] for w, state in zip(weights, path, strict=True)) / sum(weights)  # type: ignore[misc]
        for n in path[0]
    }


@check
def the_l2_penalty_of_shards_is_that_of_the_whole_model(out: Path) -> None:
    plain, model, anchor = Net(0), sharded(), snapshot(Net(1))
    expected, penalty = L2ToAnchor(plain, anchor, weight=0.3), L2ToAnchor(model, anchor, weight=0.3)
    torch.testing.assert_close(penalty.loss(), expected.loss())
    expected.loss().backward()
    penalty.loss().backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert_close(full(gradients(model)), wanted)
    penalty.add_gradients()
    assert_close(full(gradients(model)), {n: 2 * value for n, value in wanted.items()})


@check
def the_l2_penalty_counts_replicas_once(out: Path) -> None:
    """Hybrid sharding: each process holds a whole replica here."""
    replicas = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    plain, model, anchor = Net(0), sharded(mesh=replicas), snapshot(Net(1))
    penalty, expected = L2ToAnchor(model, anchor, weight=0.3), L2ToAnchor(plain, anchor, weight=0.3)
    torch.testing.assert_close(penalty.loss(), expected.loss())


@check
def fsdp_training_equals_one_process(out: Path) -> None:
    reference, path = trained_by_hand(every=2)
    expected = (mean(path), ema(path), mean(path[-LATEST:]), gaussian(path))
    for settings in ({}, {"anchor_device": "cpu"}):
        model = sharded()
        iwr, trackers = regulariser(model, every=2, **settings), [make(model) for make in TRACKERS]
        for step in range(STEPS):
            iwr.step(lambda m=model, step=step: loss_of(m, step))  # type: ignore[misc]
            for tracker in trackers:
                assert tracker.update(model)
        assert_close(full(model.state_dict()), reference.state_dict())
        for tracker, average in zip(trackers, expected, strict=True):
            assert_close(full(tracker.averaged_state_dict()), average)


@check
def fsdp_gradients_that_are_reduced_once_equal_one_process(out: Path) -> None:
    """``set_requires_gradient_sync`` in a custom loop, as in docs/your-own-loop.md."""
    model = sharded()
    iwr = regulariser(model)
    assert iwr.optimizer is not None
    for step in range(STEPS):
        iwr.optimizer.zero_grad()
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        with iwr.interpolated():
            (iwr.weight * loss_of(model, step)).backward()
        assert gradients(model) == {}  # no gradient was reduced yet
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
        loss_of(model, step).backward()
        iwr.optimizer.step()
    reference = trained_by_hand()[0]
    assert_close(full(model.state_dict()), reference.state_dict())
    assert_close(full(gradients(model)), gradients(reference))


@check
def fsdp_clipping_equals_one_process(out: Path) -> None:
    model = sharded()
    train(regulariser(model), model, max_grad_norm=0.05)
    assert_close(full(model.state_dict()), trained_by_hand(max_norm=0.05)[0].state_dict())


@check
def fsdp_overflow_in_one_process_skips_the_step_in_both(out: Path) -> None:
    skips_where_one_overflows(sharded())


@check
def fsdp_keeps_shards_and_communicates_nothing_of_its_own(out: Path) -> None:
    for make in TRACKERS:
        for settings, copies in (({}, 1), ({"anchor_device": "cpu"}, 2)):  # the stash is kept too
            model = sharded()
            iwr, tracker = used_without_communication(model, make, settings)
            tensors = [*iwr._weights.anchor.values(), *iwr._weights.stash.values()]
            size = sum(value.untyped_storage().nbytes() for value in tensors)
            assert size == copies * 8 * local_size(model)
            assert_holds_shards(tracker, model)


def used_without_communication(
    model: Net, make: Callable[[nn.Module], WeightTracker], settings: dict[str, Any]
) -> tuple[InterpolatedWeightRegularizer, WeightTracker]:
    with CommDebugMode() as made:
        iwr, tracker = regulariser(model, **settings), make(model)
    counts = {str(op): n for op, n in made.get_comm_counts().items()}
    assert [op for op in counts if "reduce" not in op] == []  # for the fingerprint
    with iwr.interpolated():
        pass  # the first block compares the settings of the processes
    with CommDebugMode() as used:
        with iwr.interpolated():
            pass
        iwr.state_dict()
        tracker.update(model)
        tracker.update(model)
        with tracker.applied(model):
            pass
        tracker.averaged_state_dict()
        tracker.state_dict()
    assert {str(op) for op in used.get_comm_counts()} <= {
        "c10d.allreduce_"
    }  # for the check of finite values
    with CommDebugMode() as seen:
        full(model.state_dict())
    assert seen.get_total_counts() > 0  # so CommDebugMode counts such operations
    return iwr, tracker


def assert_holds_shards(tracker: WeightTracker, model: nn.Module) -> None:
    parts = [part for part in tracker._tensors().values() if part]
    assert len(parts) == (LATEST if isinstance(tracker, LAWATracker) else 1)
    for part in parts:
        assert all(isinstance(value, DTensor) for value in part.values())
        size = sum(local(value).untyped_storage().nbytes() for value in part.values())
        assert size == 8 * local_size(model)
    average = tracker.averaged_state_dict()
    assert average.pop("temperature").ndim == 0  # not sharded, as in the model
    assert all(isinstance(value, DTensor) for value in average.values())
    assert sum(local(value).numel() for value in average.values()) == local_size(model)


@check
def fsdp_block_holds_the_interpolated_weights_whatever_stays_gathered(out: Path) -> None:
    """Gathered copies stay after a forward pass alone, and without resharding after backward."""
    plain, other = Net(0), Net(1)
    mixed = Net(2)
    theta, anchor = snapshot(plain), snapshot(other)
    mixed.load_state_dict({n: ALPHA * anchor[n] + (1 - ALPHA) * theta[n] for n in theta})
    x = batch(0)[0]
    for settings in ({}, {"reshard_after_forward": False}):
        model = sharded(**settings)
        model.set_reshard_after_backward(False)  # type: ignore[operator]
        iwr, swa = regulariser(model), SWATracker(model)
        before = [local(p).clone() for p in iwr.optimizer.param_groups[0]["params"]]  # type: ignore[union-attr]
        for with_backward in (False, True):
            with torch.set_grad_enabled(with_backward):
                here = model(x)
            if with_backward:
                here.sum().backward()
            with torch.no_grad():
                with iwr.interpolated():
                    torch.testing.assert_close(model(x), mixed(x), rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
                swa.update(model)
                with swa.applied(model):
                    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
        assert_close(full(swa.averaged_state_dict()), theta)
        with iwr.interpolated():
            pass
        after = [local(p) for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@check
def fsdp_restores_shards_whose_memory_the_first_forward_pass_replaces(out: Path) -> None:
    """PyTorch 2.7 and 2.8 replace the memory of uneven shards. Here every shard moves."""
    x, theta = batch(0)[0], Net(0)(batch(0)[0])
    for use in (regularised_with, averaged_with):
        model = sharded()
        with use(model):
            for parameter in model.parameters():
                if isinstance(parameter, DTensor):
                    parameter._local_tensor = parameter._local_tensor.clone()
            assert not torch.allclose(model(x), theta)  # the first forward pass
        assert_close(full(model.state_dict()), snapshot(Net(0)))
        torch.testing.assert_close(model(x), theta, rtol=1e-12, atol=1e-12)


def regularised_with(model: Net) -> AbstractContextManager[Any]:
    return regulariser(model).interpolated()


def averaged_with(model: Net) -> AbstractContextManager[Any]:
    swa = SWATracker(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
        swa.update(model)
        for parameter in model.parameters():
            parameter.div_(3.0)
    return swa.applied(model)


@check
def fsdp_around_a_module_that_holds_the_model(out: Path) -> None:
    x, inner = batch(0)[0], Net(0)
    outer = fully_shard(nn.Sequential(inner), ignored_params={inner.temperature})
    iwr = regulariser(outer, inner, wrapper=outer)
    with torch.no_grad():
        before = outer(x)  # the outermost module keeps its gathered weights
        with iwr.interpolated():
            assert not torch.equal(outer(x), before)
        assert torch.equal(outer(x), before)
    train(iwr, outer)
    assert_close(full(inner.state_dict()), trained_by_hand()[0].state_dict())


@check
def fsdp_average_in_use_is_not_the_gathered_weights(out: Path) -> None:
    x = batch(0)[0]
    model, swa_of = sharded(reshard_after_forward=False), Net(0)
    swa = SWATracker(model)
    swa.update(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
        thrice = model(x)
        with swa.applied(model):
            torch.testing.assert_close(model(x), swa_of(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(model(x), thrice)


@check
def fsdp_weights_that_one_process_finds_broken_enter_no_average(out: Path) -> None:
    model = sharded()
    swa = SWATracker(model)
    assert swa.update(model)
    if distributed.get_rank() == 1:
        with torch.no_grad():
            local(model.head.weight)[0, 0] = torch.nan
    with pytest.raises(NonFiniteWeightsError, match=r"1 entries \(head.weight\)"):
        swa.update(model)
    assert swa.n_averaged == 1
    assert_close(full(swa.averaged_state_dict()), snapshot(Net(0)))


@check
def fsdp_anchors_of_every_kind(out: Path) -> None:
    wanted = snapshot(Net(1))
    model = sharded()
    same = sharded(1)
    rows = {n: v.float() for n, v in wanted.items()}
    for anchor, theta in (
        (wanted, wanted),
        (same.state_dict(), wanted),
        (rows, rows),
        (None, snapshot(Net(0))),
        (model.state_dict(), snapshot(Net(0))),
    ):
        iwr = InterpolatedWeightRegularizer(model, anchor=anchor, interval=(1.0, 1.0))
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.5)
        with iwr.interpolated():
            assert_close(full(model.state_dict()), {n: v.double() for n, v in theta.items()})
        with torch.no_grad():
            for parameter in trained:
                parameter.sub_(0.5)


@check
def fsdp_state_is_that_of_one_process(out: Path) -> None:
    model, plain = sharded(), Net(0)
    iwr, alone = regulariser(model, seed=4), regulariser(plain, seed=4)
    train(iwr, model, 2)
    state = iwr.state_dict()
    assert state["anchor_fingerprint"] == alone.state_dict()["anchor_fingerprint"]
    other = regulariser(plain, anchor=snapshot(Net(2))).state_dict()["anchor_fingerprint"]
    assert state["anchor_fingerprint"] != other
    alone.load_state_dict(state)


@check
def a_model_sharded_too_late_is_refused(out: Path) -> None:
    model = Net(0)
    iwr = InterpolatedWeightRegularizer(model)
    fully_shard(model.body)
    with pytest.raises(UsageError, match=r"after fully_shard\(\)"), iwr.interpolated():
        pass


@check
def fsdp_saves_whole_tensors_once(out: Path) -> None:
    model, plain = sharded(), snapshot(Net(0))
    swa = SWATracker(model)
    swa.update(model)
    file = out / "average.safetensors"
    save_checkpoint(swa.averaged_state_dict(), file, metadata={"a": "b"})
    assert_close(load_checkpoint(file), plain)  # each process can read the file
    theta = interpolate(snapshot(Net(1)), full(swa.averaged_state_dict()), 0.5)
    save_checkpoint(theta, out / f"{distributed.get_rank()}.safetensors")
    distributed.barrier()
    assert len(list(out.glob("*.safetensors"))) == 1 + WORLD
    assert list(out.glob(".*")) == []
    blocked = out / "folder" / "file"
    blocked.parent.touch()
    with pytest.raises(CheckpointError, match="Could not write"):
        save_checkpoint(model.state_dict(), blocked)


@check
def fsdp_optimizer_in_the_backward_pass_is_refused(out: Path) -> None:
    # Report 06 (pytorch#124523).
    for foreach in (False, True):
        model = sharded()
        before = full(model.state_dict())
        own = {p: torch.optim.AdamW([p], lr=0.1, foreach=foreach) for p in model.parameters()}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: own[p].step())  # noqa: B023
        iwr = regulariser(model)
        with pytest.raises(UsageError, match="changed inside interpolated"), iwr.interpolated():
            loss_of(model, 0).backward()
        assert_close(full(model.state_dict()), before)


@check
def fsdp_gradients_of_the_loop_are_not_cleared(out: Path) -> None:
    # Report 07 (accelerate#1299).
    model = sharded()
    iwr = regulariser(model)
    for step in range(2):
        iwr.step(lambda step=step: loss_of(model, step))  # type: ignore[misc]
    loss_of(model, 2).backward()
    with pytest.raises(UsageError, match="has not used"):
        iwr.step(lambda: loss_of(model, 3))
    model.zero_grad()
    iwr.step(lambda: loss_of(model, 3))
