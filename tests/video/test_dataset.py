from __future__ import annotations

import copy
import gc
import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from openvclip.errors import AnnotationError, VideoError, VideoOptionError
from openvclip.video import Sampling, VideoDataset, VideoSample, transforms


@pytest.fixture(scope="module")
def folder(encode, tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for number in range(6):
        path = encode(f"set{number}.mp4", frames=40 + 10 * number)
        (root / f"{number}.mp4").write_bytes(path.read_bytes())
    lines = [f"{number}.mp4,{('even', 'odd')[number % 2]}\n" for number in range(6)]
    (root / "list.csv").write_text("".join(lines))
    (root / "broken.csv").write_text("0.mp4,0\nbad.mp4,1\n1.mp4,1\nnone.mp4,0\n2.mp4,2\n")
    (root / "bad.mp4").write_bytes(b"not a video" * 50)
    return root


def dataset(folder, name="list.csv", **options):
    read = {name: options.pop(name) for name in vars(Sampling()) if name in options}
    options = {"transform": transforms.build("train", 16), **options}
    return VideoDataset(
        folder / name, folder, sampling=Sampling(**{"num_frames": 4, **read}), **options
    )


def test_a_training_loop(folder):
    data = dataset(folder, sampler="dense", sampling_rate=4)
    assert len(data) == 6
    assert data.class_names == ["even", "odd"]
    seen = 0
    for video, label in DataLoader(data, batch_size=3, shuffle=True):
        assert video.shape == (3, 4, 3, 16, 16)
        assert video.dtype == torch.float32
        assert label.dtype == torch.int64
        seen += len(label)
    assert seen == 6
    assert data.failures == []


def test_views(folder):
    data = dataset(folder, views=3, transform=transforms.build("released", 16))
    video, label = data[1]
    assert video.shape == (3, 4, 3, 16, 16)
    assert label == 1
    raw = dataset(folder, transform=None)[-1][0]
    assert raw.shape == (4, 3, 64, 144)
    assert raw.dtype == torch.uint8
    with pytest.raises(IndexError):
        data[6]


def test_epochs_repeat_and_differ(folder, numbers):
    data = dataset(folder, sampler="dense", sampling_rate=2, transform=None, seed=7)

    def starts(data):
        return [numbers(data[i][0])[0] for i in range(len(data))]

    first = starts(data)
    assert starts(data) == first
    data.set_epoch(1)
    second = starts(data)
    assert second != first
    data.set_epoch(0)
    assert starts(data) == first
    other = dataset(folder, sampler="dense", sampling_rate=2, transform=None, seed=8)
    assert starts(other) != first


def test_workers_and_order_change_nothing(folder):
    """Also with persistent workers, and with transforms that the user defines."""
    for transform in (transforms.build("train", 16), lambda v: v.float() + torch.rand(())):
        data = dataset(folder, sampler="dense", transform=None)
        data.transform = transform
        data.samples = [(path, label) for path, label in data.samples if path == "3.mp4"] * 4
        loaders = [
            DataLoader(data, batch_size=1, num_workers=workers, persistent_workers=workers > 0)
            for workers in (0, 2)
        ]
        before = torch.random.get_rng_state()
        backwards = [data[i][0] for i in (3, 2, 1, 0)][::-1]
        assert torch.equal(torch.random.get_rng_state(), before)
        epochs = []
        for epoch in range(2):
            data.set_epoch(epoch)
            alone, shared = ([video[0] for video, _ in loader] for loader in loaders)
            assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
            epochs.append(alone)
        assert all(torch.equal(a, b) for a, b in zip(epochs[0], backwards, strict=True))
        assert not torch.equal(epochs[0][0], epochs[0][1])
        assert not torch.equal(epochs[0][0], epochs[1][0])
        del loaders


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_broken_videos(num_workers, folder):
    data = dataset(folder, "broken.csv", sampler="dense")
    labels = []
    for video, label in DataLoader(data, batch_size=5, num_workers=num_workers):
        assert video.shape == (5, 4, 3, 16, 16)
        labels = label.tolist()
    assert [labels[i] for i in (0, 2, 4)] == [0, 1, 2]
    assert [failure.position for failure in data.failures] == [1, 3]
    assert data.failures[0].path == str(folder / "bad.mp4")
    assert "bad.mp4: cannot be read as a video" in data.failures[0].reason
    assert "no such file" in data.failures[1].reason
    # the class index belongs to the video in the item
    video, label = data[1]
    readable = {0: 0, 2: 1, 4: 2}
    assert label in readable.values()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_flags_broken_videos(num_workers, folder):
    data = dataset(
        folder, "broken.csv", details=True, views=2, transform=transforms.build("clip", 16)
    )
    batches = list(DataLoader(data, batch_size=5, num_workers=num_workers))
    assert len(batches) == 1
    batch = batches[0]
    assert isinstance(batch, VideoSample)
    assert batch.video.shape == (5, 2, 4, 3, 16, 16)
    assert batch.label.tolist() == [0, 1, 1, 0, 2]
    assert batch.position.tolist() == [0, 1, 2, 3, 4]
    assert [bool(error) for error in batch.error] == [False, True, False, True, False]
    black = transforms.build("clip", 16)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert torch.equal(batch.video[1, 0, 0], black[0])
    assert [failure.position for failure in data.failures] == [1, 3]


def test_all_broken_is_an_error(folder, tmp_path):
    data = VideoDataset([("bad.mp4", 0)] * 3, folder, transform=transforms.build("clip", 16))
    with pytest.raises(VideoError, match="None of the 20 videos drawn as a replacement"):
        data[0]


def test_a_retry_takes_another_start(folder, monkeypatch):
    from openvclip.video import dataset as module

    original, calls = module.read_clip, []

    def once_broken(path, *, generator, **options):
        calls.append(generator.initial_seed())
        if len(calls) == 1:
            raise VideoError("damaged here")
        return original(path, generator=generator, **options)

    monkeypatch.setattr(module, "read_clip", once_broken)
    data = dataset(folder, sampler="dense")
    assert data[0][1] == 0
    assert len(set(calls)) == 2
    assert data.failures == []


def test_the_failure_log(folder, tmp_path):
    log = tmp_path / "failures.jsonl"
    data = dataset(folder, "broken.csv", details=True, failure_log=log)
    assert data[1].error
    assert data[1].error
    assert len(data.failures) == 1
    assert pickle.loads(pickle.dumps(data)).failures == data.failures
    assert copy.deepcopy(data).failures == data.failures
    del data
    gc.collect()
    assert log.is_file()

    temporary = dataset(folder, "broken.csv", details=True)
    assert temporary[1].error
    path = temporary._log.path
    assert os.path.isfile(path)
    del temporary
    gc.collect()
    assert not os.path.exists(path)


def test_wrong_arguments(folder):
    with pytest.raises(AnnotationError, match="line 1: unknown class 'even'"):
        dataset(folder, class_names=["a", "b"])
    with pytest.raises(AnnotationError, match="empty list"):
        VideoDataset([], folder, transform=None)
    for options in ({"sampler": "x"}, {"backend": "x"}, {"views": 0}, {"num_frames": 0}):
        with pytest.raises(VideoOptionError):
            dataset(folder, **options)


# Report 11 (datasets#6673): a copy has an epoch of its own, which its persistent workers read.
@pytest.mark.parametrize(
    "wrap",
    [
        copy.deepcopy,
        lambda data: pickle.loads(pickle.dumps(data)),
        lambda data: copy.deepcopy(pickle.loads(pickle.dumps(data))),
        lambda data: copy.deepcopy(torch.utils.data.Subset(data, [5])),
        lambda data: copy.deepcopy(torch.utils.data.ConcatDataset([data])),
        lambda data: copy.deepcopy(DataLoader(data)).dataset,
    ],
    ids=["deep copy", "pickle", "both", "subset", "concatenation", "loader"],
)
def test_copies_reach_their_workers(wrap, folder, numbers):
    original = dataset(folder, sampler="dense", sampling_rate=2, transform=None)
    original.samples = original.samples[5:] * 6
    wrapped = wrap(original)
    inner = getattr(wrapped, "dataset", None) or getattr(wrapped, "datasets", [wrapped])[0]
    sampler = [0]
    loader = DataLoader(wrapped, 1, sampler=sampler, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in range(3):
        inner.set_epoch(epoch)
        (batch,) = loader
        seen.append(numbers(batch[0])[0])
        index = 5 if isinstance(wrapped, torch.utils.data.Subset) else 0
        assert seen[-1] == numbers(inner[index][0])
    assert seen[0] != seen[1] != seen[2]
    assert original.epoch == 0  # independent of the copy


def test_spawned_workers_share_the_epoch(folder):
    from multiprocessing.reduction import ForkingPickler

    data = copy.deepcopy(dataset(folder))
    sent = pickle.loads(ForkingPickler.dumps(data))  # what a spawned worker receives
    data.set_epoch(3)
    assert sent.epoch == 3
    assert copy.copy(data).epoch == 3
