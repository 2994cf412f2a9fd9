"""The videos of tar shards: patterns of shards, members in order, damaged archives, addresses."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openvclip.errors import UsageError, VideoError, VideoNotFoundError
from openvclip.video import read_clip
from openvclip.video.cutting import part_name
from openvclip.video.shards import expand_braces, shard_videos, shards_of
from openvclip.video.sources import file_name

pytest.importorskip("av")
fsspec = pytest.importorskip("fsspec")

NOTES = ("a.json", "b.txt", ".hidden.mp4", "folder/._b.mp4", "c.cls")


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1_700_000_000
            archive.addfile(member, io.BytesIO(content))
        archive.addfile(_folder("folder.mp4"))
    return buffer.getvalue()


def _folder(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    return member


def read(shard: str) -> dict[str, bytes]:
    found = {}
    for video in shard_videos(shard):
        with video.file as file:
            file.seek(0)
            found[video.path] = file.read()
        assert video.size == len(found[video.path])
        assert video.mtime == 1_700_000_000
    return found


@pytest.fixture(scope="module")
def clips(encode: Callable[..., Path]) -> dict[str, bytes]:
    """Two videos under names that a URL does not have."""
    return {
        name: encode(f"shard{index}.mp4", frames=6 + index, size=(36, 16)).read_bytes()
        for index, name in enumerate(("folder/a b#1?.mp4", "[x]:y.MP4"))
    }


# --- patterns ----------------------------------------------------------------------------------

_WORDS = st.sampled_from(["{", "}", ",", "..", "{1..3}", "{08..11}", "{c..a}", "{a,b}", "x", "-1"])


@given(st.lists(_WORDS, max_size=8).map("".join))
def test_braces_are_those_of_another_library(pattern: str) -> None:
    braceexpand = pytest.importorskip("braceexpand")
    depths = [0]
    for letter in re.sub("[^{}]", "", pattern):
        depths.append(depths[-1] + (1 if letter == "{" else -1))
    if depths[-1] != 0 or min(depths) < 0:
        with pytest.raises(UsageError, match="not paired"):
            expand_braces(pattern)
    else:
        assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s3://b/{0000..0002}.tar", ["s3://b/0000.tar", "s3://b/0001.tar", "s3://b/0002.tar"]),
        ("{9..1..-4}", ["9", "5", "1"]),
        (r"a\{1,2\}.tar", ["a{1,2}.tar"]),
        ("{one}", ["{one}"]),
    ],
)
def test_patterns(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


def test_shards_of_several_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a-1.tar", "a-2.tar", "b.tar"):
        (tmp_path / name).touch()
        fsspec.filesystem("memory").pipe(f"/patterns/{name}", b"")
    monkeypatch.chdir(tmp_path)
    here = [str(tmp_path / name) for name in ("a-1.tar", "a-2.tar", "b.tar")]
    assert shards_of("a-{1..2}.tar") == here[:2]
    assert shards_of(["b.tar", "a-*.tar"]) == [here[2], *here[:2]]
    there = [f"memory://patterns/{name}" for name in ("a-1.tar", "a-2.tar")]
    assert [re.sub("///?", "//", url) for url in shards_of("memory://patterns/a-?.tar")] == there
    assert shards_of("https://h/x.tar?signed=1") == ["https://h/x.tar?signed=1"]
    # A shard that is lost is not a mistake in the pattern.
    assert shards_of("a-{1..3}.tar")[2] == str(tmp_path / "a-3.tar")


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        ([], "No shards"),
        (["c-{0..9}.tar"], "none of the 10 shards exists"),
        (["d-*.tar"], "no shard fits"),
        (["memory://nothing/*.tar"], "no shard fits"),
        (["b.tar", "{b,b}.tar"], "more than once"),
        (["b.tar}"], "not paired"),
    ],
)
def test_patterns_that_are_mistakes(
    patterns: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.tar").touch()
    with pytest.raises(UsageError, match=reason):
        shards_of(patterns)


# --- members -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["disk", "file", "memory"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_videos_come_in_order_and_their_addresses_open(
    place: str, mode: str, clips: dict[str, bytes], tmp_path: Path
) -> None:
    names = list(clips)
    content = {"a.json": b"{}", names[0]: clips[names[0]], **dict.fromkeys(NOTES[1:], b"note")}
    data = tar_of({**content, names[1]: clips[names[1]]}, mode)
    shard = {"disk": str(tmp_path / "0.tar"), "file": (tmp_path / "0.tar").as_uri()}.get(
        place, "memory://shards/0.tar"
    )
    with fsspec.open(shard, "wb") as file:
        file.write(data)
    assert read(shard) == {f"tar://{name}::{shard}": content for name, content in clips.items()}
    for name, content in clips.items():
        assert torch.equal(
            read_clip(f"tar://{name}::{shard}", num_frames=4, sampler="uniform"),
            read_clip(content, num_frames=4, sampler="uniform"),
        )


def test_names_of_videos_in_shards() -> None:
    assert file_name("tar://clips/a.mp4::s3://bucket/0001.tar") == "a.mp4"
    assert file_name("s3://bucket/0001.tar") == "0001.tar"
    assert file_name("/data/clips/") == "clips"
    cut = part_name("tar://clips/a.mp4::s3://bucket/0001.tar", 1.0, 2.5)
    assert cut == "a 0001.0-0002.5.mp4"


def test_a_large_video_is_kept_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openvclip.video.shards._IN_MEMORY", 1000)
    (tmp_path / "0.tar").write_bytes(tar_of({"a.mp4": b"x" * 2000}))
    (video,) = shard_videos(str(tmp_path / "0.tar"))
    with video.file as file:
        assert isinstance(file.fileno(), int)
        file.seek(0)
        assert file.read() == b"x" * 2000


def test_threads_read_one_archive_together(clips: dict[str, bytes], tmp_path: Path) -> None:
    many = {f"{n}.mp4": clips[name] for n, name in enumerate([*clips] * 6)}
    (tmp_path / "0.tar").write_bytes(tar_of(many))

    def shown(video: str | bytes) -> torch.Tensor:
        return read_clip(video, num_frames=4, sampler="uniform")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(shown, [f"tar://{name}::{tmp_path / '0.tar'}" for name in many]))
    assert all(map(torch.equal, found, map(shown, many.values())))


# --- damage ------------------------------------------------------------------------------------


def test_an_archive_that_breaks_off_anywhere(tmp_path: Path) -> None:
    """All whole videos before the break are read, and the break is an error."""
    videos = {f"{n}.mp4": bytes([n]) * (300 + 400 * n) for n in range(4)}
    data = tar_of(videos)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        ends = [member.offset_data + member.size for member in archive if member.isfile()]
        starts = [member.offset for member in archive]
    end = starts[-1] + 512  # of the last header
    starts.append(end)  # of the blocks of zeros, of which one is enough
    shard = tmp_path / "0.tar"
    for cut in range(1, end + 800, 61):
        shard.write_bytes(data[:cut])
        found = []
        try:
            for video in shard_videos(str(shard)):
                video.file.close()
                found.append(video.path)
        except VideoError as error:
            assert str(shard) in str(error)  # noqa: PT017
            broken = True
        else:
            broken = False
        whole = [f"tar://{name}::{shard}" for name, at in zip(videos, ends, strict=True)]
        assert found == [name for name, at in zip(whole, ends, strict=True) if at <= cut]
        assert broken == (cut < end + 512 and cut not in starts)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_damaged_archive(mode: str, tmp_path: Path) -> None:
    data = bytearray(tar_of({f"{n}.mp4": bytes(range(256)) * 20 for n in range(3)}, mode))
    data[len(data) // 2 : len(data) // 2 + 600] = b"!" * 600
    if mode == "w":
        data[6000:6300] = b"!" * 300  # a header
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(VideoError, match="can't be read to its end"):
        read(str(tmp_path / "0.tar"))


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"no archive" * 100)
    for shard, error in (
        ("0.tar", VideoError),
        ("1.tar", VideoNotFoundError),
        ("", VideoError),
    ):
        with pytest.raises(error, match=re.escape(str(tmp_path / shard))):
            read(str(tmp_path / shard))
    with pytest.raises(VideoNotFoundError):
        read("memory://nothing/0.tar")


def test_addresses_that_name_nothing(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(tar_of({"a.mp4": b"no video"}))
    for url, error in (
        (f"tar://b.mp4::{shard}", VideoNotFoundError),
        (f"tar://folder.mp4::{shard}", VideoError),
        (f"tar://a.mp4::{shard}", VideoError),
        (f"tar://a.mp4::{tmp_path / '1.tar'}", VideoNotFoundError),
        (f"tar://a.mp4::{Path(__file__)}", VideoError),
        ("tar://a.mp4::memory://nothing/0.tar", VideoNotFoundError),
    ):
        with pytest.raises(error, match=r"a\.mp4|b\.mp4|r\.mp4|0\.tar|1\.tar"):
            read_clip(url)
