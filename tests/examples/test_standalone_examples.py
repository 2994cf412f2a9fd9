"""The single-file examples: each imports openvclip and nothing beside it, and does what it says."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import runpy
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import openvclip
from examples import finetune_image_clip, merge_two_finetunes, open_vclip, sweep_and_plot
from examples.shapes.clips import write_clip
from examples.shapes.drawing import draw_image, draw_video
from examples.shapes.model import WEIGHTS, create_model, normalise
from openvclip import cli
from openvclip.evaluation.figures import Curve
from openvclip.video import read_clip, transforms
from tests.examples.forked import started
from tests.examples.tiny_videos import model_flags
from tests.helpers import REPO, assert_same_state, same_bits

SCRIPTS = ("open_vclip", "finetune_image_clip", "merge_two_finetunes", "sweep_and_plot")
INSTALLED = {"openvclip", "torch", "torchvision", "open_clip", "numpy", "tqdm", "PIL"}
CLASSES = ("square spinning", "heart resting", "star pulsing")
OTHERS = ("ring resting", "tree spinning")
FRAMES = ("--frames", "2", "--sampling-rate", "7", "--num-workers", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``videos/CLASS/N.mp4``, five for each class, and lists of all videos of some classes."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for names, title in ((CLASSES, "closed"), (OTHERS, "zero")):
        lines = []
        for name in names:
            (folder / title / name).mkdir(parents=True)
            shape, action = name.split()
            for index in range(5):
                path = f"{title}/{name}/{index}.mp4"
                write_clip(folder / path, draw_video(shape, "red", action, rng, frames=10))
                lines.append(f"{path},{name}")
        (folder / f"{title}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train``, ``validation`` and ``other``, each with a subfolder of images for each class."""
    folder = tmp_path_factory.mktemp("stills")
    rng = np.random.default_rng(1)
    for title, names in (("train", CLASSES), ("validation", CLASSES), ("other", OTHERS)):
        for name in names:
            (folder / title / name).mkdir(parents=True)
            shape, action = name.split()
            for index in range(4):
                noise = rng.normal(0, 20, (32, 32, 3))
                pixels = (draw_image(shape, "red", action, rng) + noise).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(
                    folder / title / name / f"{index}.png"
                )
    lines = [f"train/{name}/{index}.png,a noisy {name}" for name in CLASSES for index in range(4)]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """The CLIP of the shapes world, in float32."""
    return {name: value.float() for name, value in create_model()[0].state_dict().items()}


@pytest.fixture(scope="module")
def tuned(original: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models with random changes of the image tower."""
    folder, paths = tmp_path_factory.mktemp("tuned"), []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: value + 0.5 * value.std() * torch.randn(value.shape, generator=generator)
            if name.startswith("visual.transformer") and value.ndim > 1
            else value
            for name, value in original.items()
        }
        paths.append(folder / f"tuned{seed}.safetensors")
        openvclip.save_checkpoint(state, paths[-1])
    return paths


def rows_of(text: str) -> dict[str, list[float]]:
    """The rows of a printed table by their first column, the name of a model or a λ."""
    rows = {}
    for line in filter(str.strip, text.splitlines()):
        words = line.split()
        if line[:1].isalpha():  # names of models have spaces, and 16 columns
            words = [line[:16].strip(), *line[16:].split()]
        numbers = [float(word) for word in words[1:] if word.replace(".", "", 1).isdigit()]
        if numbers:
            rows[words[0]] = numbers
    return rows


# The files themselves


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_one_short_file_that_imports_installed_packages_alone(name: str) -> None:
    path = REPO / "examples" / f"{name}.py"
    text = path.read_text()
    assert len(text.splitlines()) < 150
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").partition(".")[0])
    assert imported - INSTALLED <= sys.stdlib_module_names


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_option_with_a_default_states_the_default(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"examples.{name}")
    actions: list[argparse.Action] = []
    with pytest.MonkeyPatch.context() as patch:
        add = argparse.ArgumentParser.add_argument

        def record(self: Any, *args: Any, **kwargs: Any) -> argparse.Action:
            actions.append(add(self, *args, **kwargs))
            return actions[-1]

        patch.setattr(argparse.ArgumentParser, "add_argument", record)
        with pytest.raises(SystemExit):
            module.main(["--help"])
    assert "λ" in capsys.readouterr().out
    for action in actions:
        stated = "default: " in (action.help or "")
        automatic = action.dest in ("help", "device") or action.default in (None, [], False)
        assert stated or automatic or action.required, action.dest


def _run_by_path(folder: str, name: str, arguments: list[str]) -> None:
    """``python .../examples/NAME.py`` in a folder from where ``examples`` is not found."""
    os.chdir(folder)
    script = REPO / "examples" / f"{name}.py"
    sys.path[:] = [entry for entry in sys.path if entry not in ("", str(REPO))]
    for module in [module for module in sys.modules if module.partition(".")[0] == "examples"]:
        del sys.modules[module]
    assert importlib.util.find_spec("examples") is None
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def test_an_example_runs_in_an_empty_folder(clips: Path, tmp_path: Path) -> None:
    """Then the printed command predicts with the model that was written."""
    empty, log = tmp_path / "empty", tmp_path / "log"
    empty.mkdir()
    options = [*model_flags(), *FRAMES, "--videos", str(clips / "closed"), "--out", "run"]
    options += ["--epochs", "2", "--batch-size", "4", "--lr", "1e-3"]
    with started(_run_by_path, str(empty), "open_vclip", options, log=log) as process:
        process.join(120)
        text = log.read_text()
    assert process.exitcode == 0, text
    assert "12 training videos, 3 held out" in text
    assert set(rows_of(text)) >= {"0", "0.5", "1"}
    command = shlex.split(text.splitlines()[-1])
    assert command[:2] == ["openvclip", "predict"]
    command = [str(empty / part) if part.startswith("run/") else part for part in command]
    with started(_predict, command[1:], log=tmp_path / "predicted") as process:
        process.join(120)
        answer = (tmp_path / "predicted").read_text()
    assert process.exitcode == 0, answer
    assert all(name in answer for name in CLASSES)


def _predict(arguments: list[str]) -> None:
    raise SystemExit(cli.main(arguments))


def test_the_readme_lists_every_example_and_no_other() -> None:
    folder = REPO / "examples"
    named = set(re.findall(r"\]\((?!\.\.)([^)#]+)\)", (folder / "README.md").read_text()))
    assert all((folder / path).exists() for path in named)
    scripts = {*folder.glob("*.py"), *folder.glob("*.ipynb"), *folder.glob("loops/*.py")}
    expected = {str(path.relative_to(folder)) for path in scripts if path.stem != "__init__"}
    assert named == expected | {"shapes/", "shapes/report/"}


# open_vclip.py


def test_every_class_with_two_videos_has_one_that_is_held_out() -> None:
    counts = {0: 1, 1: 2, 2: 5, 3: 11}
    samples = [(f"{label}-{i}", label) for label, count in counts.items() for i in range(count)]
    train, held_out = open_vclip.hold_out(samples)
    assert sorted(train + held_out) == sorted(samples)
    assert Counter(label for _, label in held_out) == {1: 1, 2: 1, 3: 2}
    with pytest.raises(openvclip.OpenVCLIPError, match="Each class has one video"):
        open_vclip.hold_out([("a", 0), ("b", 1)])


def test_videos_come_from_subfolders_or_from_a_list(clips: Path, tmp_path: Path) -> None:
    samples, names = open_vclip.read_videos(clips / "closed", None)
    assert names == sorted(CLASSES)
    assert all(Path(path).parts[0] == names[label] for path, label in samples)
    listed, listed_names = open_vclip.read_videos(clips, clips / "closed.csv")
    assert listed_names == names
    assert {(Path(path).name, label) for path, label in listed} == {
        (Path(path).name, label) for path, label in samples
    }
    with pytest.raises(SystemExit, match=r"open_vclip\.py: error: .*no class names"):
        open_vclip.main(["--videos", str(tmp_path), "--out", str(tmp_path / "out")])


def test_the_saved_model_is_the_interpolation_and_keeps_the_text_tower(
    clips: Path, tmp_path: Path, original: dict[str, Tensor]
) -> None:
    """At λ = 1 the file is the original CLIP; at λ = 0.5 it is half way to the file of λ = 0."""
    saved = {}
    for lam in ("0", "0.5", "1"):
        out = tmp_path / lam
        options = [*model_flags(), *FRAMES, "--videos", str(clips), "--out", str(out)]
        options += ["--annotations", str(clips / "zero.csv"), "--epochs", "1", "--lr", "1e-3"]
        open_vclip.main([*options, "--lam", lam])
        saved[lam] = openvclip.load_checkpoint(out / "model.safetensors")
        assert (out / "classes.txt").read_text().splitlines() == sorted(OTHERS)
    assert_same_state({name: saved["1"][name] for name in original}, original)
    moved = {name for name in original if not same_bits(saved["0"][name], original[name])}
    assert moved
    assert all(name.startswith("visual.") or name == "logit_scale" for name in moved)
    for name in moved:
        middle = (saved["0"][name].double() + original[name].double()) / 2
        torch.testing.assert_close(saved["0.5"][name].double(), middle, atol=1e-6, rtol=1e-5)


# finetune_image_clip.py


def image_options(stills: Path, out: Path, *more: str) -> list[str]:
    folders = ["--images", str(stills / "train"), "--validation", str(stills / "validation")]
    folders += ["--test", str(stills / "other"), "--out", str(out), "--num-workers", "0"]
    return [*folders, "--device", "cpu", "--epochs", "1", "--batch-size", "5", *more]


def accuracy_of(model: Any, tokenizer: Any, folder: Path) -> float:
    """Accuracy on a folder of images, computed apart from the example."""
    names = sorted(path.name for path in folder.iterdir())
    texts = tokenizer([f"a photo of a {name}." for name in names])
    right = []
    with torch.no_grad():
        features = functional.normalize(model.encode_text(texts), dim=-1)
        for label, name in enumerate(names):
            for path in sorted((folder / name).iterdir()):
                pixels = normalise(np.array(Image.open(path)))[None]
                right.append(int((model.encode_image(pixels) @ features.T).argmax()) == label)
    return sum(right) / len(right)


@pytest.mark.parametrize("train_text", [False, True])
def test_lambda_is_chosen_on_the_validation_images(
    stills: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    train_text: bool,
) -> None:
    """Against an accuracy that this test computes at each λ, with new text features.

    The trained CLIP lies in the middle of the two models, so the best λ is no end.
    """
    clip, tokenizer = create_model()
    generator = torch.Generator().manual_seed(5)
    changed = "" if train_text else "visual."
    start, end = {}, {}
    for name, value in clip.state_dict().items():
        change = torch.zeros_like(value)
        if name.startswith(changed) and value.ndim > 1:
            change = 0.8 * value.std() * torch.randn(value.shape, generator=generator)
        start[name], end[name] = value + change, value - change
    monkeypatch.setattr(finetune_image_clip, "fine_tune", lambda *_: (start, end))
    finetune_image_clip.main(image_options(stills, tmp_path / "out", *model_flags()))
    table = rows_of(capsys.readouterr().out)
    expected = {}
    for lam in [step / 10 for step in range(11)]:
        clip.load_state_dict(openvclip.interpolate(start, end, lam))
        folders = (stills / "validation", stills / "other")
        expected[lam] = [accuracy_of(clip, tokenizer, folder) for folder in folders]
    best = max(row[0] for row in expected.values())
    chosen = max(lam for lam, row in expected.items() if row[0] == best)
    assert 0 < chosen < 1
    assert set(table) == {f"{lam:g}" for lam in (0, chosen, 1)}
    for lam in (0.0, chosen, 1.0):
        assert table[f"{lam:g}"] == pytest.approx(expected[lam], abs=6e-4)
    saved = openvclip.load_checkpoint(tmp_path / "out" / "model.safetensors")
    merged = openvclip.interpolate(start, end, chosen)
    assert_same_state({name: saved[name] for name in merged}, merged)


@pytest.mark.parametrize("captioned", [False, True])
@pytest.mark.parametrize("train_text", [False, True])
def test_the_loss_of_images(
    captioned: bool, train_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the formulas; the images of equal captions are each other's positives."""
    model, tokenizer = create_model()
    pixels = torch.randn(4, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 2, 2, 1])
    texts = [f"a {name}" for name in CLASSES]
    options = {"captions": captioned, "train_text": train_text, "batch_size": 4, "lr": 0.0}
    args = argparse.Namespace(epochs=1, num_workers=0, device="cpu", **options)
    losses: list[float] = []

    class Recorder:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def step(self, loss: Any, **_: Any) -> Tensor:
            value = loss()
            value.backward()
            losses.append(value.item())
            return value.detach()

    monkeypatch.setattr(openvclip, "InterpolatedWeightRegularizer", Recorder)
    data = TensorDataset(pixels, label)
    finetune_image_clip.fine_tune(model, tokenizer, data, texts, args)
    gradients = {name for name, value in model.named_parameters() if value.grad is not None}
    assert any(name.startswith("visual.") for name in gradients)
    assert any(name.startswith("transformer.") for name in gradients) == train_text
    with torch.no_grad():
        images = model.encode_image(pixels[:, 0], normalize=True)
        names = model.encode_text(tokenizer(texts), normalize=True)
        logits = model.logit_scale.exp() * images @ (names[label] if captioned else names).T
    if not captioned:
        expected = -logits.log_softmax(1)[torch.arange(4), label].mean()
    else:
        rows, columns = logits.log_softmax(1), logits.log_softmax(0)
        matches = [[0], [1, 2], [1, 2], [3]]
        by_row = [-rows[i, match].mean() for i, match in enumerate(matches)]
        by_column = [-columns[match, i].mean() for i, match in enumerate(matches)]
        expected = (torch.stack(by_row).mean() + torch.stack(by_column).mean()) / 2
    assert losses == pytest.approx([float(expected)], rel=1e-4)


def test_captions_train_the_text_tower(stills: Path, tmp_path: Path) -> None:
    options = image_options(stills, tmp_path / "out", *model_flags(), "--lr", "1e-3")
    options[1] = str(stills)  # the paths of the captions begin at the folder of the folders
    finetune_image_clip.main([*options, "--captions", str(stills / "captions.csv"), "--train-text"])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_hugging_face_clip(stills: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    from tests.examples.test_finetune_command import _write_tokenizer

    folder, out = tmp_path / "clip", tmp_path / "out"
    model = tiny_hugging_face_clip(folder)
    _write_tokenizer(folder)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    finetune_image_clip.main(image_options(stills, out, "--hf", str(folder), "--lr", "1e-2"))
    saved = CLIPModel.from_pretrained(out).state_dict()
    image = ("vision_model.", "visual_projection.", "logit_scale")
    text = {name for name in start if not name.startswith(image)}
    assert text
    assert all(same_bits(saved[name], start[name]) for name in text)


def tiny_hugging_face_clip(folder: Path) -> nn.Module:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    words = {"vocab_size": 520, "bos_token_id": 518, "eos_token_id": 519}
    config = CLIPConfig(
        text_config={**sizes, **words, "max_position_embeddings": 32},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model: nn.Module = CLIPModel(config)
    model.save_pretrained(folder)  # type: ignore[operator]
    CLIPImageProcessor().save_pretrained(folder)
    return model


@pytest.mark.parametrize("missing", ["--images", "--validation"])
def test_a_folder_without_classes_is_an_error(stills: Path, tmp_path: Path, missing: str) -> None:
    options = image_options(stills, tmp_path, *model_flags())
    options[options.index(missing) + 1] = str(stills / "train" / CLASSES[0])
    with pytest.raises(SystemExit, match=r"finetune_image_clip\.py: error: .*class folder"):
        finetune_image_clip.main(options)


# merge_two_finetunes.py


def test_the_rows_of_the_merges(original: dict[str, Tensor], tuned: list[Path]) -> None:
    first, second = (openvclip.load_checkpoint(path) for path in tuned)
    models = {
        name: merge() for name, merge in merge_two_finetunes.merges(original, first, second).items()
    }
    assert_same_state(models["CLIP"], original)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    mean = (first[name].double() + second[name].double()) / 2
    torch.testing.assert_close(models["average"][name].double(), mean)
    half = (mean + original[name].double()) / 2
    torch.testing.assert_close(models["average, λ=0.5"][name].double(), half)
    both = first[name] + second[name] - original[name]
    torch.testing.assert_close(models["task vectors"][name], both)
    expected = openvclip.merging.slerp(second, first, 0.5)[name]
    torch.testing.assert_close(models["slerp"][name], expected)
    different = {"ties", "dare + ties", "model stock", "average", "slerp", "first", "second"}
    for row in different:
        close = [r for r in different - {row} if torch.equal(models[r][name], models[row][name])]
        assert not close


def test_merges_are_evaluated_on_videos_and_on_images(
    clips: Path,
    stills: Path,
    tuned: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "closed").symlink_to(clips / "closed")
    (tmp_path / "stills").symlink_to(stills / "other")
    (tmp_path / "videos.csv").write_text((clips / "closed.csv").read_text())
    images = [f"stills/{name}/{index}.png,{name}" for name in OTHERS for index in range(4)]
    (tmp_path / "images.csv").write_text("\n".join(images) + "\n")
    options = ["--first", str(tuned[0]), "--second", str(tuned[1]), "--videos", str(tmp_path)]
    lists = [str(tmp_path / "videos.csv"), str(tmp_path / "images.csv")]
    merge_two_finetunes.main(
        [*options, "--lists", *lists, *model_flags(), *FRAMES, "--frame-by-frame"]
    )
    table = rows_of(capsys.readouterr().out)
    assert len(table) == 10
    model, tokenizer = create_model()
    for row, path in (("CLIP", WEIGHTS), ("second", tuned[1])):
        openvclip.load_checkpoint(path, model)
        pixels = transforms.build("clip", 32)
        classifier = openvclip.ZeroShotClassifier(model, tokenizer, sorted(OTHERS))
        batch = []
        for line in images:
            image = np.asarray(Image.open(tmp_path / line.partition(",")[0]))
            batch.append(pixels(torch.from_numpy(image.copy()).movedim(-1, 0)[None]))
        label = torch.tensor([sorted(OTHERS).index(line.partition(",")[2]) for line in images])
        with torch.no_grad():
            right = (classifier(torch.stack(batch)).argmax(dim=1) == label).double().mean()
        assert table[row][1] == pytest.approx(float(right), abs=6e-4)
        assert table[row][2] == pytest.approx(sum(table[row][:2]) / 2, abs=1.1e-3)


def test_a_model_of_another_size_is_an_error(clips: Path, tmp_path: Path) -> None:
    openvclip.save_checkpoint({"visual.proj": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    options = ["--first", str(tmp_path / "other.safetensors"), "--second", str(WEIGHTS)]
    options += ["--lists", str(clips / "closed.csv"), "--videos", str(clips)]
    with pytest.raises(SystemExit, match=r"merge_two_finetunes\.py: error: .*does not fit"):
        merge_two_finetunes.main([*options, *model_flags(), *FRAMES])


# sweep_and_plot.py


def test_the_table_and_the_picture_have_the_accuracies_at_each_lambda(
    clips: Path,
    tuned: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn: list[Curve] = []
    draw = sweep_and_plot.tradeoff_figure

    def record(curves: list[Curve], *args: Any, **options: Any) -> None:
        drawn.extend(curves)
        draw(curves, *args, **options)

    monkeypatch.setattr(sweep_and_plot, "tradeoff_figure", record)
    picture = tmp_path / "picture.png"
    options = ["--checkpoint", str(tuned[0]), "--videos", str(clips), "--out", str(picture)]
    options += ["--closed-set", str(clips / "closed.csv"), "--zero-shot", str(clips / "zero.csv")]
    options += ["--lam", "0", "0.5", "1", "--views", "1", *model_flags(), *FRAMES]
    sweep_and_plot.main(options)
    table = rows_of(capsys.readouterr().out)
    assert set(table) == {"0", "0.5", "1"}
    with Image.open(picture) as image:
        assert min(image.size) > 300
    (curve,) = drawn
    assert [curve.lams[curve.chosen or 0], curve.name] == [0.5, "tuned1"]
    for place, lam in enumerate((0.0, 0.5, 1.0)):
        row = [100 * curve.closed_set[0, place], 100 * curve.zero_shot[0, place]]
        assert table[f"{lam:g}"] == pytest.approx(row, abs=0.051)
    clip, tokenizer = create_model()
    start = {name: value.clone() for name, value in clip.state_dict().items()}
    openvclip.expand_temporal_attention(clip)
    classifier = openvclip.ZeroShotClassifier(clip, tokenizer, sorted(OTHERS))
    openvclip.interpolate_into(clip, start, openvclip.load_checkpoint(tuned[0]), 0.5)
    right = []
    for label, name in enumerate(sorted(OTHERS)):
        for path in sorted((clips / "zero" / name).iterdir()):
            frames = read_clip(path, num_frames=2, sampling_rate=7)
            with torch.no_grad():
                logits = classifier(transforms.build("released", 32)(frames))
            right.append(int(logits.argmax()) == label)
    assert table["0.5"][1] == pytest.approx(100 * sum(right) / len(right), abs=0.051)


def test_lists_of_numbers_are_refused(clips: Path, tuned: list[Path], tmp_path: Path) -> None:
    (tmp_path / "numbers.csv").write_text("a.mp4,0\n")
    options = ["--checkpoint", str(tuned[0]), "--videos", str(clips), "--zero-shot", "zero.csv"]
    with pytest.raises(SystemExit, match=r"sweep_and_plot\.py: error: .*got class numbers"):
        sweep_and_plot.main(
            [*options, "--closed-set", str(tmp_path / "numbers.csv"), *model_flags(), *FRAMES]
        )
