"""Commands use a model as it was trained, and refuse flags that contradict this."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import openvclip
from examples import sweep_and_plot
from examples.shapes.model import MEAN, STD, WEIGHTS, create_model
from examples.shapes.world import TEMPLATES, class_names
from openvclip import cli
from openvclip.checkpoints import Base, Confidence, load_checkpoint, read_contract
from openvclip.models import usage
from openvclip.models.classifier import ZeroShotClassifier
from openvclip.models.folders import StoredModel
from openvclip.models.saving import describe_folder
from openvclip.models.usage import contract_of
from openvclip.towers.view import Pooling
from openvclip.video import Sampling, read_clip
from openvclip.video.transforms import build
from openvclip.weights import weights_hash
from tests.helpers import REPO
from tests.world import World

CONFIG = str(REPO / "examples" / "shapes" / "shapes-clip.json")
SAMPLING = Sampling(num_frames=4, sampling_rate=1, target_fps=20.0, views=2)
TRANSFORM = build("clip", 32, mean=MEAN, std=STD)
LABELS = class_names("seen")[:6]
POOLINGS: list[Pooling] = ["unit_frames", "frames"]


@pytest.fixture(scope="module", params=POOLINGS)
def run(request: Any, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run: window 2, boundary mask, two layers, 4 frames, 2 views."""
    folder = tmp_path_factory.mktemp("run")
    model, tokenizer = create_model()
    base = Base("shapes-clip", WEIGHTS.name, weights_hash(model.state_dict()))
    openvclip.expand_temporal_attention(model, window=2, boundary="mask", layers=[-1, -2])
    contract = contract_of(
        model, "shapes-clip", TRANSFORM, sampling=SAMPLING, templates=TEMPLATES,
        pooling=request.param, base=base, lam=0.0,
    )  # fmt: skip
    tuned = load_checkpoint(world.tuned)
    texts = {"openvclip": contract.to_json()}
    openvclip.save_checkpoint(tuned, folder / "final.safetensors", metadata=texts)
    openvclip.save_checkpoint(tuned, folder / "finetuned.safetensors", metadata=texts)
    describe_folder(StoredModel(model, tokenizer, contract), folder, "final.safetensors")
    return folder


def expected(world: World, clip: Path, pooling: Pooling, lam: float = 0.0) -> torch.Tensor:
    """The probabilities, with every setting of the training written by hand."""
    model, tokenizer = create_model()
    openvclip.expand_temporal_attention(model, window=2, boundary="mask", layers=[-1, -2])
    original = {name: value.clone() for name, value in model.state_dict().items()}
    mixed = openvclip.interpolate(original, load_checkpoint(world.tuned), lam)
    model.load_state_dict(mixed)
    classifier = ZeroShotClassifier(model, tokenizer, LABELS, TEMPLATES, pooling=pooling)
    clips = TRANSFORM(read_clip(clip, **vars(SAMPLING)))
    with torch.no_grad():
        return classifier(clips).mean(dim=0).softmax(dim=-1)


def predicted(capsys: pytest.CaptureFixture[str], *words: str) -> torch.Tensor:
    cli.main(["predict", *words, "--json", "--top", "6", "--no-cache"])
    (entry,) = json.loads(capsys.readouterr().out)
    by_label = {row["label"]: row["probability"] for row in entry["labels"]}
    return torch.tensor([by_label[label] for label in LABELS])


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of a command that ends with an error."""
    assert cli.main(["predict", *words, "--no-cache"]) != 0
    return capsys.readouterr().err


def pooling_of(run: Path) -> Pooling:
    contract = read_contract(run)
    assert contract is not None
    return usage.pooling_of(contract)


def test_a_folder_says_all(
    run: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = world.folder / world.samples[0][0]
    reference = expected(world, clip, pooling_of(run))
    labels = ["--labels", *LABELS]
    moved = tmp_path / "a folder with spaces"
    shutil.copytree(run, moved)
    ways = [
        ["--model", str(run)],
        ["--model", str(moved)],
        ["--checkpoint", str(run / "final.safetensors")],
        ["--checkpoint", str(run / "finetuned.safetensors")],
    ]
    for way in ways:
        torch.testing.assert_close(
            predicted(capsys, str(clip), *labels, *way), reference, rtol=1e-4, atol=1e-6
        )
    by_python = openvclip.VideoCLIP.from_pretrained(run).classify(clip, LABELS)
    torch.testing.assert_close(by_python.probabilities, reference, rtol=1e-4, atol=1e-6)
    # The trap: with the defaults of the command, other probabilities come out.
    plain = [*world.model_flags, "--checkpoint", str(world.tuned)]
    assert not torch.allclose(predicted(capsys, str(clip), *labels, *plain), reference, atol=1e-3)


def test_converted_and_merged_files_keep_the_settings(
    run: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = world.folder / world.samples[0][0]
    final, out = run / "final.safetensors", tmp_path / "out.safetensors"
    words = [str(clip), "--labels", *LABELS, "--model", CONFIG, "--checkpoint", str(out)]
    for command in (
        ["convert", str(final), "-o", str(out)],
        ["average", str(final), str(run / "finetuned.safetensors"), "-o", str(out), "--overwrite"],
    ):
        cli.main(command)
        capsys.readouterr()
        reference = expected(world, clip, pooling_of(run))
        torch.testing.assert_close(predicted(capsys, *words), reference, rtol=1e-4, atol=1e-6)
    original = tmp_path / "original.safetensors"
    openvclip.save_checkpoint(create_model()[0].state_dict(), original)
    models, options = [str(original), str(final)], ["-o", str(out), "--overwrite"]
    cli.main(["interpolate", *models, "--lam", "0.5", *options])
    capsys.readouterr()
    reference = expected(world, clip, pooling_of(run), lam=0.5)
    torch.testing.assert_close(predicted(capsys, *words), reference, rtol=1e-4, atol=1e-6)
    contract = read_contract(out)
    assert contract is not None
    assert contract.lam == 0.5


def test_lambda_needs_the_original_that_the_contract_names(
    run: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = world.folder / world.samples[0][0]
    words = [str(clip), "--labels", *LABELS, "--model", str(run), "--lam", "0.5"]
    reference = expected(world, clip, pooling_of(run), lam=0.5)
    answer = predicted(capsys, *words, "--pretrained", str(WEIGHTS))
    torch.testing.assert_close(answer, reference, rtol=1e-4, atol=1e-6)
    assert "shapes-clip.safetensors" in refusal(capsys, *words)  # which is not in this folder
    other = tmp_path / "other.safetensors"
    openvclip.save_checkpoint(load_checkpoint(world.tuned), other)
    error = refusal(capsys, *words, "--pretrained", str(other))
    assert "are not those from which the model was trained" in error
    predicted(capsys, *words, "--pretrained", str(other), "--override")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window", "1"], r"--window 1 contradicts .*: .* was trained with window 2"),
        (["--boundary", "zero"], "--boundary zero contradicts .* boundary mask"),
        (["--no-expand"], "--no-expand contradicts .* expand"),
        (["--frames", "8"], "--frames 8 contradicts .* frames 4"),
        (["--sampling-rate", "16"], "--sampling-rate 16 contradicts .* sampling-rate 1"),
        (["--views", "3"], "--views 3 contradicts .* views 2"),
        (["--sampler", "uniform"], "--sampler uniform contradicts .* sampler released"),
        (["--transform", "released"], "--transform released contradicts .* transform clip"),
        (["--text", "original"], "--text original contradicts .* text own"),
        (["--templates", "TEMPLATES"], "--templates .* contradicts .* 'a "),
    ],
)
def test_a_flag_that_contradicts_the_contract_shows_both(
    flags: list[str], message: str, run: Path, world: World, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "t.txt").write_text("a picture of {}\n")
    flags = [str(tmp_path / "t.txt") if word == "TEMPLATES" else word for word in flags]
    clip = str(world.folder / world.samples[0][0])
    words = [clip, "--labels", *LABELS, "--checkpoint", str(run / "final.safetensors")]
    assert re.search(message, refusal(capsys, *words, *flags))


def test_a_flag_that_says_the_same_is_no_contradiction(
    run: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = world.folder / world.samples[0][0]
    flags = ["--window", "2", "--boundary", "mask", "--frames", "4", "--views", "2", "--expand"]
    flags += ["--templates", str(world.folder / "templates.txt"), "--model", CONFIG]
    checkpoint = ["--checkpoint", str(run / "final.safetensors")]
    answer = predicted(capsys, str(clip), "--labels", *LABELS, *flags, *checkpoint)
    torch.testing.assert_close(answer, expected(world, clip, pooling_of(run)), rtol=1e-4, atol=1e-6)


def test_override_uses_the_flag(
    run: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = world.folder / world.samples[0][0]
    words = [str(clip), "--labels", *LABELS, "--model", str(run), "--override"]
    answer = predicted(capsys, *words, "--window", "1", "--views", "1")
    model, tokenizer = create_model(world.tuned)
    openvclip.expand_temporal_attention(model, window=1, boundary="mask", layers=[-1, -2])
    labels = ZeroShotClassifier(model, tokenizer, LABELS, TEMPLATES, pooling=pooling_of(run))
    with torch.no_grad():
        logits = labels(TRANSFORM(read_clip(clip, **vars(SAMPLING.with_(views=1)))))[0]
    torch.testing.assert_close(answer, logits.softmax(dim=-1), rtol=1e-4, atol=1e-6)


def test_override_without_a_contract_has_no_effect(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = str(world.folder / world.samples[0][0])
    error = refusal(capsys, clip, "--labels", "a", "b", *world.model_flags, "--override")
    assert "--override has no effect on a model without a contract" in error


def test_evaluate_uses_the_contract(
    run: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--annotations", str(world.folder / "seen_test.csv"), "--videos", str(world.folder)]
    data += ["--classes", str(world.folder / "classes.txt"), "--num-workers", "0", "--json"]
    cli.main(["evaluate", *data, "--model", str(run), "--out", str(tmp_path / "out")])
    (result,) = json.loads(capsys.readouterr().out)["results"]
    clip_model = openvclip.VideoCLIP.from_pretrained(run)
    names = class_names("seen")
    right = [
        clip_model.classify(world.folder / path, names).label == names[index]
        for path, index in world.samples
    ]
    assert result["splits"][0]["top1"] == pytest.approx(sum(right) / len(right))


def test_the_calibration_belongs_to_the_weights_of_the_folder(
    run: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = read_contract(run)
    assert contract is not None
    folder = tmp_path / "calibrated"
    shutil.copytree(run, folder)
    calibrated = contract.with_(confidence=Confidence(4.0, 0.999, "cosine"))
    (folder / "openvclip.json").write_text(calibrated.to_json(), encoding="utf-8")
    clip = world.folder / world.samples[0][0]
    words = [str(clip), "--labels", *LABELS, "--model", str(folder)]
    cli.main(["predict", *words])
    assert "none of these" in capsys.readouterr().out
    reference = expected(world, clip, pooling_of(run)).log().div(4).softmax(dim=-1)
    torch.testing.assert_close(predicted(capsys, *words), reference, rtol=1e-4, atol=1e-6)


def test_inspect_takes_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["inspect", str(run)])
    said = capsys.readouterr().out
    assert "final.safetensors" in said.splitlines()[0]
    assert "  attention   window 2, boundary mask, layers" in said


def test_the_script_for_a_sweep_uses_the_contract(
    run: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = class_names("seen")
    lines = [f"{path},{names[index]}" for path, index in world.samples]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    expanded = openvclip.VideoCLIP.from_pretrained(run)
    labels = list(dict.fromkeys(names[index] for _, index in world.samples))
    right = [
        expanded.classify(world.folder / path, labels).label == names[index]
        for path, index in world.samples
    ]
    percent = f"{100 * sum(right) / len(right):.1f}"
    videos = ["--videos", str(world.folder), "--model", CONFIG, "--pretrained", str(WEIGHTS)]
    videos += ["--checkpoint", str(run / "final.safetensors"), "--num-workers", "0"]
    lists = ["--closed-set", str(tmp_path / "list.csv"), "--zero-shot", str(tmp_path / "list.csv")]
    with pytest.raises(SystemExit, match="--frames 8 contradicts the contract"):
        sweep_and_plot.main([*videos, *lists, "--frames", "8"])
    sweep_and_plot.main([*videos, *lists, "--lam", "0", "--out", str(tmp_path / "t.png")])
    assert re.search(rf"^0 +{percent} +{percent}$", capsys.readouterr().out, re.MULTILINE)
