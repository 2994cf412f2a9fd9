"""``Index.search``: what can be searched for, thresholds, negative queries, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openvclip import VideoCLIP
from openvclip.checkpoints.contract import Confidence
from openvclip.errors import SearchError, VideoError, VideoNotFoundError
from openvclip.search import Clip, Index, Moment, WindowOptions, queries, search_index
from openvclip.search.results import results_as_text
from openvclip.search.searching import SearchResult
from openvclip.video import VideoFrames
from tests.search.reference import Library, Rows, slow_moments
from tests.search.small_index import (
    content,
    expected_vectors,
    new_index,
    tiny_model,
    write_video,
)
from tests.search.tiny_shards import save_model


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("films")
    return [write_video(folder / f"{name}.mp4", 35, seed) for seed, name in enumerate("abc")]


@pytest.fixture(scope="module")
def index(videos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Index:
    made = new_index(tmp_path_factory.mktemp("index") / "x.ovx", tiny_model())
    made.add(videos)
    return made


def library_of(index: Index) -> Library:
    """The windows of an index, read through its public methods."""
    rows = [(p, s, e, v) for p, windows in content(index).items() for s, e, v in windows]
    paths = index.videos
    vectors = np.array([row[3] for row in rows], dtype=np.float16)
    return Library(
        [Rows(0, vectors, None)],
        paths,
        np.array([paths.index(row[0]) for row in rows]),
        np.array([row[1] for row in rows]),
        np.array([row[2] for row in rows]),
    )


def same_moments(found: list[Moment], expected: list[Moment]) -> None:
    assert [(m.path, m.start, m.end, m.peak) for m in found] == [
        (m.path, m.start, m.end, m.peak) for m in expected
    ]
    np.testing.assert_allclose([m.score for m in found], [m.score for m in expected], atol=1e-4)


def unit(vectors: Any) -> np.ndarray:
    rows = np.atleast_2d(np.asarray(vectors, dtype=np.float64))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_sentence_finds_the_moments_of_its_feature(index: Index) -> None:
    feature = unit(index.model.encode_text("a red ball"))
    same_moments(index.search("a red ball", k=50), slow_moments(library_of(index), feature))
    assert index.search("a red ball", k=2) == index.search("a red ball", k=10_000)[:2]


def test_several_queries_are_a_list_of_lists(index: Index) -> None:
    vector = index.model.encode_text("three")
    found = index.search(["one", "two", vector, vector.tolist()], k=3)
    assert found == [index.search(query, k=3) for query in ("one", "two", "three", "three")]
    assert index.search(["one"], k=3) == [index.search("one", k=3)]


def test_windows_that_fit_a_negative_query_better_are_in_no_moment(index: Index) -> None:
    texts = ["zebra", "a boat", "q"]
    features = unit(index.model.encode_text(texts))
    expected = slow_moments(library_of(index), features)
    everything = slow_moments(library_of(index), features[:1])
    assert expected != everything
    same_moments(index.search(texts[0], 50, negative=texts[1:]), expected)
    assert index.search(texts[0], 50, negative=texts[1]) == index.search(
        texts[0], 50, negative=[texts[1]]
    )
    (result,) = search_index(index, "zebra", negative="zebra")
    assert result.moments == []
    assert "negative" in result.reason()


@pytest.mark.parametrize("kind", ["path", "array", "pillow"])
def test_an_image_finds_itself(index: Index, tmp_path: Path, kind: str) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(9).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "p.png")
    query = {"path": tmp_path / "p.png", "array": pixels, "pillow": image.fromarray(pixels)}[kind]
    feature = unit(index.model.encode_image(tmp_path / "p.png"))
    same_moments(index.search(query, k=50), slow_moments(library_of(index), feature))


def test_a_video_is_the_mean_of_its_windows(index: Index, videos: list[Path]) -> None:
    _, vectors = expected_vectors(index.model, videos[1])
    expected = slow_moments(library_of(index), unit(vectors.mean(axis=0)))
    same_moments(index.search(videos[1], k=5), expected[:5])
    assert index.search(Clip(videos[1]), k=5) == index.search(videos[1], k=5)
    frames = np.random.default_rng(0).integers(0, 255, (20, 12, 16, 3), dtype=np.uint8)
    assert len(index.search(VideoFrames(frames, fps=10), k=1)) == 1


@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_part_of_a_video_finds_its_own_window(
    index: Index, videos: list[Path], number: int
) -> None:
    times, _ = expected_vectors(index.model, videos[2])
    start, end = times[number]
    (best,) = index.search(Clip(videos[2], start, end), k=1)
    assert best.path == str(videos[2])
    assert best.start <= start < end <= best.end
    assert best.score == pytest.approx(1, abs=1e-3)
    moment = Moment(str(videos[2]), start, end, 0.5, start)
    assert index.search(moment, k=1) == [best]


@pytest.mark.parametrize("batch", [1, 16])
def test_a_longer_part_is_the_mean_of_the_windows_in_it(
    batch: int, index: Index, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "_BATCH", batch)
    times, vectors = expected_vectors(index.model, videos[0])
    inside = [i for i, (start, _) in enumerate(times) if start in (1.0, 2.0)]
    expected = slow_moments(library_of(index), unit(vectors[inside].mean(axis=0)))
    same_moments(index.search(Clip(videos[0], 1.0, 3.0), k=4), expected[:4])


# --- thresholds --------------------------------------------------------------------------------


def calibrated(index: Index, confidence: Confidence | None) -> Index:
    model = tiny_model()
    model.confidence = confidence
    return Index.open(index.path, model)


def test_a_limit_keeps_the_first_moments(index: Index) -> None:
    moments = index.search("a", k=100)
    for limit in (moments[0].score, moments[len(moments) // 2].score, 0.0, -1.0):
        kept = [moment for moment in moments if moment.score >= limit]
        assert index.search("a", k=100, min_score=limit) == kept
    (result,) = search_index(index, "a", min_score=1.0)
    assert result.moments == []
    assert result.reason() == (
        f"nothing fits: the best moment has the score {moments[0].score:.3f}, below 1"
    )


def test_the_threshold_of_the_model_is_the_limit_for_sentences(
    index: Index, videos: list[Path]
) -> None:
    moments = index.search("a", k=100)
    limit = moments[1].score
    for score in ("cosine", None):
        limited = calibrated(index, Confidence(threshold=limit, score=score))
        assert limited.search("a", k=100) == moments[:2]
        assert limited.search("a", k=100, min_score=-1) == moments
        # Two videos have other cosines than a text and a video.
        assert limited.search(videos[0], k=100) == index.search(videos[0], k=100)
    others = (
        None,
        Confidence(threshold=0.99, score="probability"),
        Confidence(threshold=5.0, score="energy"),
        Confidence(temperature=2.0),
    )
    for confidence in others:
        assert calibrated(index, confidence).search("a", k=100) == moments


def test_a_model_that_is_calibrated_later_brings_its_threshold(
    videos: list[Path], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model")
    index = Index.create(tmp_path / "x.ovx", folder, windows=WindowOptions(seconds=1.0))
    index.add(videos)
    moments = index.search("a star", k=100)
    assert len(moments) > 2
    model = VideoCLIP.from_pretrained(folder)
    model.confidence = Confidence(threshold=moments[1].score, score="cosine")
    model.save_pretrained(folder)
    assert Index.open(index.path).search("a star", k=100) == moments[:2]
    assert Index.open(index.path, folder).search("a star", k=100) == moments[:2]


def test_numbers_of_numpy_are_numbers(index: Index) -> None:
    found = index.search("a", k=2)
    assert index.search("a", k=np.int64(2), min_score=np.float32(-1)) == found
    with pytest.raises(SearchError, match="k="):
        index.search("a", k=np.float32(2))


def test_an_empty_index_has_no_moments(tmp_path: Path) -> None:
    empty = new_index(tmp_path / "e.ovx")
    assert empty.search("a") == []
    (result,) = search_index(empty, "a")
    assert result.reason() == "nothing fits: the index has no videos"


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        ("", {}, "sentence is empty"),
        (["a", " \n"], {}, "sentence is empty"),
        ("a", {"negative": [""]}, "sentence is empty"),
        ([], {}, "list of queries is empty"),
        ("a", {"k": 0}, "k=0"),
        ("a", {"k": True}, "k=True"),
        ("a", {"k": 2.5}, "k=2.5"),
        ("a", {"min_score": 1.5}, "from -1 to 1"),
        ("a", {"min_score": float("nan")}, "from -1 to 1"),
        (torch.ones(3), {}, "have 8 numbers and the query has 3"),
        (torch.ones(2, 8), {}, "Several queries are a list"),
        (torch.zeros(8), {}, "is zero"),
    ],
)
def test_a_query_that_means_nothing_is_an_error(
    index: Index, query: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SearchError, match=message):
        index.search(query, **options)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((2, 1), "end after the start"),
        ((-1, 2), "from the first"),
        ((9, None), "has 3.5 seconds"),
        (("a", None), "expected seconds"),
        ((None, [2]), "expected seconds"),
    ],
)
def test_a_part_that_is_not_there_is_an_error(
    index: Index, videos: list[Path], times: Any, message: str
) -> None:
    with pytest.raises(SearchError, match=message):
        index.search(Clip(videos[0], *times))


def test_files_that_cannot_be_read_are_errors(index: Index, tmp_path: Path) -> None:
    with pytest.raises(VideoNotFoundError):
        index.search(tmp_path / "no.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        index.search(tmp_path / "bad.mp4")


def test_a_str_is_a_sentence_even_if_a_file_has_this_name(index: Index, videos: list[Path]) -> None:
    feature = unit(index.model.encode_text(str(videos[0])))
    same_moments(index.search(str(videos[0]), 3), slow_moments(library_of(index), feature)[:3])


def test_vectors_need_no_model(index: Index) -> None:
    vector = index.model.encode_text("a")
    alone = Index.open(index.path)
    assert alone.search(vector.numpy()) == index.search("a")
    with pytest.raises(SearchError, match="does not say where its model is"):
        alone.search("a")


# --- long sentences ----------------------------------------------------------------------------


class Letters:
    """A tokenizer of letters: a mark, at most 6 letters, a mark, and padding."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = torch.full((len(texts), 8), self.padding)
        for row, text in zip(rows, texts, strict=True):
            ids = [1, *(2 + ord(c) % 50 for c in text.replace(" ", "")[:6]), 63]
            row[: len(ids)] = torch.tensor(ids)
        return rows


@pytest.mark.parametrize("padding", [0, 63])  # of CLIP in open_clip, and in transformers
@pytest.mark.parametrize(
    ("text", "left_out"),
    [("", 0), ("abc", 0), ("abcdef", 0), ("ab cd ef", 0), ("abcdefg", 1), ("a b c d e f g h", 2)],
)
def test_a_sentence_says_how_much_of_it_is_not_read(
    index: Index, padding: int, text: str, left_out: int
) -> None:
    clip = tiny_model().model
    model = VideoCLIP(clip, Letters(padding))
    assert model.tokens_left_out(text) == left_out
    opened = Index.open(index.path, tiny_model())
    opened._model = model
    if left_out:
        with pytest.raises(SearchError, match=f"last {left_out} tokens"):
            opened.search(text)


def test_a_whole_book_is_refused_before_the_model_is_loaded(index: Index) -> None:
    opened = Index.open(index.path)  # it does not say where its model is
    with pytest.raises(SearchError, match="has 500000 characters; expected at most 5000"):
        opened.search("word " * 100_000)


@pytest.mark.parametrize(
    "name", ["new\nline", "\x1b[31mred", "tab\t", "cr\r", "\u202ertl", "bad\udcff"]
)
def test_a_result_is_one_line_whatever_the_names(name: str) -> None:
    moments = [
        Moment(f"/{name}.mp4", 0.0, 1.0, 0.3, 0.5),
        Moment("/ü 日本.mp4", 0.0, 1.0, 0.2, 0.5),
    ]
    text = results_as_text([SearchResult(name, moments, None, 0.3, 2)] * 2)
    lines = text.split("\n")
    assert len(lines) == 9  # twice the query, the head and two moments; an empty line
    assert all(line.isprintable() for line in lines)
    assert len({len(line) for line in lines[1:4]}) == 1
    assert "/ü 日本.mp4" in text
    assert ascii(name)[1:-1] in text


def test_the_tokenizer_of_clip_says_how_much_it_leaves_out() -> None:
    import open_clip

    from openvclip.models.tokenizers import tokens_left_out

    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    for text in (
        "a person riding a horse",
        "word " * 75,
        "x, y! " * 30,
        "supercalifragilistic " * 40,
    ):
        assert tokens_left_out(tokenizer, text) == max(0, len(tokenizer.encode(text)) - 75)
