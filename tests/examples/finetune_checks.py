"""What two processes train together; ``tests/examples/test_finetune_distributed.py`` starts them.

The reference is the algorithm written out, on the joint batch of both, in one process.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from examples.finetune import train
from openvclip.errors import CheckpointError
from openvclip.processes import Processes
from openvclip.training.checkpoints import Checkpoints, load_whole
from openvclip.training.methods import make_classifier
from openvclip.training.outputs import final_weights
from openvclip.training.processes import give_scalars_an_axis
from openvclip.training.recipe import Recipe, Run
from openvclip.weights.shards import full_state, is_sharded
from tests.examples.finetune_reference import (
    TINY,
    assert_close,
    batches,
    classifier_of,
    trained_by_hand,
)
from tests.training.regulariser_models import NAMES, expanded, words

JOINT = batches(2, 4)


def joint() -> list[tuple[Tensor, Tensor]]:
    """The joint batches, in PyTorch's default dtype."""
    return [(video.to(torch.get_default_dtype()), label) for video, label in JOINT]


class Loader:
    """This process's part of the joint batches, in two micro-batches; begins anywhere."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self.first = processes, 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        self.first = first_step

    def __iter__(self) -> Any:
        for video, label in joint()[self.first :]:
            share = slice(self.processes.rank, None, self.processes.world_size)
            parts = zip(video[share].chunk(2), label[share].chunk(2), strict=True)
            yield from ((*part, ["a video"] * len(part[1])) for part in parts)


def trained(
    processes: Processes, recipe: Recipe, run: Run, checkpoints: Checkpoints | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    classifier = classifier_of(recipe.method)
    if run.fsdp:
        give_scalars_an_axis(classifier.model)
    clip, swa = train(
        classifier,
        Loader(processes),
        2,
        recipe,
        run=run,
        processes=processes,
        checkpoints=checkpoints,
    )
    assert any(map(is_sharded, classifier.model.parameters())) == run.fsdp
    average = full_state(swa.averaged_state_dict()) if swa is not None else {}
    if swa is not None:
        final = final_weights(classifier.model, clip, swa, 0.25)
        expected = {n: 0.25 * clip[n].double() + 0.75 * average[n].double() for n in clip}
        assert_close(final, expected)
    last = {n: v.detach().clone() for n, v in full_state(classifier.model.state_dict()).items()}
    load_whole(classifier.model, clip)
    assert_close(full_state(classifier.model.state_dict()), clip)
    return last, average


@cache
def reference(
    method: str, every: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same training by hand, once for the checks that compare with it."""
    assert dtype == torch.get_default_dtype()
    return trained_by_hand(replace(TINY, method=method), joint(), every=every)


def compare(processes: Processes, method: str, run: Run) -> None:
    last, average = trained(processes, replace(TINY, method=method), run)
    if run.amp is not None:
        assert all(bool(value.isfinite().all()) for value in last.values())
        return
    expected, mean = reference(method, run.every, torch.get_default_dtype())
    assert_close(last, expected, method)
    if average:
        assert_close(average, mean, method)


def compare_in_float64(processes: Processes, method: str, run: Run) -> None:
    """Compare without the rounding that AdamW's first steps enlarge.

    In float32, the rounding of an attention decides whether the two results are close.
    """
    torch.set_default_dtype(torch.float64)
    try:
        compare(processes, method, run)
    finally:
        torch.set_default_dtype(torch.float32)


def regularise(processes: Processes, run: Run) -> None:
    """Distillation, random texts, IWR and both towers: as in one process on the joint batches."""
    torch.set_default_dtype(torch.float64)
    try:
        states = []
        for each in (processes, Processes()):
            learner = make_classifier(expanded(), words, NAMES, "openvclip", text_tower=True)
            recipe = replace(TINY, text_tower=True, distill=2.0, text_energy=0.05)
            train(learner, Loader(each), 2, recipe, run=run, processes=each, tokenizer=words)
            states.append({n: v.detach().clone() for n, v in learner.model.state_dict().items()})
        assert_close(*states, "vifi")
    finally:
        torch.set_default_dtype(torch.float32)


def resume(processes: Processes, out: Path, run: Run) -> None:
    """Stopped after step 3 and gone on with, in two processes and then in one."""
    folder = out / f"resume-{run.fsdp}"
    checkpoints = Checkpoints(folder, {"lr": 1}, every=3, processes=processes)
    last, average = trained(processes, TINY, run, checkpoints)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-00000003.pt",
        "checkpoint-00000006.pt",
    ]
    processes.wait()
    if processes.is_first:
        (folder / "checkpoint-00000006.pt").unlink()
    processes.wait()
    again = Checkpoints(folder, {"lr": 1}, every=10, processes=processes)
    assert again.last_step == 3
    processes.wait()
    for state, expected in zip(trained(processes, TINY, run, again), (last, average), strict=True):
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    if processes.is_first and not run.fsdp:
        (folder / "checkpoint-00000006.pt").unlink()
        alone = trained(Processes(), TINY, run, Checkpoints(folder, {"lr": 1}, every=10))
        assert_close(alone[0], last)
        assert_close(alone[1], average)
    processes.wait()


def refuse(processes: Processes, out: Path) -> None:
    """Faults of one process are errors of both, with one text."""
    if processes.is_first:
        (out / "a file").touch()
    processes.wait()
    checkpoints = Checkpoints(out / "a file" / "folder", {}, every=3, processes=processes)
    with pytest.raises(CheckpointError, match=r"00000003\.pt can't be written"):
        trained(processes, TINY, Run(accumulate=2), checkpoints)
    if processes.rank == 1:
        JOINT[1][0][1, 0, 0, 0, 0] = float("nan")  # in the part of process 1
    with pytest.raises(FloatingPointError, match=r"at step 2.* Its videos: a video\b"):
        trained(processes, TINY, Run(accumulate=2))


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    processes, out = (
        Processes(distributed.get_rank(), distributed.get_world_size()),
        Path(arguments[0]),
    )
    results = {}
    plain, sharded = Run(accumulate=2), Run(accumulate=2, fsdp=True)
    checks: dict[str, Any] = {
        "data parallel": lambda: compare(processes, "openvclip", plain),
        "data parallel, every=2": lambda: compare(processes, "iwr", replace(plain, every=2)),
        "data parallel, l2": lambda: compare(processes, "l2", plain),
        "data parallel, regularised": lambda: regularise(processes, plain),
        "data parallel, vifi": lambda: compare(processes, "vifi", plain),
        "data parallel, bridge": lambda: compare(processes, "bridge", plain),
        "data parallel, vita": lambda: compare_in_float64(processes, "vita", plain),
        "sharded": lambda: compare(processes, "openvclip", sharded),
        "sharded, l2": lambda: compare(processes, "l2", sharded),
        "sharded, vifi": lambda: compare(processes, "vifi", sharded),
        "sharded, vifi-image": lambda: compare(processes, "vifi-image", sharded),
        "sharded, float16": lambda: compare(processes, "swa", replace(sharded, amp=torch.float16)),
        "sharded, recomputed": lambda: compare(
            processes, "openvclip", replace(sharded, checkpointing=True)
        ),
        "resumed": lambda: resume(processes, out, plain),
        "resumed, sharded": lambda: resume(processes, out, sharded),
        "refused": lambda: refuse(processes, out),
    }
    for name, check in checks.items():
        try:
            check()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc(limit=-8, chain=False)
        (out / f"{processes.rank}.json").write_text(json.dumps(results))
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
