"""A loop of accelerate does the steps of Equation 9 and of the averages, also resumed."""

from __future__ import annotations

import copy
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from openvclip import EMATracker, InterpolatedWeightRegularizer, SWATracker
from openvclip.errors import CheckpointError, StateMismatchError, UsageError
from openvclip.integrations.accelerate import RegularizedLoop
from openvclip.integrations.steps import require_whole_weights
from openvclip.weights.shards import full_state
from tests.helpers import assert_same_state, snapshot
from tests.integrations.by_hand import (
    BATCHES,
    CLIP_NORM,
    STEPS,
    adamw,
    assert_close,
    by_hand,
    loader,
    network,
    regularizer,
)

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _settings_of_its_own() -> Iterator[None]:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """The loop of accelerate's documentation, with the two calls of openvclip."""

    def __init__(
        self,
        accumulate: int = 1,
        every: int = 1,
        share: float = 1.0,
        dtype: Any = torch.float64,
        prepare: Any = None,
        **options: Any,
    ) -> None:
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, **options
        )
        model = network(dtype)
        self.model = self.accelerator.prepare(model) if prepare is None else prepare(model)
        self.optimizer, self.loader = self.accelerator.prepare(adamw(self.model), loader(dtype))
        self.loop = RegularizedLoop(
            self.accelerator,
            self.model,
            self.optimizer,
            regularizer=regularizer(model, every=every, share=share),
            averages=[SWATracker(model), EMATracker(model, decay=0.5)],
        )
        self.losses: list[float] = []

    def train(self, batches: int, first: int = 0) -> Run:
        """Train on some batches, from the batch with number ``first`` of an endless run on."""
        epochs = -(-(first + batches) // len(self.loader))
        numbered = enumerate(b for _ in range(epochs) for b in self.loader)
        for number, (x, y) in numbered:
            if not first <= number < first + batches:
                continue
            with self.accelerator.accumulate(self.model):
                loss = self.loop.backward(lambda x, y: cross_entropy(self.model(x), y), x, y)
                self.losses.append(loss.item())
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.loop.update()
        return self

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return snapshot(self.accelerator.unwrap_model(self.model))


@pytest.mark.parametrize(
    ("accumulate", "every", "share"),
    [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 0.5)],
)
def test_training_equals_a_loop_by_hand(accumulate: int, every: int, share: float) -> None:
    run = Run(accumulate, every, share).train(accumulate * STEPS)
    weights, mean = by_hand(accumulate, every, share)
    assert_close(run.weights, weights)
    swa = run.loop.averages[0]
    assert swa.n_averaged == STEPS
    assert_close(swa.averaged_state_dict(), mean)
    x, y = next(iter(loader()))
    assert run.losses[0] == pytest.approx(cross_entropy(network()(x), y).item())


def test_mixed_precision_equals_a_loop_with_autocast() -> None:
    run = Run(dtype=torch.float32, mixed_precision="bf16").train(STEPS)
    expected, _ = by_hand(
        dtype=torch.float32, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert_close(run.weights, expected)


def scaled(run: Run) -> Run:
    """Give the accelerator a GradScaler, which accelerate itself creates for GPUs only."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inner = run.optimizer.optimizer
    run.accelerator.scaler, run.accelerator.native_amp = scaler, True
    run.accelerator.state._mixed_precision = "fp16"
    run.optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    run.accelerator._optimizers = [run.optimizer]
    return run


def test_a_scaler_changes_nothing_and_its_skipped_steps_are_not_averaged() -> None:
    run = scaled(Run()).train(STEPS)
    assert_close(run.weights, by_hand()[0])
    before = run.weights
    with run.accelerator.accumulate(run.model):
        run.loop.backward(lambda: torch.inf * run.model(torch.ones(1, 4).double()).sum())
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.loop.update() is False
    assert_same_state(run.weights, before)
    assert run.loop.averages[0].n_averaged == STEPS
    run.train(1)
    assert run.loop.averages[0].n_averaged == STEPS + 1


@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (2, 1), (1, 2)])
def test_a_loaded_state_equals_a_run_that_was_never_stopped(
    tmp_path: Path, accumulate: int, every: int
) -> None:
    """The state is saved in the middle of an epoch, and the run is killed one batch later."""
    batches = accumulate * STEPS
    whole = Run(accumulate, every).train(batches)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    stopped = Run(accumulate, every).train(3 * accumulate)
    assert 3 * accumulate < BATCHES
    stopped.accelerator.save_state(str(tmp_path / "state"))
    stopped.train(1, first=3 * accumulate)  # lost
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    resumed = Run(accumulate, every)
    resumed.accelerator.load_state(str(tmp_path / "state"))
    resumed.train(batches - 3 * accumulate, first=3 * accumulate)
    assert_same_state(resumed.weights, whole.weights)
    for average, expected in zip(resumed.loop.averages, whole.loop.averages, strict=True):
        assert average.n_averaged == STEPS
        assert_same_state(average.averaged_state_dict(), expected.averaged_state_dict())


# --- wrong use ---------------------------------------------------------------------------------


def test_a_step_before_a_state_is_loaded_is_forgotten() -> None:
    run = Run(accumulate=2).train(2)
    state = copy.deepcopy(run.loop.state_dict())
    run.optimizer.optimizer.step()  # the loop ended before its update()
    run.loop.load_state_dict(state)
    run.train(2, first=2)
    assert run.loop.averages[0].n_averaged == 2


def test_states_of_other_objects_are_refused() -> None:
    run = Run()
    state = run.loop.state_dict()
    with pytest.raises(StateMismatchError, match="same order as in the saved run"):
        run.loop.load_state_dict({"step": 1})
    fewer = RegularizedLoop(run.accelerator, run.model, run.optimizer, averages=[])
    with pytest.raises(CheckpointError, match="2 averages; the RegularizedLoop has no regulariser"):
        fewer.load_state_dict(state)


def test_calls_that_are_left_out_are_told() -> None:
    run = Run()
    x, y = next(iter(run.loader))

    def closure() -> Any:
        return cross_entropy(run.model(x), y)

    run.accelerator.backward(closure())
    run.optimizer.step()
    with pytest.raises(UsageError, match=r"without a call of RegularizedLoop\.backward"):
        run.loop.update()
    run.loop.backward(closure)
    run.optimizer.step()
    with pytest.raises(UsageError, match=r"update\(\) was not called"):
        run.loop.backward(closure)


def test_models_and_optimizers_that_do_not_fit_are_refused() -> None:
    run, other = Run(), network()
    with pytest.raises(UsageError, match=r"none of the trained parameters .* is averaged"):
        RegularizedLoop(run.accelerator, other, run.optimizer, averages=[SWATracker(other)])
    with pytest.raises(UsageError, match=r"none of the trained parameters .* is regularised"):
        RegularizedLoop(run.accelerator, other, run.optimizer, regularizer=regularizer(other))
    lbfgs = torch.optim.LBFGS(run.model.parameters())
    with pytest.raises(UsageError, match="LBFGS evaluates a closure"):
        RegularizedLoop(run.accelerator, run.model, lbfgs, regularizer=regularizer(run.model))


def test_wrappers_without_whole_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("FullyShardedDataParallel", (nn.Sequential,), {})
    library = types.SimpleNamespace(FullyShardedDataParallel=kind)
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", library)
    with pytest.raises(UsageError, match=r"FSDP1.*fsdp_version=2 in accelerate"):
        require_whole_weights(nn.Sequential(kind(network())), deepspeed=False)
    with pytest.raises(UsageError, match="under DeepSpeed"):
        require_whole_weights(network(), deepspeed=True)


def test_an_average_of_another_part_is_refused() -> None:
    run = Run()
    with pytest.raises(StateMismatchError, match="does not fit the tracker"):
        RegularizedLoop(
            run.accelerator, run.model, run.optimizer, averages=[SWATracker(run.model[0])]
        )


def test_weights_that_are_thawed_later_are_told() -> None:
    run = Run()
    run.model[2].requires_grad_(False)
    iwr = InterpolatedWeightRegularizer(run.model)
    loop = RegularizedLoop(run.accelerator, run.model, run.optimizer, regularizer=iwr)
    run.model[2].requires_grad_(True)
    with pytest.raises(UsageError, match="require gradients now but were frozen"):
        loop.backward(lambda: run.model(torch.ones(1, 4).double()).sum())


# --- extra state, parts, two processes ---------------------------------------------------------


class Recorded(nn.Linear):
    """A layer with extra state, as the layers of Transformer Engine have it."""

    def get_extra_state(self) -> Any:
        return io.BytesIO(b"record")

    def set_extra_state(self, state: Any) -> None:
        assert state.getvalue() == b"record"


def test_a_part_of_the_prepared_model_with_extra_state_is_averaged(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    inner = Recorded(4, 3)
    wrapper = nn.Sequential(nn.Tanh(), inner)
    model, optimizer = accelerator.prepare(wrapper, torch.optim.SGD(inner.parameters(), 0.1))
    swa = SWATracker(inner)
    loop = RegularizedLoop(accelerator, model, optimizer, averages=[swa], averaged=inner)
    loop.backward(lambda: model(torch.ones(1, 4)).sum())
    optimizer.step()
    assert loop.update() is True
    assert_same_state({"w": swa.averaged_state_dict()["weight"]}, {"w": inner.weight.detach()})
    torch.save(loop.state_dict(), tmp_path / "state.pt")
    other = SWATracker(inner)
    again = RegularizedLoop(accelerator, model, optimizer, averages=[other], averaged=inner)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    assert other.averaged_state_dict()["_extra_state"].getvalue() == b"record"


def two_processes(folder: str) -> None:
    """Train on the same examples as one process with batches of twice the size."""
    run = Run().train(STEPS)
    assert run.accelerator.num_processes == 2
    run.accelerator.save_state(folder)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
    resumed = Run()
    resumed.accelerator.load_state(folder)
    for one in (run, resumed):
        one.train(1, first=STEPS)
    assert_same_state(resumed.weights, run.weights)
    # Each process has two of the four examples of a step, as two micro-batches of one process have.
    weights, mean = by_hand(accumulate=2, steps=STEPS + 1)
    assert_close(run.weights, weights)
    assert_close(resumed.loop.averages[0].averaged_state_dict(), mean)
    sharded(Path(folder))
    torch.distributed.barrier()
    (Path(folder) / f"{run.accelerator.process_index}.txt").touch()


def sharded(folder: Path) -> None:
    """The same under ``fully_shard``, which accelerate itself uses on GPUs only."""
    from torch.distributed.fsdp import fully_shard

    runs = []
    for state in (None, folder / "sharded.pt"):
        run = Run(prepare=lambda model: fully_shard(model, reshard_after_forward=True))
        if state is None:
            run.train(3)
            state_of_run = run.loop.state_dict()  # every process gathers it
            if run.accelerator.is_main_process:
                torch.save(state_of_run, folder / "sharded.pt")
            parts = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
            torch.distributed.barrier()
        else:
            run.model.load_state_dict(parts[0])
            run.optimizer.load_state_dict(parts[1])
            run.loop.load_state_dict(torch.load(state))
        runs.append(run.train(STEPS - 3, first=3))
    weights, mean = by_hand(accumulate=2)
    whole = [full_state(run.model.state_dict()) for run in runs]
    averages = [full_state(run.loop.averages[0].averaged_state_dict()) for run in runs]
    assert_close(whole[0], weights)
    assert_close(averages[0], mean)
    assert_same_state(whole[1], whole[0])
    assert_same_state(averages[1], averages[0])


def test_two_processes_train_on_the_mean_of_their_losses(tmp_path: Path) -> None:
    """The processes are forks of this one, so they import nothing again."""
    accelerate.debug_launcher(two_processes, (str(tmp_path),), num_processes=2)
    assert {"0.txt", "1.txt"} <= {path.name for path in tmp_path.iterdir()}
