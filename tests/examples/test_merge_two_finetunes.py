"""``merge_two_finetunes.py``: the merged models, and their accuracies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import openvclip
from examples import merge_two_finetunes
from examples.shapes.model import WEIGHTS, create_model
from openvclip.video import Sampling, transforms
from tests.examples.single_files import FRAMES, OTHERS, rows_of
from tests.examples.tiny_videos import model_flags
from tests.helpers import assert_same_state


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


def test_models_with_a_contract_are_used_as_it_says(
    clips: Path,
    tuned: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The row of the first model is what VideoCLIP gives for its folder."""
    monkeypatch.setattr(
        merge_two_finetunes, "merges", lambda clip, first, second: {"first": lambda: first}
    )
    paths = []
    for number, path in enumerate(tuned):
        model, tokenizer = create_model()
        openvclip.load_checkpoint(path, model)
        openvclip.expand_temporal_attention(model, window=2, boundary="mask")
        frames, pixels = Sampling(2, 3, views=2), transforms.build("clip", 32)
        clip = openvclip.VideoCLIP(
            model, tokenizer, sampling=frames, transform=pixels, templates=["{}", "a {}"]
        )
        folder = tmp_path / str(number)
        clip.save_pretrained(folder, config=model_flags()[1])
        paths.append(folder / "open_clip_model.safetensors")
    first = openvclip.VideoCLIP.from_pretrained(tmp_path / "0")
    lines = [line.split(",") for line in (clips / "closed.csv").read_text().splitlines()]
    labels = sorted({name for _, name in lines})
    answers = first.classify([clips / path for path, _ in lines], labels)
    right = [answer.label == name for answer, (_, name) in zip(answers, lines, strict=True)]
    words = ["--first", str(paths[0]), "--second", str(paths[1]), "--videos", str(clips)]
    words += ["--lists", str(clips / "closed.csv"), *model_flags(), *FRAMES[4:]]
    merge_two_finetunes.main(words)
    table = rows_of(capsys.readouterr().out)
    assert table["first"][0] == pytest.approx(sum(right) / len(right), abs=6e-4)
    with pytest.raises(SystemExit, match="without temporal attention, but its contract says"):
        merge_two_finetunes.main([*words, "--frame-by-frame"])
    with pytest.raises(SystemExit, match="--frames 8 contradicts the contract"):
        merge_two_finetunes.main([*words, "--frames", "8"])
    other = openvclip.VideoCLIP.from_pretrained(tmp_path / "1")
    other.sampling = Sampling(4, 3, views=2)
    other.save_pretrained(tmp_path / "1")
    with pytest.raises(SystemExit, match=r"is used with frames\.num_frames = 2 and"):
        merge_two_finetunes.main(words)


def test_a_model_of_another_size_is_an_error(clips: Path, tmp_path: Path) -> None:
    openvclip.save_checkpoint({"visual.proj": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    options = ["--first", str(tmp_path / "other.safetensors"), "--second", str(WEIGHTS)]
    options += ["--lists", str(clips / "closed.csv"), "--videos", str(clips)]
    with pytest.raises(SystemExit, match=r"merge_two_finetunes\.py: error: .*does not fit"):
        merge_two_finetunes.main([*options, *model_flags(), *FRAMES])
