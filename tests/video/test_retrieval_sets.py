"""The test sets of the retrieval protocols, from files as they are published."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from openvclip.errors import AnnotationError, ProtocolError, VideoNotFoundError
from openvclip.video import retrieval


def write_all(folder: Path, least: int = 0) -> None:
    """Write the annotation files of all protocols, with their published numbers of videos."""
    with (folder / "MSRVTT_JSFUSION_test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "vid_key", "video_id", "sentence"])
        for i in range(1000 - least):
            writer.writerow([f"ret{i}", f"msr{7000 + i}", f"video{7000 + i}", f"a man, {i}"])
    names = [f"clip_{i}_1_2" for i in range(670 - least)]
    (folder / "test_list.txt").write_text("\n".join(reversed(names)) + "\n")
    captions = {name: [["a", "man"], ["it", "is", str(i)]] for i, name in enumerate(names)}
    captions["of-training"] = [["no"]]
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps(captions))
    lines = (f"0001_Film_00.{i}\t1\t2\t1\t2\tSomeone looks {i}.\n" for i in range(1000 - least))
    (folder / "LSMDC16_challenge_1000_publictect.csv").write_text("".join(lines))
    (folder / "val_1.json").write_text(
        json.dumps({f"v_{i}": {"sentences": [" A man runs. ", "He stops."]} for i in range(5)})
    )


def write_didemo(folder: Path) -> None:
    entries = [
        {"video": "b.mov", "description": "second", "times": [[0, 0]]},
        {"video": "a.avi", "description": "first", "times": [[1, 1]]},
        {"video": "b.mov", "description": "third", "times": [[2, 3]]},
        {"video": "other.mp4", "description": "not in the list", "times": []},
    ]
    (folder / "test_data.json").write_text(json.dumps(entries))
    (folder / "test_list.txt").write_text("a\nb.mov\n")


FACTS = {  # M frames, W tokens, videos, captions of a video
    "msrvtt-1ka": (12, 32, 1000, 1),
    "msvd": (12, 32, 670, 2),
    "lsmdc": (12, 32, 1000, 1),
    "didemo": (64, 64, 2, 1),
    "activitynet": (64, 64, 5, 1),
}


@pytest.mark.parametrize("name", retrieval.PROTOCOLS)
@pytest.mark.parametrize("below", ["", "annotations"])
def test_each_protocol(name: str, below: str, tmp_path: Path) -> None:
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    write_didemo(folder) if name == "didemo" else write_all(folder)
    found = retrieval.load(name, annotations=tmp_path)
    frames, words, videos, captions = FACTS[name]
    assert (found.name, found.words, found.several) == (name, words, name == "msvd")
    assert (found.sampling.sampler, found.sampling.num_frames) == ("seconds", frames)
    assert found.sampling.last_second == (31 if name == "didemo" else None)
    assert len(found.videos) == len(found.captions) == videos
    assert {len(texts) for texts in found.captions} == {captions}
    assert tuple(FACTS) == retrieval.PROTOCOLS


def test_the_captions_of_each_protocol(tmp_path: Path) -> None:
    write_all(tmp_path)
    msrvtt = retrieval.load("msrvtt-1ka", annotations=tmp_path)
    assert (msrvtt.videos[3], msrvtt.captions[3]) == ("video7003", ["a man, 3"])
    msvd = retrieval.load("msvd", annotations=tmp_path / "raw-captions.pkl")
    assert (msvd.videos[0], msvd.captions[0]) == ("clip_669_1_2", ["a man", "it is 669"])
    lsmdc = retrieval.load("lsmdc", annotations=tmp_path)
    assert (lsmdc.videos[7], lsmdc.captions[7]) == ("0001_Film_00.7", ["Someone looks 7."])
    activitynet = retrieval.load("activitynet", annotations=tmp_path)
    assert activitynet.captions[0] == ["A man runs. He stops."]
    write_didemo(tmp_path)
    didemo = retrieval.load("didemo", annotations=tmp_path)
    assert didemo.captions == [["first"], ["second third"]]  # joined in the order of the file


def test_json_of_the_1k_a_set(tmp_path: Path) -> None:
    entries = [{"video": f"video{i}.mp4", "caption": f"a man {i}"} for i in range(1000)]
    (tmp_path / "test1k.json").write_text(json.dumps(entries))
    assert retrieval.load("msrvtt-1ka", annotations=tmp_path).captions[9] == ["a man 9"]
    whole = {"sentences": [{"video_id": e["video"], "caption": str(i)} for e in entries
                           for i in range(20)]}  # fmt: skip
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(whole))
    with pytest.raises(ProtocolError, match="20000 captions of 1000 videos; expected one caption"):
        retrieval.load("msrvtt-1ka", annotations=tmp_path / "MSRVTT_data.json")


def test_captions_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("video,caption\na.mp4,one\nb.mp4,two\na.mp4,three\n")
    (tmp_path / "videos" / "part").mkdir(parents=True)
    (tmp_path / "videos" / "part" / "a.webm").touch()
    found = retrieval.from_captions(tmp_path / "mine.csv", videos=tmp_path / "videos")
    assert (found.name, found.words, found.sampling.num_frames) == ("mine", None, 12)
    assert dict(zip(found.videos, found.captions, strict=True)) == {
        "part/a.webm": ["one", "three"],
        "b.mp4": ["two"],
    }


def test_files_are_looked_for(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "videos" / "part").mkdir(parents=True)
    (tmp_path / "videos" / "part" / "video7001.webm").touch()
    found = retrieval.load("msrvtt-1ka", annotations=tmp_path, videos=tmp_path / "videos")
    assert found.videos[:3] == ["video7000", "part/video7001.webm", "video7002"]
    with pytest.raises(VideoNotFoundError, match="no such folder"):
        retrieval.load("msrvtt-1ka", annotations=tmp_path, videos=tmp_path / "gone")


@pytest.mark.parametrize("name", ["msrvtt-1ka", "msvd", "lsmdc"])
def test_lists_that_are_incomplete(name: str, tmp_path: Path) -> None:
    write_all(tmp_path, least=1)
    count = retrieval.published_videos(name) - 1
    with pytest.raises(ProtocolError, match=f"name {count} videos; expected {count + 1}"):
        retrieval.load(name, annotations=tmp_path)
    found = retrieval.load(name, annotations=tmp_path, allow_incomplete=True)
    assert len(found.videos) == count


def test_what_is_refused(tmp_path: Path) -> None:
    calls: list[tuple[Any, str, type[Exception]]] = [
        ("msrvt-1ka", r"did you mean msrvtt-1ka\?", ProtocolError),
        ("msrvtt-1ka", "looked for MSRVTT_JSFUSION_test.csv", ProtocolError),
    ]
    for name, message, error in calls:
        with pytest.raises(error, match=message):
            retrieval.load(name, annotations=tmp_path)
    write_all(tmp_path)
    (tmp_path / "test_list.txt").write_text("clip_1_1_2\nnew\nlast\n")
    with pytest.raises(ProtocolError, match=r"names 3 videos, of which 2 have no captions \(new, "):
        retrieval.load("msvd", annotations=tmp_path)
    (tmp_path / "test_list.txt").unlink()
    with pytest.raises(AnnotationError, match=r"test_list\.txt: no such file"):
        retrieval.load("msvd", annotations=tmp_path)
