"""``finetune_image_clip.py``: its losses, its choice of λ, captions, Hugging Face models."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import shutil
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
from examples import finetune_image_clip
from examples.shapes.model import create_model, normalise
from openvclip import VideoCLIP, cli
from tests.examples.single_files import CLASSES, OTHERS, rows_of
from tests.examples.tiny_videos import model_flags
from tests.helpers import assert_same_state, same_bits


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
    printed = capsys.readouterr().out
    table = rows_of(printed.partition("Try it")[0])
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
    alone = shutil.copy(tmp_path / "out" / "model.safetensors", tmp_path / "alone.safetensors")
    contract = openvclip.checkpoints.read_contract(alone)
    assert contract is not None
    assert (contract.lam, contract.templates) == (chosen, (finetune_image_clip.TEMPLATE,))
    if not train_text:
        try_the_model(printed, stills, tmp_path / "out", chosen)


def try_the_model(printed: str, stills: Path, out: Path, lam: float | None = None) -> None:
    """The folder has the templates and pixels of the accuracy, and the printed command runs."""
    clip = VideoCLIP.from_pretrained(out)
    assert clip.templates == ("a photo of a {}.",)
    assert clip.transform.name == "clip"
    assert clip.expansion is None
    assert lam is None or clip.contract.lam == lam
    words = shlex.split(printed.rpartition("Try it: openvclip ")[2])
    image = stills / "other" / OTHERS[0] / "0.png"
    words[words.index("IMAGE")] = str(image)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert cli.main([*words, "--json", "--no-cache"]) == 0
    (entry,) = json.loads(shown.getvalue())
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)
    answer = clip.classify(pixels, sorted(CLASSES))
    for row in entry["labels"]:
        expected = float(answer.probabilities[sorted(CLASSES).index(row["label"])])
        assert row["probability"] == pytest.approx(expected, abs=1e-5)


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


def test_a_hugging_face_clip(
    stills: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    clip = VideoCLIP.from_pretrained(out).model.state_dict()
    assert_same_state({name: clip[name] for name in saved}, saved)
    try_the_model(capsys.readouterr().out, stills, out)


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
