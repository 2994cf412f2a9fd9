"""``Index`` against a slow loop over the windows; changes of files, models and folders."""

from __future__ import annotations

import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from openvclip import VideoCLIP
from openvclip.errors import EvaluationError, SearchError, UsageError, VideoOptionError
from openvclip.search import Index, WindowOptions, changes, updating
from openvclip.search.identity import model_difference
from openvclip.video import Sampling
from openvclip.video.transforms import build
from tests.helpers import randomise, tiny_clip, tiny_tokenizer
from tests.search.small_index import (
    assert_holds,
    content,
    expected_vectors,
    new_index,
    tiny_model,
    write_video,
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Videos of 0.3, 1, 2.5 and 4 seconds, of which one is in a subfolder."""
    folder = tmp_path_factory.mktemp("videos")
    names = ("a.mp4", "b.mp4", "c.avi", "more/d.mkv")
    lengths = (3, 10, 25, 40)
    return [
        write_video(folder / name, frames, seed)
        for seed, (name, frames) in enumerate(zip(names, lengths, strict=True))
    ]


@pytest.fixture
def copies(videos: list[Path], tmp_path: Path) -> list[Path]:
    """The videos, which a test may change."""
    shutil.copytree(videos[0].parent, tmp_path / "videos")
    return [tmp_path / "videos" / path.relative_to(videos[0].parent) for path in videos]


def no_decoding(*_: Any) -> Any:
    raise AssertionError("a video is decoded again")


@pytest.mark.parametrize(("threads", "batch_size"), [(0, 1), (0, 5), (1, 64), (3, 5)])
def test_an_index_holds_the_vectors_of_all_windows(
    videos: list[Path], tmp_path: Path, threads: int, batch_size: int
) -> None:
    model = tiny_model()
    index = new_index(tmp_path / "x.ovx", model)
    assert len(index) == 0
    assert index.videos == []
    report = index.add(videos[0].parent, batch_size=batch_size, num_threads=threads)
    assert sorted(report.added) == sorted(map(str, videos))
    assert (report.unchanged, report.failed, report.damaged) == ([], {}, {})
    assert_holds(index, model, videos)
    loaded = Index.open(tmp_path / "x.ovx", in_memory=True)
    assert content(loaded) == content(index)
    assert not any(isinstance(block.vectors.base, np.memmap) for block in loaded.blocks())


def test_short_videos_share_batches(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = tiny_model(), []
    encode = model.encode_clips
    monkeypatch.setattr(
        model, "encode_clips", lambda clips: (sizes.append(len(clips)), encode(clips))[1]
    )
    for number in range(10):
        shutil.copy(videos[0], tmp_path / f"{number}.mp4")
    index = new_index(tmp_path / "x.ovx", model)
    index.add(tmp_path, batch_size=4, num_threads=3)
    assert sizes == [4, 4, 2]
    assert len(index) == 10


def test_the_defaults_are_those_of_the_contract(videos: list[Path], tmp_path: Path) -> None:
    model = tiny_model()
    seconds = 3 * 16 / 30  # frames x sampling rate / frame rate
    index = Index.create(tmp_path / "x.ovx", model)
    settings = index.window_settings
    assert (settings.seconds, settings.step, settings.num_frames) == (seconds, seconds / 2, 3)
    index.add(videos[3])
    times, _ = expected_vectors(model, videos[3], seconds)
    np.testing.assert_allclose([w[:2] for w in content(index)[str(videos[3])]], times)


def test_known_videos_are_not_decoded_again(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = new_index(tmp_path / "x.ovx")
    index.add(videos[:2])
    with monkeypatch.context() as patch:
        patch.setattr(updating, "encode_windows", no_decoding)
        report = index.add(videos[:2])
        assert report.unchanged == list(map(str, videos[:2]))
        assert str(report) == "0 added, 2 unchanged"
        assert sorted(index.update().unchanged) == list(map(str, videos[:2]))
    report = index.add([str(videos[0]), videos[2]])
    assert (report.added, report.unchanged) == ([str(videos[2])], [str(videos[0])])


@pytest.mark.parametrize("how", ["update", "add"])
def test_changed_and_lost_files_are_noticed(copies: list[Path], tmp_path: Path, how: str) -> None:
    model = tiny_model()
    index = new_index(tmp_path / "x.ovx", model)
    index.add(copies)
    write_video(copies[1], 17, seed=7)
    same_size = copies[2].read_bytes()
    copies[2].write_bytes(same_size)
    os.utime(copies[2], ns=(1, 1))
    copies[0].unlink()
    report = index.update() if how == "update" else index.add(copies)
    assert sorted(report.changed) == [str(copies[1]), str(copies[2])]
    assert report.unchanged == [str(copies[3])]
    if how == "update":
        assert (report.removed, report.failed) == ([str(copies[0])], {})
        assert_holds(index, model, copies[1:])
    else:  # a video that is not there can't be added, and nobody asked to remove it
        assert list(report.failed) == [str(copies[0])]
        assert str(copies[0]) in index.videos


def test_a_disk_that_is_not_connected_empties_no_index(copies: list[Path], tmp_path: Path) -> None:
    index = new_index(tmp_path / "x.ovx")
    index.add(copies)
    before = content(index)
    disk = copies[0].parent
    disk.rename(tmp_path / "elsewhere")
    with pytest.raises(SearchError, match=f"none of the {len(copies)} videos") as raised:
        index.update()
    assert "Connect the disk" in str(raised.value)
    assert content(index).keys() == before.keys()
    (tmp_path / "elsewhere").rename(disk)
    assert sorted(index.update().unchanged) == sorted(map(str, copies))


def test_a_changed_file_that_cannot_be_read_is_not_found_by_old_vectors(
    copies: list[Path], tmp_path: Path
) -> None:
    model = tiny_model()
    index = new_index(tmp_path / "x.ovx", model)
    index.add(copies)
    copies[0].write_bytes(b"no video")
    report = index.update()
    assert report.removed == list(report.failed) == [str(copies[0])]
    assert_holds(index, model, copies[1:])


def test_removed_videos_are_found_no_more_and_their_space_is_freed(
    copies: list[Path], tmp_path: Path
) -> None:
    model = tiny_model()
    index = new_index(tmp_path / "x.ovx", model)
    index.add(copies)
    assert index.remove(copies[0]) == [str(copies[0])]
    assert_holds(index, model, copies[1:])
    with pytest.raises(SearchError, match=r"c\.mp4: the index has no such video.*c\.avi"):
        index.remove([copies[1], copies[1].with_name("c.mp4")])
    assert_holds(index, model, copies[1:])
    index.save()
    assert_holds(index, model, copies[1:])
    assert all(block.live is None for block in index.blocks())
    size = sum(path.stat().st_size for path in index.path.glob("vectors-*"))
    assert index.remove(tmp_path / "videos" / "more") == [str(copies[3])]
    assert index.remove("*.avi") == [str(copies[2])]
    assert_holds(index, model, [copies[1]])
    assert sum(path.stat().st_size for path in index.path.glob("vectors-*")) < size
    index.remove(copies[1])
    assert (len(index), index.videos, list(index.path.glob("vectors-*"))) == (0, [], [])
    index.add(copies[0])
    assert_holds(index, model, [copies[0]])


def test_long_videos_are_in_several_shards(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "PIECE", 2)
    monkeypatch.setattr(updating, "PIECE", 2)
    model = tiny_model()
    index = new_index(tmp_path / "x.ovx", model)
    index.add(videos, batch_size=2)
    assert_holds(index, model, videos)
    index.save()
    assert len(index.blocks()) == 1
    assert_holds(index, model, videos)


def test_a_reader_sees_the_changes_of_others(copies: list[Path], tmp_path: Path) -> None:
    writer = new_index(tmp_path / "x.ovx")
    reader = Index.open(tmp_path / "x.ovx")
    assert len(reader) == 0
    writer.add(copies[:2])
    assert sorted(reader.videos) == sorted(map(str, copies[:2]))
    before = reader.snapshot()
    assert reader.snapshot() is before
    writer.remove(copies[0])
    writer.save()  # removes the file that the reader has mapped
    assert len(before.blocks[0].vectors) > len(reader)
    assert np.isfinite(before.blocks[0].vectors).all()
    assert reader.videos == [str(copies[1])]


def test_files_that_cannot_be_read_are_listed(videos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    for name in ("empty", "other"):
        (folder / name).mkdir(parents=True)
    (folder / "other" / "notes.txt").write_text("no video")
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("no video")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    whole = videos[3].read_bytes()
    (folder / "cut.mp4").write_bytes(videos[1].read_bytes()[:-300])
    (folder / "part.mkv").write_bytes(whole[: len(whole) // 2])
    shutil.copy(videos[0], folder / "good.mp4")
    index = new_index(tmp_path / "x.ovx")
    absent = folder / "goood.mp4"
    report = index.add([folder, folder / "photo.jpg", folder / "empty", folder / "other", absent])
    reasons = {
        "zero.mp4": r"empty \(0 bytes\)",
        "text.mp4": "cannot be read as a video",
        "cut.mp4": "cannot be read as a video",
        "photo.jpg": "is an image; an index holds videos",
        "empty": "no video files in this folder",
        "other": "no video files in this folder",
        "goood.mp4": r"no such file \(did you mean .*good\.mp4",
    }
    assert sorted(report.failed) == sorted(str(folder / name) for name in reasons)
    for name, reason in reasons.items():
        assert_matches(report.failed[str(folder / name)], reason)
    assert sorted(report.added) == [str(folder / "good.mp4"), str(folder / "part.mkv")]
    assert list(report.damaged) == [str(folder / "part.mkv")]
    assert_matches(
        report.damaged[str(folder / "part.mkv")],
        r"only a part .*: the file ends after 1\.\d of 4\.0 s",
    )


def assert_matches(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text


def test_urls_are_videos(videos: list[Path], tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.pipe("/library/a.mp4", videos[1].read_bytes())
    url = "memory://library/a.mp4"
    index = new_index(tmp_path / "x.ovx")
    report = index.add([url, "memory://library/b.mp4"])
    assert (report.added, list(report.failed)) == ([url], ["memory://library/b.mp4"])
    _, vectors = expected_vectors(tiny_model(), videos[1])
    np.testing.assert_allclose([w[2] for w in content(index)[url]], vectors, atol=1e-3)
    assert index.update().unchanged == [url]
    files.pipe("/library/a.mp4", videos[2].read_bytes())
    assert index.update().changed == [url]
    files.rm("/library/a.mp4")
    assert index.update().removed == [url]


@pytest.mark.skipif(os.name == "nt", reason="file names are Unicode")
def test_names_of_files_are_any_bytes(videos: list[Path], tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff ?#%'.mp4"))
    shutil.copy(videos[0], path)
    index = new_index(tmp_path / "x ?#%.ovx")
    assert index.add(path).added == [str(path)]
    assert Index.open(index.path).videos == [str(path)]
    assert index.update().unchanged == [str(path)]
    assert index.remove(path) == [str(path)]


# --- models and settings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: tiny_model(1), r"weights_hash is [0-9a-f]{64} in the index and [0-9a-f]{64} in"),
        (lambda: tiny_model(pooling="frames"), "pooling is unit_frames in the index and frames"),
        (lambda: tiny_model(transform=build("clip", 8)), "pixels is .*'released'.*'clip'"),
        (lambda: VideoCLIP(tiny_clip(), tiny_tokenizer), "expansion is .* and None in the model"),
        (
            lambda: tiny_model(sampling=Sampling(num_frames=4, views=1)),
            "frames.num_frames is 3 in the index and 4 in",
        ),
    ],
)
def test_an_index_of_another_model_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    new_index(tmp_path / "x.ovx")
    with pytest.raises(SearchError, match=f"another model made this index: {message}"):
        Index.open(tmp_path / "x.ovx", change())
    Index.open(tmp_path / "x.ovx", tiny_model())


def test_the_activation_belongs_to_the_model(tmp_path: Path) -> None:
    """Two names of open_clip are one architecture with the same weights and other results."""
    settings = new_index(tmp_path / "x.ovx")._storage.settings
    named = [
        replace(settings, contract=replace(settings.contract, model=name))
        for name in ("ViT-B-16", "ViT-B-16-quickgelu", "another name of it")
    ]
    assert model_difference(named[0], named[1]) == ("model", "ViT-B-16", "ViT-B-16-quickgelu")
    assert model_difference(named[0], named[2]) is None


def test_a_model_that_changed_since_is_refused(videos: list[Path], tmp_path: Path) -> None:
    model = tiny_model()
    index = new_index(tmp_path / "x.ovx", model)
    randomise(model.model, 5)
    with pytest.raises(SearchError, match="another model made this index"):
        index.add(videos[0])
    assert len(index) == 0


def test_an_index_without_a_known_model_asks_for_it(videos: list[Path], tmp_path: Path) -> None:
    new_index(tmp_path / "x.ovx")
    index = Index.open(tmp_path / "x.ovx")
    with pytest.raises(SearchError, match=r"does not say where its model is.*Index\.open"):
        index.add(videos[0])


@pytest.mark.parametrize("options", [{"seconds": 0}, {"step": -1.0}, {"seconds": float("nan")}])
def test_wrong_windows_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SearchError, match="expected a number of seconds above 0"):
        WindowOptions(**options)


def test_a_step_beyond_the_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="step=3 is larger than the length of a window, 2 sec"):
        Index.create(tmp_path / "x.ovx", tiny_model(), windows=WindowOptions(2, 3))
    assert not (tmp_path / "x.ovx").exists()


def test_wrong_options_are_refused_before_anything_is_done(
    videos: list[Path], tmp_path: Path
) -> None:
    index = new_index(tmp_path / "x.ovx")
    with pytest.raises(UsageError, match="batch_size=0"):
        index.add(videos[0], batch_size=0)
    with pytest.raises(VideoOptionError, match="num_threads=-1"):
        index.add(videos[0], num_threads=-1)
    for wrong in (b"a.mp4", 3, [videos[0], None]):
        with pytest.raises(SearchError, match="expected files, folders, patterns or URLs"):
            index.add(wrong)  # type: ignore[arg-type]
    assert len(index) == 0


def test_an_error_of_the_model_ends_the_threads_and_keeps_what_is_done(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    index = new_index(tmp_path / "x.ovx", model)
    encode, calls = model.encode_clips, iter(range(10))

    def fail(clips: Tensor) -> Tensor:
        if next(calls) == 4:
            raise EvaluationError("The features are NaN.")
        return encode(clips)

    monkeypatch.setattr(model, "encode_clips", fail)
    with pytest.raises(EvaluationError, match="NaN"):
        index.add(videos, batch_size=1, num_threads=1)
    assert not [t for t in threading.enumerate() if t.name.startswith("openvclip")]
    assert_holds(index, model, videos[:2])


def test_an_encrypted_file_is_listed(videos: list[Path], tmp_path: Path) -> None:
    """Without the key, FFmpeg decodes nothing of a file that is encrypted (MPEG-CENC)."""
    av = pytest.importorskip("av")
    path = tmp_path / "secret.mp4"
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "01" * 16}
    # Otherwise FFmpeg draws a part of the key stream, and by chance some bytes look like a frame.
    key |= {"encryption_kid": "02" * 16, "fflags": "bitexact"}
    with av.open(str(path), "w", options=key) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        numbers = np.random.default_rng(0)
        for _ in range(10):
            picture = numbers.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    model = tiny_model()
    index = new_index(tmp_path / "x.ovx", model)
    report = index.add([path, videos[0]])
    assert report.added == [str(videos[0])]
    assert list(report.failed) == [str(path)]
    assert_holds(index, model, [videos[0]])
