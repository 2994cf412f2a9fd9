"""A retrieval protocol in one pass equals a slow loop over videos, frames and captions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

import openvclip
from openvclip.errors import EvaluationError, RecordsError, VideoNotFoundError
from openvclip.evaluation import (
    Mixture,
    RetrievalEvaluation,
    RunOptions,
    dual_softmax,
    evaluate_retrieval,
    retrieval_json,
    retrieval_metrics,
    retrieval_table,
    time_spent,
)
from openvclip.video import Sampling, read_clip, transforms
from openvclip.video.retrieval import RetrievalSet
from tests.helpers import (
    TEXT,
    VISION,
    assert_same_state,
    randomise,
    snapshot,
    tiny_clip,
    tiny_tokenizer,
)
from tests.world import with_noise

LENGTHS = (15, 62, 31, 48)  # frames of the videos, at 10 frames per second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of 2 to 7 seconds, of noise that changes every second."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    generator = np.random.default_rng(0)
    for i, length in enumerate(LENGTHS):
        with av.open(str(folder / f"v{i}.mp4"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            for number in range(length):
                if number % 10 == 0:
                    picture = generator.integers(0, 255, (4, 4, 3), np.uint8).repeat(8, 0)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.repeat(8, 1)))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return folder


def small_set(counts: tuple[int, ...] = (1, 1, 1, 1)) -> RetrievalSet:
    captions = [[f"caption {i} of {n}" for n in range(count)] for i, count in enumerate(counts)]
    whole = RetrievalSet("tiny", [f"v{i}.mp4" for i in range(len(counts))], captions)
    return whole._replace(sampling=Sampling(num_frames=4, sampler="seconds"))


def run(
    folder: Path,
    data: RetrievalSet,
    *,
    model: Any = None,
    mixture: Mixture | None = None,
    out: Path | None = None,
    **options: Any,
) -> RetrievalEvaluation:
    return evaluate_retrieval(
        tiny_clip() if model is None else model,
        tiny_tokenizer,
        data,
        folder,
        mixture=mixture,
        out=out,
        run=RunOptions(batch_size=3, num_workers=0, **options),
    )


@torch.no_grad()
def slow(model: Any, folder: Path, data: RetrievalSet, pooling: str = "unit_frames") -> Tensor:
    """The similarities ``[texts, videos]``: each video for itself, in float64."""
    model = model.double()
    transform = transforms.build("clip", 8)
    columns = []
    for path in data.videos:
        clip = read_clip(folder / path, sampler="seconds", num_frames=data.sampling.num_frames)
        frames = openvclip.towers.encode_frames(model, transform(clip).double())[0]
        if pooling == "unit_frames":
            frames = frames / frames.norm(dim=-1, keepdim=True)
        mean = frames.mean(dim=0)
        columns.append(mean / mean.norm())
    captions = [text for texts in data.captions for text in texts]
    texts = model.encode_text(tiny_tokenizer(captions))
    texts = texts / texts.norm(dim=-1, keepdim=True)
    return model.logit_scale.exp() * texts @ torch.stack(columns).T


def assert_scored(result: Any, expected: Tensor, counts: list[int] | None) -> None:
    torch.testing.assert_close(
        result.similarities.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    assert result.metrics == retrieval_metrics(expected, counts)
    assert result.dual_softmax == retrieval_metrics(dual_softmax(expected), counts)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (2, 1, 3, 1)])
def test_it_equals_a_slow_loop_at_each_lambda(
    counts: tuple[int, ...], expanded: bool, folder: Path
) -> None:
    """The clips have 2, 4, 4 and 4 of 2, 7, 4 and 5 seconds: no padding takes part."""
    data, lams = small_set(counts), (0.0, 0.3, 1.0)
    several = list(counts) if max(counts) > 1 else None

    def model(seed: int = 0) -> Any:
        clip = tiny_clip(seed)
        return openvclip.expand_temporal_attention(clip, window=2) if expanded else clip

    tuned, original = snapshot(model(1)), snapshot(model())
    live = model()
    result = run(folder, data, model=live, mixture=Mixture(tuned, lams))
    assert_same_state(snapshot(live), original)
    assert list(result.scores) == list(lams)
    for lam in lams:
        mixed = model()
        mixed.load_state_dict({n: lam * original[n] + (1 - lam) * tuned[n] for n in original})
        assert_scored(result.of(lam), slow(mixed, folder, data), several)
    assert result.of(0.0).similarities.shape == (sum(counts), 4)


def test_the_model_alone_and_other_poolings(folder: Path) -> None:
    data = small_set()
    for pooling in ("unit_frames", "frames"):
        result = run(folder, data, pooling=pooling)
        assert_scored(result.of(), slow(tiny_clip(), folder, data, pooling), None)


def test_a_protocol_with_several_captions_has_its_metrics_also_if_each_video_has_one(
    folder: Path,
) -> None:
    data = small_set()._replace(several=True)
    matrix = slow(tiny_clip(), folder, data)
    expected = retrieval_metrics(matrix, [1, 1, 1, 1])
    assert expected != retrieval_metrics(matrix), "the median of an even number of captions"
    assert run(folder, data).of().metrics == expected


def test_captions_are_cut_to_the_words_of_the_protocol(folder: Path) -> None:
    torch.manual_seed(0)
    text = {**TEXT, "context_length": 77, "vocab_size": 49408}
    model = randomise(open_clip.CLIP(embed_dim=8, vision_cfg=dict(VISION), text_cfg=text)).eval()
    tokenizer, long = SimpleTokenizer(context_length=77), "a man " * 40
    data = small_set()._replace(captions=[[long + word] for word in ("a", "b", "c", "d")], words=12)
    options = RunOptions(num_workers=0)
    result = evaluate_retrieval(model, tokenizer, data, folder, run=options)
    short = [["a man " * 5] for _ in data.captions]  # with both marks these are 12 tokens
    other = data._replace(captions=short, words=None)
    expected = evaluate_retrieval(model, tokenizer, other, folder, run=options)
    assert torch.equal(result.of().similarities, expected.of().similarities)
    assert result.of().metrics["text_to_video"]["MedianR"] == 2.5, "four equal captions"
    assert result.settings["words"] == 12


# --- videos that can't be read -------------------------------------------------------------------


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """The folder of the videos, in which v1.mp4 is damaged and v3.mp4 is missing."""
    for name in ("v0.mp4", "v2.mp4"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "v1.mp4").write_bytes(b"\0" * 500)
    return tmp_path


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (2, 3, 1, 1)])
def test_videos_that_can_not_be_read_have_the_worst_ranks(
    counts: tuple[int, ...], folder: Path, damaged: Path
) -> None:
    data = small_set(counts)
    several = list(counts) if max(counts) > 1 else None
    whole = slow(tiny_clip(), folder, data)
    found = [0, 2]
    result = run(damaged, data, allow_missing=True)
    expected = torch.full_like(whole, -math.inf)
    expected[:, found] = whole[:, found]
    weighed = expected.clone()
    weighed[:, found] = dual_softmax(whole[:, found])
    score = result.of()
    assert score.metrics == retrieval_metrics(expected, several)
    assert score.dual_softmax == retrieval_metrics(weighed, several)
    assert (score.n_texts, score.n_videos, score.left_out) == (sum(counts), 4, 0)
    assert [failure.position for failure in result.failures] == [1, 3]

    result = run(damaged, data, allow_missing=True, leave_out_broken=True)
    rows = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    kept = whole[torch.isin(rows, torch.tensor(found))][:, found]
    score = result.of()
    assert_scored(score, kept, None if several is None else [counts[i] for i in found])
    assert (score.n_videos, score.left_out) == (2, 2)


def test_captions_of_missing_videos_are_counted(folder: Path) -> None:
    videos = [f"v{i}.mp4" for i in range(2)] + [f"video{i}" for i in range(12)]
    data = RetrievalSet("tiny", videos, [["a man"]] * 2 + [["a", "b"]] * 12)
    with pytest.raises(VideoNotFoundError) as caught:
        run(folder, data)
    text = str(caught.value)
    assert "12 of 14 videos, with 24 of 26 captions, are not in" in text
    assert ", ".join(videos[2:12]) + ", ..." in text  # the first ten
    assert videos[12] not in text
    assert "--allow-missing-videos" in text
    with pytest.raises(VideoNotFoundError, match="no such folder"):
        run(folder / "gone", data)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    data = small_set()
    cases: dict[str, RetrievalSet] = {
        "has 0 videos and captions of 0 videos": RetrievalSet("tiny", [], []),
        "has 4 videos and captions of 1 videos": data._replace(captions=[["a"]]),
        r"videos without captions \(1\): v2.mp4": data._replace(captions=[["a"], ["b"], [], ["c"]]),
        r"listed more than once \(1\): v0.mp4": data._replace(videos=["v0.mp4"] * 4),
    }
    for message, wrong in cases.items():
        with pytest.raises(EvaluationError, match=message):
            run(folder, wrong)
    empty = RetrievalSet("tiny", ["a.mp4"], [["a"]])
    with pytest.raises(EvaluationError, match="None of the 1 videos of 'tiny' can be read"):
        run(folder, empty, allow_missing=True)
    with pytest.raises(EvaluationError, match=r"lam=0\.5: the model was not evaluated"):
        run(folder, data).of(0.5)


# --- stopping, tables ----------------------------------------------------------------------------


def test_a_run_goes_on_and_its_settings_are_checked(folder: Path, tmp_path: Path) -> None:
    data, out = small_set(), tmp_path / "out"
    first = run(folder, data, out=out)
    assert first.timing.clips == 4
    (records,) = out.glob("*.records")
    records.write_bytes(records.read_bytes()[:-5])  # the last batch was not written to its end
    again = run(folder, data, out=out)
    assert again.timing.clips == 1
    assert again.of() == first.of()
    assert torch.equal(again.of().similarities, first.of().similarities)
    other = data._replace(captions=[["x"], ["y"], ["z"], ["w"]], words=5)
    assert run(folder, other, out=out).timing.clips == 0, "other captions, the same videos"
    with pytest.raises(RecordsError, match="num_frames: stored 4, requested 3"):
        run(folder, data._replace(sampling=data.sampling.with_(num_frames=3)), out=out)


def test_json_and_table(folder: Path) -> None:
    result = run(folder, small_set(), mixture=Mixture(with_noise(snapshot(tiny_clip())), [0, 0.5]))
    content = retrieval_json(result, dual_softmax=True)
    assert json.loads(json.dumps(content))["results"] == content["results"]
    assert [entry["lam"] for entry in content["results"]] == [0.0, 0.5]
    assert "dual_softmax" not in retrieval_json(result)["results"][0]
    for dual in (False, True):
        lines = retrieval_table(result, "tiny", dual_softmax=dual).splitlines()
        titles = [cell.strip() for cell in lines[0].split("|")[1:-1]]
        assert titles[2:7] == ["T2V R@1", "T2V R@5", "T2V R@10", "T2V MdR", "T2V MnR"]
        for line, entry in zip(lines[2:], content["results"], strict=True):
            row = dict(zip(titles, (c.strip() for c in line.split("|")[1:-1]), strict=True))
            metrics = entry["dual_softmax"] if dual else entry
            assert float(row["λ"]) == entry["lam"]
            assert float(row["T2V R@1"]) == round(metrics["text_to_video"]["R1"], 1)
            assert float(row["V2T MnR"]) == round(metrics["video_to_text"]["MeanR"], 1)
    assert time_spent(result).startswith("4 clips in ")


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_a_model_of_transformers(name: str, folder: Path) -> None:
    """VideoCLIP gives the features; the bias of SigLIP changes no rank, and would turn around the
    dual softmax."""
    from tests.tiny_transformers import make, make_tokenizer

    model = make(name)
    data = small_set()._replace(
        captions=[["a photo of archery"], ["horse race"], ["a"], ["the video"]]
    )
    transform = transforms.build("clip", 8)
    result = evaluate_retrieval(
        model, make_tokenizer(), data, folder, transform=transform, run=RunOptions(num_workers=0)
    )
    video_clip = openvclip.VideoCLIP(
        model, make_tokenizer(), sampling=data.sampling, transform=transform
    )
    texts = video_clip.encode_text([text for (text,) in data.captions])
    videos = video_clip.encode_video([folder / name for name in data.videos])
    expected = model.logit_scale.exp().item() * texts @ videos.T
    torch.testing.assert_close(result.of().similarities, expected)
