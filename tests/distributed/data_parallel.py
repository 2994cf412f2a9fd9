"""Regulariser and averages under DistributedDataParallel, in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from openvclip import InterpolatedWeightRegularizer, SWATracker
from openvclip.errors import UsageError
from tests.distributed.training import (
    STEPS,
    C,
    Net,
    assert_close,
    batch,
    by_hand,
    check,
    gathered,
    loss_of,
    mean,
    regulariser,
    skips_where_one_overflows,
    snapshot,
    train,
    trained_by_hand,
)


def data_parallel(model: nn.Module, **settings: Any) -> tuple[nn.Module, list[int]]:
    """Return the wrapped model, and a list with one item for each all-reduce of gradients."""
    wrapped = DistributedDataParallel(model, **settings)
    calls: list[int] = []

    def counting(group, bucket):  # type: ignore[no-untyped-def]  # the wrapper reads annotations
        calls.append(bucket.index())
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(distributed.group.WORLD, counting)
    return wrapped, calls


@check
def ddp_gradients_equal_one_process_on_the_joint_batch(out: Path) -> None:
    model, calls = data_parallel(Net(0))
    reference, anchor = Net(0), snapshot(Net(1))
    iwr = InterpolatedWeightRegularizer(
        model, torch.optim.SGD(model.parameters(), 0.0), anchor=anchor, weight=C, seed=5
    )
    probe = InterpolatedWeightRegularizer(Net(0), seed=5)
    for step in range(3):
        with probe.interpolated() as alpha:
            by_hand(reference, anchor, alpha, step)
        iwr.step(lambda step=step: loss_of(model, step))  # type: ignore[misc]
        assert_close(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
            {n: p.grad for n, p in reference.named_parameters() if p.grad is not None},
        )
    assert len(calls) == 3


@check
def ddp_reduces_both_passes_at_once_with_every_setting_of_the_wrapper(out: Path) -> None:
    expected = trained_by_hand(every=2)[0].state_dict()
    for setting, reductions in (
        ("gradient_as_bucket_view", STEPS),
        ("find_unused_parameters", STEPS),
        ("static_graph", STEPS + STEPS // 2),  # each pass is reduced separately
    ):
        model, calls = data_parallel(Net(0), **{setting: True})
        train(regulariser(model, every=2), model)
        assert_close(model.state_dict(), expected)
        assert len(calls) == reductions, setting


@check
def ddp_around_a_module_that_holds_the_model(out: Path) -> None:
    expected = trained_by_hand()[0].state_dict()
    for with_wrapper, reductions in ((True, STEPS), (False, 2 * STEPS)):
        inner = Net(0)
        model, calls = data_parallel(nn.Sequential(inner))
        train(regulariser(model, inner, wrapper=model if with_wrapper else None), model)
        assert_close(inner.state_dict(), expected)
        assert len(calls) == reductions


@check
def ddp_accumulation_in_a_loop_of_its_own(out: Path) -> None:
    expected = trained_by_hand()[0].state_dict()
    model, calls = data_parallel(Net(0))
    iwr = regulariser(model)
    assert iwr.optimizer is not None
    for step in range(STEPS):
        x, y = batch(step, distributed.get_rank())
        micro = list(zip(x.chunk(3), y.chunk(3), strict=True))
        iwr.optimizer.zero_grad()
        with model.no_sync():
            for some, labels in micro:
                (functional.cross_entropy(model(some), labels) / 3).backward()
        with iwr.interpolated():
            with model.no_sync():
                for some, labels in micro[:-1]:
                    (C * functional.cross_entropy(model(some), labels) / 3).backward()
            some, labels = micro[-1]
            (C * functional.cross_entropy(model(some), labels) / 3).backward()
        iwr.optimizer.step()
    assert_close(model.state_dict(), expected)
    assert len(calls) == STEPS


@check
def ddp_takes_a_part_of_the_batch_of_each_process(out: Path) -> None:
    """Also of batches of different sizes: the mean over the processes is that of their means."""
    rank = distributed.get_rank()
    model, calls = data_parallel(Net(0))
    reference, anchor = Net(0), snapshot(Net(1))
    iwr = InterpolatedWeightRegularizer(
        model, torch.optim.SGD(model.parameters(), 0.0), anchor=anchor, weight=C, share=0.5, seed=5
    )
    probe = InterpolatedWeightRegularizer(Net(0), share=0.5, seed=5)
    for step, sizes in enumerate([(6, 6), (6, 3), (6, 6)]):
        batches = [tuple(t[:size] for t in batch(step, r)) for r, size in enumerate(sizes)]
        with probe.interpolated() as alpha:
            pass
        (chosen,) = probe.part_of(range(6))
        if sizes[1] == 6:
            seconds = [tuple(t[chosen] for t in some) for some in batches]
            reference.zero_grad()
            other = Net(0)
            other.load_state_dict(
                {n: torch.lerp(p, anchor[n], alpha) for n, p in snapshot(reference).items()}
            )
            for some, second in zip(batches, seconds, strict=True):
                (functional.cross_entropy(reference(some[0]), some[1]) / 2).backward()
                (C / 2 * functional.cross_entropy(other(second[0]), second[1])).backward()
            for parameter, more in zip(reference.parameters(), other.parameters(), strict=True):
                if parameter.grad is not None:
                    parameter.grad += more.grad
        iwr.step(lambda x, y: functional.cross_entropy(model(x), y), *batches[rank])
        if sizes[1] == 6:
            assert_close(
                {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
                {n: p.grad for n, p in reference.named_parameters() if p.grad is not None},
            )
    assert len(calls) == 3


@check
def ddp_average(out: Path) -> None:
    model, _ = data_parallel(Net(0))
    iwr, swa = regulariser(model), SWATracker(model)
    for step in range(STEPS):
        iwr.step(lambda step=step: loss_of(model, step))  # type: ignore[misc]
        assert swa.update(model)
    average = mean(trained_by_hand()[1])
    assert_close(swa.averaged_state_dict(), average)
    before = snapshot(model)
    with swa.applied(model):
        assert_close(model.state_dict(), average)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@check
def ddp_overflow_in_one_process_skips_the_step_in_both(out: Path) -> None:
    model, _ = data_parallel(Net(0))
    skips_where_one_overflows(model)


@check
def every_process_draws_the_same_alphas(out: Path) -> None:
    model, _ = data_parallel(Net(0))
    torch.manual_seed(distributed.get_rank())  # the global random states differ
    iwr = InterpolatedWeightRegularizer(model, seed=3)
    alphas = []
    for _ in range(5):
        with iwr.interpolated() as alpha:
            alphas.append(alpha)
    first, second = gathered(alphas)
    assert first == second
    assert len(set(first)) == 5


@check
def processes_that_differ_are_told_so(out: Path) -> None:
    rank = distributed.get_rank()
    saved = regulariser(Net(0)).state_dict()
    for settings, text in (
        ({"seed": rank}, "alpha's generator"),
        ({"weight": float(rank)}, "settings"),
        ({"share": 1 - rank / 2}, "settings"),
        ({"anchor": snapshot(Net(rank))}, "the anchor"),
        ({"seed": rank, "every": rank + 1}, "alpha's generator and settings"),
    ):
        model = DistributedDataParallel(Net(0))
        with pytest.raises(UsageError, match=f"differ in {text}"):
            train(regulariser(model, **settings), model, 1)  # type: ignore[arg-type]
    model = DistributedDataParallel(Net(0))
    iwr = regulariser(model)
    if rank == 0:
        iwr.load_state_dict(saved | {"steps": 2})
    with pytest.raises(UsageError, match="load its state in all or none"), iwr.interpolated():
        pass


@check
def ddp_buffers_are_those_of_plain_training(out: Path) -> None:
    # Report 08 (davda54/sam#17): the wrapper sends the buffers of the first process before a pass.
    models = []
    for regularised in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        iwr = InterpolatedWeightRegularizer(
            wrapped,
            optimizer,
            anchor={name: 3 * p.detach() for name, p in model.named_parameters()},
            weight=C if regularised else 0.0,
        )
        for step in range(3):
            iwr.step(lambda step=step: loss_of(wrapped, step))  # type: ignore[misc]  # noqa: B023
        models.append(model)
    for one, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(one, other)
