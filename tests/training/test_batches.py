"""Batches of video files: the same steps for any number of processes and workers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openvclip.errors import UsageError
from openvclip.processes import Processes
from openvclip.training.batches import (
    Batching,
    VideoBatches,
    class_warnings,
    steps_of_run,
    videos_of_step,
)
from openvclip.video import VideoDataset


def test_a_run_that_ended_within_an_epoch_has_no_more_steps() -> None:
    loader = [("video", "label")] * 3
    assert [step for step, _ in steps_of_run(loader, 3, 1, 3, 7)] == [3, 4, 5, 6]
    assert list(steps_of_run(loader, 3, 1, 7, 7)) == []
    assert list(steps_of_run(loader, 3, 1, 9, 9)) == []


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.data())
def test_the_chosen_videos_of_a_step_fill_few_micro_batches(
    sizes: list[int], data: st.DataObject
) -> None:
    videos = torch.arange(sum(sizes))
    batches = [(part, part.tolist()) for part in videos.split(sizes)]
    chosen = sorted(data.draw(st.sets(st.integers(0, len(videos) - 1), min_size=1)))
    parts = videos_of_step(batches, chosen, torch.device("cpu"))
    assert torch.cat([part[0] for part in parts]).tolist() == chosen
    assert [video for part in parts for video in part[1]] == chosen
    if len(chosen) < len(videos):
        found = [len(part[0]) for part in parts]
        assert max(found) - min(found) <= 1
        assert len(found) == -(-len(chosen) // max(sizes))
    else:
        assert parts == batches


def test_class_warnings() -> None:
    names = ["Baby Crawling", "archery", "yoga"]
    assert class_warnings([0, 2, 0], names) == ["1 of 3 classes have no videos: archery."]
    (text,) = class_warnings([0, 1, 2], names, ["baby_crawling", "juggling", "Yoga"])
    assert text.startswith("2 of 3 zero-shot classes are trained on")
    assert text.endswith("baby_crawling, Yoga.")
    assert class_warnings([0, 1, 2], names, ["juggling"]) == []


def _files(
    processes: Processes, micro_batch: int, epoch: int = 0, first: int = 0
) -> list[list[int]]:
    dataset = VideoDataset([(f"{i}.mp4", i) for i in range(50)], transform=None)
    batches = VideoBatches(dataset, Batching(12, micro_batch, processes, seed=4))
    batches.set_epoch(epoch, first)
    assert batches.steps == 4
    assert batches.accumulate == -(-12 // processes.world_size // micro_batch)
    return list(batches._order)


def test_a_step_sees_the_same_files_however_it_is_shared() -> None:
    alone = _files(Processes(), 12)
    assert len({index for batch in alone for index in batch}) == 48
    for world_size, micro in ((1, 5), (2, 6), (3, 2), (4, 2)):
        parts = [_files(Processes(rank, world_size), micro) for rank in range(world_size)]
        per_step = -(-12 // world_size // micro)
        for step, batch in enumerate(alone):
            micro_batches = slice(step * per_step, (step + 1) * per_step)
            seen = [
                index
                for part in parts
                for batch_part in part[micro_batches]
                for index in batch_part
            ]
            assert sorted(seen) == sorted(batch)
    assert _files(Processes(), 12, first=3) == alone[3:]
    assert _files(Processes(), 12, epoch=1) != alone


@pytest.mark.parametrize("text", ["--batch-size 3", "--batch-size 12"])
def test_a_batch_that_processes_cannot_share_is_refused(text: str) -> None:
    from openvclip.processes import Processes
    from openvclip.training.batches import VideoBatches
    from openvclip.video import VideoDataset

    dataset = VideoDataset([(f"{i}.mp4", 0) for i in range(9)], transform=None)
    with pytest.raises(UsageError, match=r"can't be shared evenly by 2|9 videos don't fill one"):
        VideoBatches(dataset, Batching(int(text.split()[1]), 2, Processes(0, 2)))
