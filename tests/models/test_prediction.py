"""``predict`` equals a slow computation; the command ``openvclip predict`` and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import openvclip
from examples.shapes.model import create_model
from examples.shapes.world import TEMPLATES
from openvclip import cli, prompting
from openvclip.checkpoints import load_checkpoint
from openvclip.errors import (
    ClassNamesError,
    LabelWarning,
    NonFiniteWeightsError,
    TextFeaturesWarning,
    UnsupportedModelError,
    UsageError,
    VideoError,
    VideoNotFoundError,
)
from openvclip.models.preprocess import read_image
from openvclip.video import class_names, read_clip, transforms
from tests.helpers import SHARED, tiny_clip
from tests.world import World

Captured = pytest.CaptureFixture[str]
LABELS = ["square resting", "star sliding", "key bouncing"]


@pytest.fixture(scope="module")
def model() -> Any:
    return openvclip.expand_temporal_attention(create_model()[0])


@torch.no_grad()
def slow(model: Any, video: Path, labels: list[str], views: int, frames: int = 8) -> torch.Tensor:
    tokenizer = create_model(None)[1]
    texts = []
    for label in labels:
        rows = model.encode_text(tokenizer([form.format(label) for form in TEMPLATES])).double()
        mean = (rows / rows.norm(dim=-1, keepdim=True)).mean(dim=0)
        texts.append(mean / mean.norm())
    logits = torch.zeros(len(labels), dtype=torch.float64)
    for view in read_clip(video, views=views, num_frames=frames):
        features = model.encode_image(transforms.build("released", 32)(view)[None])[0].double()
        features = features / features.norm(dim=-1, keepdim=True)
        cosines = features @ torch.stack(texts).T
        logits += model.logit_scale.exp().double() * cosines.mean(dim=0) / views
    return logits.exp() / logits.exp().sum()


def test_probabilities_equal_a_slow_computation(world: World, model: Any) -> None:
    video = world.folder / world.samples[1][0]
    prediction = openvclip.predict(model, video, LABELS, templates=TEMPLATES)
    expected = slow(model, video, LABELS, views=3)
    torch.testing.assert_close(prediction.probabilities.double(), expected, rtol=1e-4, atol=1e-6)
    order = expected.argsort(descending=True).tolist()
    assert [label for label, _ in prediction.top(2)] == [LABELS[i] for i in order[:2]]
    assert prediction.label == LABELS[order[0]]
    assert len(prediction.top(99)) == 3
    assert str(prediction).splitlines()[0] == str(video)
    classifier = openvclip.ZeroShotClassifier(model, create_model(None)[1], LABELS, TEMPLATES)
    again = openvclip.predict(classifier, video)
    assert torch.equal(again.probabilities, prediction.probabilities)


def test_wrong_use(world: World, model: Any) -> None:
    video = world.folder / world.samples[0][0]
    with pytest.raises(UsageError, match="labels is None; expected a list of labels"):
        openvclip.predict(model, video)
    with pytest.raises(ClassNamesError, match="more than once: 'a'"):
        openvclip.predict(model, video, ["a", "b", "a"])
    with pytest.raises(ClassNamesError, match=r"labels\[1\] is ' '"):
        openvclip.predict(model, video, ["a", " "])
    with pytest.raises(UsageError, match="vocabulary of 64 tokens"):
        openvclip.predict(tiny_clip(), video, ["a", "b"])
    with pytest.raises(VideoNotFoundError, match="absent"):
        openvclip.predict(model, "absent.mp4", ["a", "b"])


@torch.no_grad()
def test_an_image_is_predicted_by_plain_clip(world: World, model: Any, tmp_path: Path) -> None:
    # Report 47: expanded models too. Report 42: not as a clip of one frame.
    from PIL import Image

    pixels = read_clip(world.folder / world.samples[1][0])[0, 3]  # uint8 [C, H, W]
    path = tmp_path / "frame.PNG"
    Image.fromarray(pixels.movedim(0, -1).numpy()).save(path)
    classifier = openvclip.ZeroShotClassifier(model, create_model(None)[1], LABELS, TEMPLATES)
    plain, image = create_model()[0], transforms.build("released", 32)(pixels[None])
    feature = torch.nn.functional.normalize(plain.encode_image(image), dim=-1)
    expected = (plain.logit_scale.exp() * feature @ classifier.text_features.T).softmax(dim=-1)[0]
    assert torch.equal(openvclip.predict(classifier, path).probabilities, expected)
    sideways = Image.fromarray(pixels.rot90(1, (1, 2)).movedim(0, -1).numpy())
    orientation = Image.Exif()
    orientation[0x0112] = 6  # a viewer turns the image by 90 degrees clockwise
    sideways.save(tmp_path / "phone.jpg", exif=orientation, quality=100, subsampling=0)
    assert (read_image(tmp_path / "phone.jpg").int() - pixels).abs().float().mean() < 3
    ramp = torch.arange(64).view(8, 8) * 1040  # 16 bits a pixel
    Image.fromarray(ramp.numpy().astype("uint16")).save(tmp_path / "deep.png")
    assert torch.equal(read_image(tmp_path / "deep.png").int(), (ramp // 256).int().expand(3, 8, 8))
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(VideoError, match=r"text\.jpg: can't be read as an image"):
        openvclip.predict(classifier, tmp_path / "text.jpg")
    with pytest.raises(VideoNotFoundError, match=r"none\.jpg: no such file"):
        openvclip.predict(classifier, tmp_path / "none.jpg")
    with pytest.raises(UsageError, match="video is a Tensor; expected the path of a file"):
        openvclip.predict(classifier, image)  # type: ignore[arg-type]


def test_models_in_wrappers_and_models_of_others(world: World, model: Any) -> None:
    # Report 46: "a vocabulary of None tokens".
    video = world.folder / world.samples[1][0]
    expected = openvclip.predict(model, video, LABELS).probabilities
    wrapped = nn.DataParallel(model)
    assert torch.equal(openvclip.predict(wrapped, video, LABELS).probabilities, expected)
    head = prompting.VideoClassifier(model, create_model(None)[1], LABELS)
    assert openvclip.predict(head, video).labels == LABELS
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1}
    config = transformers.CLIPConfig(text_config={**sizes, "vocab_size": 9}, vision_config=sizes)
    with pytest.raises(UnsupportedModelError, match="Linear lacks encode_image"):
        openvclip.predict(nn.Linear(1, 1), video, LABELS)
    with pytest.raises(UsageError, match="The tokenizer of CLIPModel is not known"):
        openvclip.predict(transformers.CLIPModel(config), video, LABELS)
    from openvclip.models.hugging_face import HuggingFaceCLIP

    with pytest.raises(UsageError, match="The tokenizer of HuggingFaceCLIP is not known"):
        openvclip.predict(HuggingFaceCLIP(config), video, LABELS)


def test_weights_that_are_not_finite_are_named(world: World) -> None:
    # Report 12 (openai/CLIP#222): the command printed "nan%".
    video = world.folder / world.samples[1][0]
    for name, value, call in (
        ("visual.proj", "nan", openvclip.predict),
        ("visual.ln_post.bias", "inf", openvclip.models.predict_timeline),
    ):
        classifier = openvclip.ZeroShotClassifier(*create_model(), LABELS, ["{}"])
        classifier.model.get_parameter(name).data[0] = float(value)
        with pytest.raises(NonFiniteWeightsError, match=rf"weights \(1\): {name}\."):
            call(classifier, video)


def test_predictions_warn_of_other_text_and_of_a_single_label(world: World) -> None:
    # Reports 36 and 45.
    video = world.folder / world.samples[1][0]
    classifier = openvclip.ZeroShotClassifier(*create_model(), LABELS, ["{}"])
    with torch.no_grad():
        classifier.model.ln_final.bias += 1  # type: ignore[union-attr,operator]
    for call in (openvclip.predict, openvclip.models.predict_timeline):
        with pytest.warns(TextFeaturesWarning):
            call(classifier, video)
        with pytest.warns(LabelWarning, match=r"'a' is the only label, .* 100 % for every video"):
            call(classifier.model, video, ["a"])


# --- the command -------------------------------------------------------------------------------


def command(world: World, *arguments: object) -> int:
    return cli.main(["predict", *map(str, arguments), "--expand", *world.model_flags])


def test_a_file_a_folder_and_a_pattern(world: World, model: Any, capsys: Captured) -> None:
    video = world.folder / world.samples[0][0]
    flags = ["--labels", *LABELS, "--top", 2, "--json", "--views", 1]
    assert command(world, video, *flags) == 0
    (prediction,) = json.loads(capsys.readouterr().out)
    expected = slow(model, video, LABELS, views=1)
    assert prediction["path"] == str(video)
    for entry in prediction["labels"]:
        place = LABELS.index(entry["label"])
        assert entry["probability"] == pytest.approx(float(expected[place]), rel=1e-4, abs=1e-6)
    assert len(prediction["labels"]) == 2
    assert command(world, video.as_uri(), *flags) == 0
    (same,) = json.loads(capsys.readouterr().out)
    assert same == {**prediction, "path": video.as_uri()}
    assert command(world, world.folder / "videos" / "square resting", *flags) == 0
    inside = json.loads(capsys.readouterr().out)
    assert command(world, world.folder / "videos" / "square r*" / "*.mp4", video, *flags) == 0
    fitting = json.loads(capsys.readouterr().out)
    assert {entry["path"] for entry in inside} == {entry["path"] for entry in fitting}
    assert len(inside) == len(fitting) == 2 + 1 - 1  # train and test clip; video only once


def test_labels_of_a_data_set_and_of_a_file(world: World, tmp_path: Path, capsys: Captured) -> None:
    video = world.folder / world.samples[0][0]
    assert command(world, video, "--dataset", "hmdb51", "--top", 99, "--json", "--views", 1) == 0
    (prediction,) = json.loads(capsys.readouterr().out)
    assert {entry["label"] for entry in prediction["labels"]} == set(class_names("hmdb51"))
    assert sum(entry["probability"] for entry in prediction["labels"]) == pytest.approx(1)
    (tmp_path / "labels.txt").write_text("\ufeffstar sliding \r\nkey bouncing\n\n \n", "utf-8")
    assert command(world, video, "--labels-file", tmp_path / "labels.txt", "--views", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(video)
    assert {line[8:] for line in lines[1:]} == {"star sliding", "key bouncing"}


def test_a_checkpoint_between_clip_and_itself(world: World, capsys: Captured) -> None:
    video = world.folder / world.samples[0][0]
    arguments = [video, "--labels", *LABELS, "--json", "--views", 1, "--checkpoint", world.tuned]
    clip = openvclip.expand_temporal_attention(create_model()[0])
    tuned = load_checkpoint(world.tuned)
    texts = clip.state_dict()
    cases = [([], 0.0, "own"), (["--lam", 0.3], 0.3, "own"), (["--lam", 0.3], 0.3, "original")]
    for flags, lam, text in cases:
        assert command(world, *arguments, *flags, "--text", text) == 0
        (prediction,) = json.loads(capsys.readouterr().out)
        mixed = openvclip.expand_temporal_attention(create_model()[0])
        # Report 36: the text tower is that of the evaluated weights, unless the caller asks for
        # the original CLIP.
        mixed.load_state_dict(
            {
                n: lam * texts[n] + (1 - lam) * tuned[n]
                if n.startswith("visual.") or n == "logit_scale" or text == "own"
                else texts[n]
                for n in texts
            }
        )
        expected = slow(mixed, video, LABELS, views=1)
        for entry in prediction["labels"]:
            place = LABELS.index(entry["label"])
            assert entry["probability"] == pytest.approx(float(expected[place]), rel=1e-3, abs=1e-5)


def test_one_broken_video_does_not_stop_the_others(
    world: World, tmp_path: Path, capsys: Captured
) -> None:
    video = world.folder / world.samples[0][0]
    (tmp_path / "b.mp4").write_bytes(b"text")
    (tmp_path / "c.mp4").write_bytes(video.read_bytes())
    flags = ["--labels", *LABELS, "--views", 1]
    assert command(world, tmp_path, *flags) == 2
    printed = capsys.readouterr()
    assert str(tmp_path / "c.mp4") in printed.out
    assert "b.mp4: " in printed.err
    assert "1 of 2 videos can't be read" in printed.err
    assert command(world, tmp_path / "b.mp4", *flags) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_broken_videos_are_in_the_json(world: World, tmp_path: Path, capsys: Captured) -> None:
    """Report 49: failed files were not in the JSON."""
    video = world.folder / world.samples[0][0]
    (tmp_path / "a.mp4").write_bytes(video.read_bytes())
    (tmp_path / "b.mp4").write_bytes(b"text")
    flags = ["--labels", *LABELS, "--views", 1, "--json"]
    assert command(world, tmp_path, *flags) == 2
    printed = capsys.readouterr()
    good, bad = json.loads(printed.out)
    assert good["path"] == str(tmp_path / "a.mp4")
    assert len(good["labels"]) == 3
    assert bad["path"] == str(tmp_path / "b.mp4")
    assert bad["error"] in printed.err
    assert bad.keys() == {"path", "error"}
    assert command(world, tmp_path / "b.mp4", *flags) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out) == [bad]
    assert printed.err == f"openvclip predict: error: {bad['error']}\n"


def test_errors_of_the_command(world: World, tmp_path: Path, capsys: Captured) -> None:
    video = world.folder / world.samples[0][0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice.txt").write_text("a\na\n")
    (tmp_path / "blank.txt").write_text("\n\n")
    calls = {
        "no video files in this folder": [tmp_path / "empty", "--labels", "a", "b"],
        "no file matches this pattern": [tmp_path / "*.avi", "--labels", "a", "b"],
        "absent.mp4: no such file": [tmp_path / "absent.mp4", "--labels", "a", "b"],
        f"(did you mean {tmp_path / 'empty'}?)": [tmp_path / "Empty", "--labels", "a", "b"],
        "twice.txt, line 2: 'a' is on line 1": [video, "--labels-file", tmp_path / "twice.txt"],
        "blank.txt: holds no names": [video, "--labels-file", tmp_path / "blank.txt"],
        "none.txt: no such file": [video, "--labels-file", tmp_path / "none.txt"],
        "more than once: 'a'": [video, "--labels", "a", "a"],
        "dataset='imagenet' is not known": [video, "--dataset", "imagenet"],
        "give --checkpoint too": [video, "--labels", "a", "b", "--lam", "0.5"],
        "--top 0: expected at least 1": [video, "--labels", "a", "b", "--top", "0"],
        "seconds=-1.0": [video, "--labels", "a", "b", "--timeline", "--seconds", "-1"],
        "seconds=0.0": [video, "--labels", "a", "b", "--timeline", "--seconds", "0"],
        "--step is for --timeline": [video, "--labels", "a", "b", "--step", "1"],
    }
    for reason, arguments in calls.items():
        assert command(world, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("openvclip predict: error: ")
        assert reason in error, error


def test_every_real_clip_gets_an_answer(world: World, capsys: Captured) -> None:
    clips = SHARED / "data" / "clips"
    if not clips.is_dir():
        pytest.skip("the shared folder with the real clips is not here")
    assert command(world, clips, "--dataset", "ucf101", "--json", "--views", 1) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert len(predictions) == 73
    names = set(class_names("ucf101"))
    for entry in predictions:
        values = [label["probability"] for label in entry["labels"]]
        assert {label["label"] for label in entry["labels"]} <= names
        assert values == sorted(values, reverse=True)
        assert 0 < sum(values) <= 1 + 1e-5
    assert len({entry["labels"][0]["label"] for entry in predictions}) > 1
