"""Splits scored in one pass equal a slow loop over the videos and classes of each split."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import openvclip
from examples.shapes.model import create_model
from examples.shapes.world import TEMPLATES
from openvclip.checkpoints import load_checkpoint
from openvclip.errors import (
    EvaluationError,
    LabelWarning,
    NonFiniteWeightsError,
    RecordsError,
    UsageError,
    VideoNotFoundError,
)
from openvclip.evaluation import (
    Mixture,
    ProtocolEvaluation,
    Record,
    Records,
    RunOptions,
    Sampling,
    as_json,
    as_table,
    encoding,
    evaluate_protocol,
    time_spent,
)
from openvclip.evaluation.encoding import BatchOptions, encode_videos
from openvclip.models.text_cache import text_cache
from openvclip.video import VideoDataset, read_clip, transforms
from openvclip.video import dataset as dataset_module
from openvclip.video.protocols import Split
from tests.helpers import assert_same_state, snapshot
from tests.world import World

SAMPLING = Sampling(sampler="uniform", views=2)


def expanded() -> tuple[Any, Any]:
    model, tokenizer = create_model()
    return openvclip.expand_temporal_attention(model), tokenizer


def run(
    world: World,
    *,
    splits: list[Split] | None = None,
    videos: Path | None = None,
    mixture: Mixture | None = None,
    out: Path | None = None,
    **options: Any,
) -> ProtocolEvaluation:
    model, tokenizer = expanded()
    return evaluate_protocol(
        model,
        tokenizer,
        world.splits() if splits is None else splits,
        videos or world.folder,
        mixture=mixture,
        sampling=SAMPLING,
        templates=TEMPLATES,
        out=out,
        run=RunOptions(num_workers=0, batch_size=3, **options),
    )


@torch.no_grad()
def slow_logits(world: World, split: Split, theta: dict[str, Tensor] | None) -> Tensor:
    """Encode frame by frame and sum in float64, as in the paper."""
    model, tokenizer = expanded()
    if theta is not None:
        model.load_state_dict(theta)  # the class names are encoded by the same weights: report 36
    classifier = openvclip.ZeroShotClassifier(model, tokenizer, split.class_names, TEMPLATES)
    to_input = transforms.build("released", 32)
    rows = []
    for path, _ in split.samples:
        logits = torch.zeros(len(split.class_names), dtype=torch.float64)
        for view in read_clip(world.folder / path, sampler="uniform", views=2):
            frames = model.encode_image(to_input(view)[None])[0].double()
            frames = frames / frames.norm(dim=-1, keepdim=True)
            cosines = frames @ classifier.text_features.double().T
            logits += model.logit_scale.exp().double() * cosines.mean(dim=0)
        rows.append(logits)
    return torch.stack(rows)


def counted(logits: Tensor, split: Split, k: int) -> float:
    right = sum(
        label in row.argsort(descending=True)[:k]
        for row, (_, label) in zip(logits, split.samples, strict=True)
    )
    return right / len(split.samples)


def test_every_split_at_every_lambda_equals_its_own_slow_evaluation(world: World) -> None:
    tuned, lams = load_checkpoint(world.tuned), (0.0, 0.4, 1.0)
    result = run(world, mixture=Mixture(tuned, lams))
    assert list(result.scores) == list(lams)
    clip = snapshot(expanded()[0])
    seen = set()
    for lam, scores in result.scores.items():
        theta = {name: lam * clip[name] + (1 - lam) * tuned[name] for name in clip}
        for split, score in zip(world.splits(), scores, strict=True):
            expected = slow_logits(world, split, theta)
            assert score.evaluation.predictions.tolist() == expected.argmax(dim=1).tolist()
            for k in (1, 5):
                assert score.evaluation.top(k) == pytest.approx(counted(expected, split, k))
            seen.add(tuple(score.evaluation.predictions.tolist()))
    assert len(seen) > 6  # otherwise the comparisons would prove little


@pytest.mark.parametrize("pooling", ["unit_frames", "frames"])
@torch.no_grad()
def test_the_pooling_of_the_model_is_used(world: World, pooling: Any) -> None:
    (model, _), to_input = expanded(), transforms.build("released", 32)
    samples = world.samples[:2]
    data = VideoDataset(samples, world.folder, transform=to_input, sampling=SAMPLING, details=True)
    with Records(None, {}, 0) as records:
        encode_videos(model, data, records, options=BatchOptions(num_workers=0, pooling=pooling))
        values = records.by_key[0].values[:, 0].double()
    for (path, _), row in zip(samples, values, strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for view in read_clip(world.folder / path, sampler="uniform", views=2):
            frames = model.encode_image(to_input(view)[None])[0].double()
            if pooling == "frames":
                total = total + torch.nn.functional.normalize(frames.mean(dim=0), dim=0)
            else:
                total = total + torch.nn.functional.normalize(frames, dim=-1).mean(dim=0)
        torch.testing.assert_close(row, total, rtol=1e-4, atol=1e-6)


def test_results_of_another_pooling_are_not_continued(world: World, tmp_path: Path) -> None:
    splits = world.splits()[:1]
    result = run(world, splits=splits, out=tmp_path, pooling="frames")
    assert result.settings["pooling"] == "frames"
    with pytest.raises(RecordsError, match="pooling"):
        run(world, splits=splits, out=tmp_path)
    with pytest.raises(UsageError, match="pooling='max': expected 'unit_frames' or 'frames'"):
        RunOptions(pooling="max")  # type: ignore[arg-type]


def test_a_video_is_read_once_for_all_splits_and_lambdas(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()

    def counting(path: str, **settings: Any) -> Tensor:
        read[path] += 1
        return read_clip(path, **settings)

    monkeypatch.setattr(dataset_module, "read_clip", counting)
    result = run(world, mixture=Mixture(load_checkpoint(world.tuned), (0.0, 0.5, 1.0)))
    assert read == {str(world.folder / path): 1 for path, _ in world.samples}
    assert result.timing.clips == len(world.samples)


def test_the_original_encodes_the_texts_on_request(world: World) -> None:
    # Report 36: the released protocol of Open-VCLIP, where both ends have the same text tower.
    model, tokenizer = expanded()
    before = snapshot(model)
    arguments = (model, tokenizer, world.splits(), world.folder)
    settings = {"sampling": SAMPLING, "templates": TEMPLATES, "run": RunOptions(num_workers=0)}
    tuned = load_checkpoint(world.tuned)
    spoiled = {n: v if n.startswith("visual.") else 0.5 * v for n, v in tuned.items()}
    frozen = {n: v if n.startswith("visual.") else before[n] for n, v in tuned.items()}
    cases = [(tuned, "original"), (spoiled, "original"), (frozen, "own"), (spoiled, "own")]
    results = [
        evaluate_protocol(*arguments, mixture=Mixture(state, text=text), **settings)  # type: ignore[arg-type]
        for state, text in cases
    ]
    assert_same_state(model.state_dict(), before)
    ranks = [result.scores[0.0][2].evaluation.ranks.tolist() for result in results]
    assert ranks[0] == ranks[1] == ranks[2]  # the text tower of the checkpoint is not used
    assert ranks[3] != ranks[0]
    assert [result.settings["text"] for result in results] == [text for _, text in cases]


def test_broken_videos_are_wrong_or_left_out_and_listed(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folder / "videos", tmp_path / "videos")
    broken = [world.samples[1][0], world.samples[4][0]]
    (tmp_path / broken[0]).write_bytes(b"no video")
    (tmp_path / broken[1]).unlink()
    with pytest.raises(VideoNotFoundError, match=rf"1 of 10 videos are not in .* \({broken[1]}\)"):
        run(world, videos=tmp_path)
    whole = run(world).scores[None]
    for leave_out in (False, True):
        result = run(world, videos=tmp_path, allow_missing=True, leave_out_broken=leave_out)
        assert [failure.path for failure in result.failures] == [
            str(tmp_path / path) for path in broken
        ]
        for split, score, before in zip(world.splits(), result.scores[None], whole, strict=True):
            readable = [path not in broken for path, _ in split.samples]
            correct = (before.evaluation.ranks == 0) & torch.tensor(readable)
            n = sum(readable) if leave_out else len(readable)
            assert score.evaluation.n_clips == n
            assert score.left_out == (len(readable) - n)
            assert score.evaluation.top1 == pytest.approx(int(correct.sum()) / n)
            assert len(score.class_names) > 8 or score.evaluation.top(9) <= sum(readable) / n


def test_nothing_is_encoded_for_videos_that_cant_be_read(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.folder / "videos", tmp_path / "videos")
    for index in (1, 3, 4, 5):  # one video of the first batch of 3, and all of the second batch
        (tmp_path / world.samples[index][0]).unlink()
    encoded = []

    def counting(model: Any, clips: Tensor, **options: Any) -> Tensor:
        encoded.append(len(clips))
        return openvclip.encode_video(model, clips, **options)

    monkeypatch.setattr(encoding, "encode_video", counting)
    result = run(world, videos=tmp_path, allow_missing=True, out=tmp_path / "out")
    assert encoded == [2 * 2, 3 * 2, 1 * 2]  # two views each
    assert result.timing.clips == 6
    predictions = run(world).scores[None][2].evaluation.predictions.tolist()
    expected = [-1 if index in (1, 3, 4, 5) else predictions[index] for index in range(10)]
    assert result.scores[None][2].evaluation.predictions.tolist() == expected
    run(world, videos=tmp_path, allow_missing=True, out=tmp_path / "out")
    # After the 4 batches of the run of all videos, one batch is encoded again.
    assert encoded[3 + 4 :] == [2 * 2]


def test_a_video_that_is_repaired_is_read_in_the_next_run(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folder / "videos", tmp_path / "videos")
    path = tmp_path / world.samples[0][0]
    good = path.read_bytes()
    path.write_bytes(b"")
    first = run(world, videos=tmp_path, out=tmp_path / "out")
    assert len(first.failures) == 1
    path.write_bytes(good)
    second = run(world, videos=tmp_path, out=tmp_path / "out")
    assert second.failures == []
    assert second.timing.clips == 3  # only the batch of the broken video
    assert second.top(1) == run(world).top(1)
    third = run(world, videos=tmp_path, out=tmp_path / "out")
    assert third.timing.clips == 0
    assert time_spent(third) == "nothing was left to encode"
    assert third.top(1) == second.top(1)


def test_a_model_that_is_expanded_otherwise_is_another_run(world: World, tmp_path: Path) -> None:
    model, tokenizer = create_model()
    options = {"sampling": SAMPLING, "templates": TEMPLATES, "run": RunOptions(num_workers=0)}
    settings = {**options, "out": tmp_path}
    evaluate_protocol(model, tokenizer, world.splits(), world.folder, **settings)
    openvclip.expand_temporal_attention(model, boundary="mask", layers=[0])
    with pytest.raises(RecordsError, match='expand: stored null, requested "0 mask, 1 mask"'):
        evaluate_protocol(model, tokenizer, world.splits(), world.folder, **settings)
    openvclip.restore_spatial_attention(model)
    evaluate_protocol(model, tokenizer, world.splits(), world.folder, **settings)


def test_confusion_and_classes_by_hand(world: World) -> None:
    score = run(world).scores[None][2]
    answers = score.evaluation.predictions.tolist()
    pairs = [(label, answer) for (_, label), answer in zip(world.samples, answers, strict=True)]
    matrix, classes = score.confusion().tolist(), score.per_class()
    for i, name in enumerate(score.class_names):
        assert matrix[i] == [pairs.count((i, j)) for j in range(len(score.class_names))]
        assert classes[name] == pairs.count((i, i)) / sum(label == i for label, _ in pairs)


def test_json_and_table_by_hand(world: World) -> None:
    result = run(world, mixture=Mixture(load_checkpoint(world.tuned), (0.0, 0.5)))
    content = as_json(result, per_class=True, confusion=True)
    for lam, entry in zip((0.0, 0.5), content["results"], strict=True):
        values = torch.tensor(result.top(1, lam), dtype=torch.float64)
        assert entry["lam"] == lam
        assert entry["top1"]["mean"] == pytest.approx(float(values.mean()))
        assert entry["top1"]["std"] == pytest.approx(float(values.std()))
        assert entry["splits"][0]["top1"] == float(values[0])
        assert len(entry["splits"][0]["confusion"]) == 3
        row = [line for line in as_table(result, "B/16").splitlines() if f" {lam:g} |" in line]
        assert f"{100 * float(values.mean()):.1f} ± {100 * float(values.std()):.1f}" in row[0]
    assert sum(content["timing"]["shares"].values()) == pytest.approx(1)
    with pytest.raises(EvaluationError, match=r"lam=0.3: .* expected one of 0\.0, 0\.5"):
        result.top(1, 0.3)


def test_each_protocol_has_its_mean(world: World) -> None:
    first, second, third = world.splits()
    splits = [first._replace(protocol="ep1"), third, second._replace(protocol="ep1")]
    result = run(world, splits=splits)
    alone = [run(world, splits=[split]).top(1)[0] for split in splits]
    assert result.protocols == ["ep1", ""]
    assert result.top(1) == alone
    assert result.top(1, protocol="ep1") == [alone[0], alone[2]]
    assert [entry.name for entry in result.of(protocol="")] == ["all"]
    entries = as_json(result)["results"]
    assert [(entry["protocol"], entry["top1"]["mean"]) for entry in entries] == [
        ("ep1", pytest.approx((alone[0] + alone[2]) / 2)),
        ("", alone[1]),
    ]
    rows = [line.split("|")[2].strip() for line in as_table(result, "B/16").splitlines()[2:]]
    assert rows == ["ep1", ""]
    with pytest.raises(EvaluationError, match="protocol=ep2: the model was not evaluated with"):
        result.top(1, protocol="ep2")


def test_wrong_use_is_told(world: World) -> None:
    with pytest.raises(UsageError, match="without tuned"):
        run(world, mixture=Mixture(None, (0.5,)))
    with pytest.raises(EvaluationError, match="nothing to evaluate"):
        run(world, splits=[])
    path = world.samples[0][0]
    two = [Split("one", ["a", "b"], [(path, 0)]), Split("two", ["a", "b"], [(path, 1)])]
    with pytest.raises(EvaluationError, match="is of class 'a' in one split and of 'b' in two"):
        run(world, splits=two)
    with pytest.raises(VideoNotFoundError, match="no such folder of videos"):
        run(world, videos=world.folder / "absent")


def test_weights_that_are_not_finite_leave_no_record(world: World, tmp_path: Path) -> None:
    # Report 12 (openai/CLIP#222): the accuracy was 0.0, and the exit code 0.
    tuned = load_checkpoint(world.tuned)
    tuned["visual.ln_post.bias"][3] = float("nan")
    options: dict[str, Any] = {"splits": world.splits()[:1], "out": tmp_path}
    mixture = Mixture(tuned, (1.0, 0.5))
    with pytest.raises(NonFiniteWeightsError, match=r"weights \(1\): visual\.ln_post\.bias\."):
        run(world, mixture=mixture, **options)
    assert not list(tmp_path.glob("*.records"))
    settings = json.loads((tmp_path / "settings.json").read_text())
    with Records(tmp_path, settings) as records:  # as an earlier version wrote them
        records.add(Record(0, torch.full((3, 2, 64), float("nan"))))
    with pytest.raises(NonFiniteWeightsError, match=r"visual\.ln_post\.bias"):
        run(world, mixture=mixture, **options)


def test_texts_can_come_from_a_cache(world: World, tmp_path: Path) -> None:
    split = world.splits()[0]
    mixture = Mixture(load_checkpoint(world.tuned), (0.0, 0.5))
    expected = run(world, splits=[split], mixture=mixture)
    for _ in range(2):
        with text_cache(tmp_path):
            result = run(world, splits=[split], mixture=mixture)
        assert len(list((tmp_path / "text-features").iterdir())) == 2  # one for each λ
        for lam in (0.0, 0.5):
            ranks = result.scores[lam][0].evaluation.ranks
            assert torch.equal(ranks, expected.scores[lam][0].evaluation.ranks)


def test_class_names_that_are_equal_within_a_split(world: World) -> None:
    # Report 15 (torchmetrics#2883).
    first = world.splits()[0]
    samples = [(path, i) for path, i in world.samples if i == 3]
    apart = first._replace(
        name="apart", class_names=["a", "b", "c", "SQUARE RESTING", "x"], samples=samples
    )
    run(world, splits=[first, apart])  # equal class names in different splits are no problem
    names = ["star", "b", "c", "STAR", "x"]
    with pytest.warns(LabelWarning, match="2 labels .* 'star' = 'STAR'") as caught:
        run(world, splits=[first, apart._replace(class_names=names)])
    assert len(caught) == 1
