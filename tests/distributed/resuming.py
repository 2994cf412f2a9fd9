"""Runs that resume from torch.distributed.checkpoint, in two processes.

``save`` and ``load`` are the code of docs/your-own-loop.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from openvclip import InterpolatedWeightRegularizer, SWATracker
from openvclip.weights import sums
from openvclip.weights.tracker import WeightTracker
from tests.distributed.sharded import TRACKERS, full, sharded
from tests.distributed.training import STEPS, Net, assert_close, check, loss_of, regulariser
from tests.helpers import assert_same_state


def save(
    folder: Path, model: nn.Module, iwr: InterpolatedWeightRegularizer, swa: WeightTracker
) -> None:
    weights, moments = get_state_dict(model, iwr.optimizer)  # type: ignore[arg-type]
    state = {"model": weights, "optimizer": moments}
    state |= {"iwr": iwr.state_dict(), "swa": swa.state_dict()}
    dcp.save(state, checkpoint_id=folder)


def load(
    folder: Path, model: nn.Module, iwr: InterpolatedWeightRegularizer, swa: WeightTracker
) -> None:
    weights, moments = get_state_dict(model, iwr.optimizer)  # type: ignore[arg-type]
    average = swa.state_dict()
    for key, entry in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if key.startswith("swa.") and isinstance(entry, dcp.TensorStorageMetadata):
            _, part, name = key.split(".", 2)
            average[part][name] = torch.empty_like(weights[name], dtype=entry.properties.dtype)
    state = {"model": weights, "optimizer": moments, "iwr": iwr.state_dict(), "swa": average}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        iwr.optimizer,  # type: ignore[arg-type]
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    iwr.load_state_dict(state["iwr"])
    swa.load_state_dict(state["swa"])


def go_on(
    model: nn.Module,
    iwr: InterpolatedWeightRegularizer,
    swa: WeightTracker,
    steps: Iterable[int],
    joint: bool = False,
) -> None:
    for step in steps:
        iwr.step(lambda step=step: loss_of(model, step, joint=joint))  # type: ignore[misc]
        swa.update(model)


def assert_same_average(resumed: WeightTracker, straight: WeightTracker) -> None:
    """Compare settings, counts and (bitwise) tensors. The tensors of both may be sharded."""
    state, expected = resumed.state_dict(), straight.state_dict()
    assert list(state) == list(expected)
    for key, entry in state.items():
        if isinstance(entry, dict) and key not in ("aliases", "scale"):
            assert_same_state(full(entry), full(expected[key]))
        else:
            assert entry == expected[key], key


@check
def fsdp_resumes_bitwise_from_a_distributed_checkpoint(out: Path) -> None:
    alphas: dict[str, Any] = {"interval": (0.0, 0.6)}
    late = partial(SWATracker, start=STEPS)  # empty when it is saved
    for number, make in enumerate((*TRACKERS, late)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sums, "_BLOCK", 2)  # so that the tracker has an earlier block
            folder, model, resumed = out / f"run-{number}", sharded(), sharded(3)
            for trained in (model, resumed):
                trained.head.bias.requires_grad_(False)  # not averaged, but sharded
            iwr, swa = regulariser(model, **alphas), make(model)
            go_on(model, iwr, swa, range(3))
            save(folder, model, iwr, swa)
            go_on(model, iwr, swa, range(3, 2 * STEPS))
            other_iwr, other_swa = regulariser(resumed, seed=9), make(resumed)
            load(folder, resumed, other_iwr, other_swa)
            go_on(resumed, other_iwr, other_swa, range(3, 2 * STEPS))
        assert_same_state(full(resumed.state_dict()), full(model.state_dict()))
        assert torch.equal(other_iwr.state_dict()["generator"], iwr.state_dict()["generator"])
        assert_same_average(other_swa, swa)


@check
def fsdp_goes_on_without_shards_from_a_distributed_checkpoint(out: Path) -> None:
    for number, make in enumerate(TRACKERS):
        folder, model, plain = out / f"whole-{number}", sharded(), Net(3)
        iwr, swa = regulariser(model), make(model)
        go_on(model, iwr, swa, range(3))
        save(folder, model, iwr, swa)
        plain_iwr, plain_swa = regulariser(plain, seed=9), make(plain)
        load(folder, plain, plain_iwr, plain_swa)
        assert_same_state(plain.state_dict(), full(model.state_dict()))
        assert_same_average(plain_swa, swa)
        go_on(model, iwr, swa, range(3, 5))
        go_on(plain, plain_iwr, plain_swa, range(3, 5), joint=True)
        assert_close(full(swa.averaged_state_dict()), plain_swa.averaged_state_dict())


@check
def fsdp_shared_weights_keep_both_names_in_a_distributed_checkpoint(out: Path) -> None:
    def tied(seed: int) -> nn.Module:
        model = Net(seed)
        model.again.weight = model.body[2].weight
        return fully_shard(model, ignored_params={model.temperature})

    folder, model, resumed = out / "tied", tied(0), tied(3)
    iwr, swa = regulariser(model), SWATracker(model)
    go_on(model, iwr, swa, range(2))
    save(folder, model, iwr, swa)
    other_swa = SWATracker(resumed)
    load(folder, resumed, regulariser(resumed), other_swa)
    average = full(other_swa.averaged_state_dict())
    assert_same_state(average, full(swa.averaged_state_dict()))
    assert {"again.weight", "body.2.weight"} <= average.keys()
