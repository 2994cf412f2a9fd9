"""Batches that stream from WebDataset shards, and the index of shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openvclip.errors import AnnotationError, UsageError, VideoError
from openvclip.processes import Processes
from openvclip.training import shards
from openvclip.training.batches import Batching
from openvclip.training.shard_batches import ShardBatches
from openvclip.training.shards import class_indices, find_shards, read_index
from openvclip.video import Sampling, transforms
from tests.examples.tiny_videos import CLASSES, write_shards, write_videos


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_videos(folder, 9)
    write_shards(folder, 9, 4)
    return folder


def _pattern(folder: Path) -> str:
    return str(folder / "part-{000..003}.tar")


def _batches(
    pattern: str,
    *,
    num_workers: int = 0,
    processes: Processes | None = None,
    first: int = 0,
    epoch: int = 0,
) -> list[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    sizes = {shard: len(labels) for shard, labels in read_index(find_shards(pattern), None).items()}
    batches = ShardBatches(
        sizes,
        CLASSES,
        transforms.build("train", 32),
        Sampling(num_frames=2, sampling_rate=3, sampler="dense"),
        Batching(4, 2, processes or Processes(), num_workers=num_workers),
    )
    batches.set_epoch(epoch, first)
    return list(batches)


def test_shards_in_one_order_for_any_number_of_workers(world: Path) -> None:
    expected = _batches(_pattern(world))
    names = [name for *_, batch in expected for name in batch]
    assert len(names) == 8
    for name, label in zip(names, torch.cat([label for _, label, _ in expected]), strict=True):
        assert int(label) == int(name.rsplit("/", 1)[1]) % 2
    for workers in (1, 2):
        for first in (0, 1):
            batches = _batches(_pattern(world), num_workers=workers, first=first)
            assert [batch[2] for batch in batches] == [batch[2] for batch in expected[2 * first :]]
            for batch, other in zip(batches, expected[2 * first :], strict=True):
                assert torch.equal(batch[0], other[0])
    other = [batch[2] for batch in _batches(_pattern(world), epoch=1)]
    assert other != [batch[2] for batch in expected]
    parts = [_batches(_pattern(world), processes=Processes(rank, 2)) for rank in range(2)]
    shards_of = [{n.rsplit("/", 1)[0] for *_, b in part for n in b} for part in parts]
    assert not shards_of[0] & shards_of[1]


def test_a_broken_video_in_a_shard_is_replaced_by_the_next(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(5):
        (tmp_path / f"{index}.mp4").write_bytes((world / f"{index}.mp4").read_bytes())
    pattern = write_shards(tmp_path, 5, 1)
    first, broken, third, fourth = (name for *_, names in _batches(pattern) for name in names)
    (tmp_path / f"{broken.rsplit('/', 1)[1]}.mp4").write_bytes(b"no video")
    batches = _batches(write_shards(tmp_path, 5, 1))
    assert [name for *_, names in batches for name in names] == [first, third, third, fourth]
    assert f"{broken}: " in caplog.text
    for index in range(5):
        (tmp_path / f"{index}.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"part-000\.tar/"):
        _batches(write_shards(tmp_path, 5, 1))


def test_an_index_stands_for_the_shards(world: Path, tmp_path: Path) -> None:
    index, messages = tmp_path / "index.json", list[str]()
    shards.main([_pattern(world), "--out", str(index)], messages.append)
    assert messages == [f"4 shards with 9 videos in {index}."]
    paths = find_shards(_pattern(world))
    assert read_index(paths, index) == read_index(paths, None)
    labels = [
        label
        for shard in class_indices(read_index(paths, index), CLASSES).values()
        for label in shard
    ]
    assert sorted(labels) == [0] * 5 + [1] * 4
    remote = ["https://example.org/a-000.tar"]
    with pytest.raises(AnnotationError, match="need --shard-index FILE"):
        read_index(remote, None)
    with pytest.raises(AnnotationError, match=r"lacks 1 of 1 shards \(https://example"):
        read_index(remote, index)
    index.write_text("[1]")
    with pytest.raises(AnnotationError, match="is no index of shards"):
        read_index(paths, index)


def test_shards_that_do_not_fit(world: Path, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"means 6 files, of which 2 don't exist .*004\.tar"):
        find_shards(str(world / "part-{000..005}.tar"))
    with pytest.raises(AnnotationError, match="more than once"):
        find_shards(str(world / "part-{000,000}.tar"))
    (tmp_path / "x.tar").write_bytes(b"no tar file")
    with pytest.raises(AnnotationError, match="can't be read as a shard"):
        read_index([str(tmp_path / "x.tar")], None)
    with pytest.raises(AnnotationError, match="unknown class 'star sliding'"):
        class_indices(read_index(find_shards(_pattern(world)), None), ["another"])
    with pytest.raises(UsageError, match=r"make 4 streams a process; choose 1, 2, 4 workers"):
        _batches(_pattern(world), num_workers=3)
    with pytest.raises(UsageError, match="too few for 5 processes"):
        _batches(_pattern(world), processes=Processes(0, 5))
