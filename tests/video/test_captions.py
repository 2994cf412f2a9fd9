"""Captions in the formats in which people have them, and pickles that would run code."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openvclip.errors import AnnotationError
from openvclip.video import read_captions
from openvclip.video.captions import locate_captioned

TWO = {"video7": ["a man, running", "someone runs"], "video8": ["a dog"]}


def table(separator: str, titles: list[str], extra: bool = False) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator)
    writer.writerow(titles)
    number = 0
    for video, captions in TWO.items():
        for caption in captions:
            row = {"video": video, "caption": caption, "extra": str(number)}
            writer.writerow([row["extra"]] * 2 * extra + [row["video"], row["caption"]])
            number += 1
    return file.getvalue()


PAIRS = [(video, caption) for video, captions in TWO.items() for caption in captions]
LSMDC = "".join(f"{v}\t00:01\t00:02\t00:01\t00:02\t{c}\n" for v, c in PAIRS)

TEXTS: dict[str, str] = {
    "test.csv": table(",", ["key", "vid_key", "video_id", "sentence"], extra=True),
    "windows.csv": "\ufeff" + table(",", ["Video ID", "Caption"]).replace("\n", "\r\n"),
    "test.tsv": table("\t", ["video", "text"]),
    "semicolons.csv": table(";", ["filename", "description"]),
    "lsmdc.csv": LSMDC,
    "msrvtt.json": json.dumps(
        {
            "info": {},
            "videos": [{"video_id": "video7", "split": "test"}],
            "sentences": [
                {"caption": c, "video_id": v, "sen_id": i} for i, (v, c) in enumerate(PAIRS)
            ],
        }
    ),
    "didemo.json": json.dumps(
        [{"video": v, "description": c, "times": [[0, 1]]} for v, c in PAIRS]
    ),
    "lists.json": json.dumps([{"video": v, "caption": c} for v, c in TWO.items()]),
    "val_1.json": json.dumps(
        {v: {"duration": 9.5, "timestamps": [[0, 1]], "sentences": c} for v, c in TWO.items()}
    ),
    "plain.json": json.dumps(TWO),
    "lines.jsonl": "\n".join(json.dumps({"video": v, "caption": c}) for v, c in PAIRS) + "\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_formats(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TEXTS[name], encoding="utf-8", newline="")
    assert read_captions(tmp_path / name) == TWO


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("words", [True, False])
def test_the_pickle_of_msvd(protocol: int, words: bool, tmp_path: Path) -> None:
    content: Any = {v: [c.split() if words else c for c in texts] for v, texts in TWO.items()}
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(content, protocol))
    assert read_captions(tmp_path / "raw-captions.pkl") == TWO


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Its texts are bytes; here with an accent in UTF-8, in protocol 2 and 0."""
    for content in (
        b"\x80\x02}U\x05v\xc3\xa9loq\x00]]q\x01(U\x01aU\x05v\xc3\xa9loeas.",
        b"(dS'v\\xc3\\xa9lo'\n(l(lS'a'\naS'v\\xc3\\xa9lo'\naas.",
    ):
        (tmp_path / "old.pkl").write_bytes(content)
        assert read_captions(tmp_path / "old.pkl") == {"vélo": ["a vélo"]}


# --- pickles that would run code -----------------------------------------------------------------


class _Calls:
    """Pickles to a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touched(path: str) -> str:
    Path(path).touch()
    return "a man"


def hostile(mark: Path) -> dict[str, bytes]:
    call = _Calls(touched, str(mark))
    contents = {f"protocol {p}": pickle.dumps({"v": [call]}, p) for p in range(6)}
    path = str(mark).encode()
    return {
        **contents,
        "os.system": b"cos\nsystem\n(S'touch " + path + b"'\ntR.",
        "INST": b"(S'touch " + path + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'touch " + path + b"'\no.",
        "the key": pickle.dumps({call: ["a man"]}),
        "an extension": b"\x82\x01.",
        "a persistent object": b"Pmodel\n.",
        "a set": pickle.dumps({"v": {"a man"}}),
        "numpy": pickle.dumps({"v": [np.str_("a man")]}),
        "a class": pickle.dumps({"v": [dict]}),
        "a buffer": b"\x80\x05\x97.",
    }


@pytest.mark.parametrize("kind", hostile(Path("mark")))
def test_a_pickle_that_could_run_code_is_refused(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    content = hostile(mark)[kind]
    (tmp_path / "raw-captions.pkl").write_bytes(content)
    with pytest.raises(AnnotationError, match=r"could run code. Nothing was loaded"):
        read_captions(tmp_path / "raw-captions.pkl")
    assert not mark.exists()


def test_the_hostile_pickles_would_run(tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    for kind in ("protocol 0", "protocol 5", "os.system", "INST", "the key"):
        mark = tmp_path / kind.replace(" ", "-")
        with suppress(TypeError):
            pickle.loads(hostile(mark)[kind])
        assert mark.exists(), kind


def test_the_error_names_what_the_pickle_would_import(tmp_path: Path) -> None:
    for protocol in (2, 4):
        content = pickle.dumps(_Calls(touched, "x"), protocol)
        (tmp_path / "raw-captions.pkl").write_bytes(content)
        with pytest.raises(AnnotationError, match=r"\(.*GLOBAL tests\.video\.test_captions\.touch"):
            read_captions(tmp_path / "raw-captions.pkl")


def test_a_memo_that_would_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "bomb.pkl").write_bytes(b"}r\xff\xff\xff\x7f.")
    with pytest.raises(AnnotationError, match="damaged"):
        read_captions(tmp_path / "bomb.pkl")


WHOLE = pickle.dumps(TWO)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60)
    | st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)).map(
        lambda change: WHOLE[: change[0]] + bytes([change[1]]) + WHOLE[change[0] + 1 :]
    )
    | st.integers(0, len(WHOLE) - 1).map(lambda n: WHOLE[:n]),
    name=st.sampled_from(["a.pkl", "a.json", "a.csv"]),
)
def test_damaged_files_are_errors_of_the_annotations(
    content: bytes, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        captions = read_captions(tmp_path / name)
    except AnnotationError:
        return
    assert all(isinstance(text, str) for texts in captions.values() for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "video_id,frames\nv,3\n", "names no columns of videos and captions"),
        ("a.csv", "video_id,sentence\nv,\n", r"a\.csv, line 2: 'v,' lacks the video or the capt"),
        ("a.csv", "video_id,sentence\n", "holds no captions"),
        ("a.csv", "", "names no columns"),
        ("a.tsv", "v\tx\ta man\nw\n", r"a\.tsv, line 2: 'w' lacks"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[]", "holds no captions"),
        ("a.json", '[{"video": "v"}]', r"entry 1: an object with video has no video and caption"),
        ("a.json", '[{"video": "v", "caption": 3}]', "entry 1: int '3'; expected a caption"),
        ("a.json", '{"v": {"duration": 3}}', r"a\.json, v: NoneType"),
        ("a.json", "[[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AnnotationError, match=message):
        read_captions(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").touch()
    for name in ("caption.csv", "caption.pkl"):
        with pytest.raises(AnnotationError, match="no such file"):
            read_captions(tmp_path / name)
    with pytest.raises(AnnotationError, match=r"did you mean .*captions\.csv"):
        read_captions(tmp_path / "caption.csv")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps(["a"]))
    with pytest.raises(AnnotationError, match="holds list"):
        read_captions(tmp_path / "list.pkl")


# --- files of videos -----------------------------------------------------------------------------


def test_videos_are_found_by_their_names(tmp_path: Path) -> None:
    files = [
        *("video7.mp4", "all/video8.webm", "all/video9.mp4", "zz/video9.avi"),
        "1004_Juno/1004_Juno_00.32.17.010-00.32.20.275.avi",
        *("other/name.mp4", "abc.mkv"),
    ]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    wanted = {
        "video7": "video7.mp4",
        "video8.mp4": "all/video8.webm",  # another extension
        "video9": "all/video9.mp4",
        "1004_Juno_00.32.17.010-00.32.20.275": files[4],  # points in the name
        "v_abc": "abc.mkv",  # without the prefix of ActivityNet
        "first/name.mp4": "other/name.mp4",
        "second/name.mp4": "second/name.mp4",  # one file is not the file of two videos
        "video1": "video1",
    }
    assert locate_captioned(list(wanted), tmp_path, prefix="v_") == list(wanted.values())


def test_an_exact_path_comes_first(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.mp4").touch()
    found = locate_captioned(["c/same.mp4", "a/same.mp4", "./b/same.mp4"], tmp_path)
    assert found == ["c/same.mp4", "a/same.mp4", "b/same.mp4"]
