"""Models of transformers from a folder: loading, transforms and the commands."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import openvclip
from openvclip import cli
from openvclip.errors import (
    MissingDependencyError,
    ModelNameError,
    StateMismatchError,
    UnsupportedModelError,
    UsageError,
    VideoOptionError,
)
from openvclip.models import load_model, predict, predict_timeline, transform_for
from openvclip.models.hugging_face import HuggingFaceCLIP
from openvclip.models.preprocess import transform_of_processor
from openvclip.towers import encode_images, is_expanded
from openvclip.training.inputs import load_original
from tests.helpers import assert_same_state, randomise, same_bits, snapshot
from tests.tiny_transformers import PIXELS, make, make_tokenizer, save_folder, transformers
from tests.world import World

LOADED = [
    "CLIPModel",
    "SiglipModel",
    "Siglip2Model",
    "ChineseCLIPModel",
    "CLIPSegModel",
    "AlignModel",
]
LABELS = ["archery", "surfing", "the horse race"]
FRAMES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 40, 56), np.uint8))


# --- transforms --------------------------------------------------------------------------------


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def processor(name: str, **settings: Any) -> Any:
    pytest.importorskip("torchvision")
    return getattr(transformers, f"{name}ImageProcessor")(**settings)


CLIP = {"size": {"shortest_edge": 20}, "crop_size": square(16)}


@pytest.mark.parametrize(
    ("name", "settings", "transform"),
    [
        ("CLIP", {"size": {"shortest_edge": 16}, "crop_size": square(16)}, "clip"),
        ("CLIP", {**CLIP, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, "clip"),
        ("CLIP", {**CLIP, "do_normalize": False}, "clip"),
        ("ChineseCLIP", {"size": square(16), "crop_size": square(16)}, "squash"),
        ("Siglip", {"size": square(16)}, "squash"),
        ("Siglip", {"size": square(16), "resample": 2}, "squash_bilinear"),
        (
            "EfficientNet",
            {"size": square(16), "rescale_factor": 1 / 127.5, "rescale_offset": True}
            | {"include_top": False, "do_normalize": False},
            "squash",
        ),
    ],
)
def test_a_transform_does_what_the_processor_does(
    name: str, settings: dict[str, Any], transform: str
) -> None:
    images = processor(name, **settings)
    expected = images(images=list(FRAMES), return_tensors="pt").pixel_values
    made = transform_of_processor(images)
    assert (made.name, made.size) == (transform, 16)
    # torch 2.7 rounds some 8-bit values of the bilinear scaling to the other side.
    level = 1.1 / 255 / made.std[0] if made.name == "squash_bilinear" else 1e-5
    torch.testing.assert_close(made(FRAMES), expected, rtol=0, atol=level)
    holder = transformers.CLIPProcessor.__new__(transformers.CLIPProcessor)
    holder.image_processor = images
    assert transform_for(make("CLIPModel"), processor=holder) == made
    released = transform_for(make("CLIPModel"), "released", processor=images)
    assert (released.name, released.size) == ("released", PIXELS)  # the size of the model
    assert (released.mean, released.std) == (made.mean, made.std)


def test_the_default_mean_and_size_are_those_of_the_kind_of_models() -> None:
    for name, mean in (("CLIPModel", 0.48145466), ("Siglip2Model", 0.5), ("CLIPSegModel", 0.485)):
        made = transform_for(make(name))
        assert (made.name, made.size, made.mean[0]) == ("released", PIXELS, mean)
    with pytest.raises(UsageError, match=r"pixels of AlignModel are not known\. .*processor="):
        transform_for(make("AlignModel"))
    assert transform_for(make("AlignModel"), "clip", processor=processor("Siglip")).size == 32


def test_a_loaded_model_has_the_mean_of_the_processor_beside_it(tmp_path: Path) -> None:
    for name in ("CLIPModel", "AlignModel"):
        model = save_folder(name, tmp_path / name)
        images = processor("CLIP", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
        images.save_pretrained(tmp_path / name)
        made = transform_for(type(model).from_pretrained(tmp_path / name))
        assert (made.name, made.mean, made.std) == ("released", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("model", "images", "settings", "transform"),
    [
        ("SiglipModel", "Siglip", {"size": square(PIXELS), "resample": 2}, "squash_bilinear"),
        ("SiglipModel", "Siglip", {"size": square(PIXELS), "resample": 3}, "squash"),
        ("SiglipModel", "Siglip", {"size": square(PIXELS), "resample": 0}, "released"),
        ("CLIPModel", "CLIP", CLIP, "released"),
        ("Siglip2Model", "Siglip2", {"max_num_patches": 4}, "released"),
    ],
)
def test_a_folder_without_a_contract_has_the_pixels_of_its_processor(
    model: str, images: str, settings: dict[str, Any], transform: str, tmp_path: Path
) -> None:
    save_folder(model, tmp_path)
    processor(images, image_mean=[0.1, 0.2, 0.3], **settings).save_pretrained(tmp_path)
    made = openvclip.VideoCLIP.from_pretrained(tmp_path).transform
    assert (made.name, made.size, made.mean) == (transform, PIXELS, (0.1, 0.2, 0.3))


def test_the_processor_of_naflex_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"Siglip2ImageProcessor\w* .* keeps the shape .*NaFlex"):
        transform_of_processor(processor("Siglip2"))


def test_processors_that_no_transform_repeats() -> None:
    for name, settings in (
        ("Siglip2", {}),
        ("CLIP", {"size": {"shortest_edge": 16}, "crop_size": square(16), "resample": 0}),
        ("EfficientNet", {"do_center_crop": True}),
    ):
        with pytest.raises(UsageError, match=rf"{name}ImageProcessor\w* resizes in a way.*'clip'"):
            transform_of_processor(processor(name, **settings))
    with pytest.raises(UsageError, match=r"processor is a .*; expected an image processor"):
        transform_for(make("CLIPModel"), processor=make_tokenizer())
    for changes in ({"short_side": 20}, {"crops": 3}):
        with pytest.raises(VideoOptionError, match="with 'squash'"):
            openvclip.video.transforms.build("squash", 16, **changes)


# --- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADED)
def test_a_folder_is_loaded_with_its_tokenizer_and_processor(name: str, tmp_path: Path) -> None:
    saved = save_folder(name, tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded.model) is type(saved)
    assert not loaded.model.training
    assert_same_state(snapshot(loaded.model), snapshot(saved))
    assert loaded.name == tmp_path.name
    assert loaded.transform.name == "released"
    assert loaded.transform.mean[0] == (0.5 if name.startswith("Siglip") else 0.48145466)
    images = torch.randn(1, 3, loaded.transform.size, loaded.transform.size)
    assert same_bits(encode_images(loaded.model, images), encode_images(saved, images))
    texts = openvclip.models.class_features(loaded.model, loaded.tokenizer, LABELS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert same_bits(texts, openvclip.models.class_features(saved, tokenizer, LABELS))


def test_half_precision_is_loaded_as_float32(tmp_path: Path) -> None:
    save_folder("CLIPModel", tmp_path).bfloat16().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), expand=True, transform="clip")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert is_expanded(loaded.model)
    assert loaded.transform.name == "clip"
    for file in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / file).unlink(missing_ok=True)  # the values of CLIP are known
    assert load_model(str(tmp_path)).transform.mean[0] == 0.48145466


def test_fine_tuned_weights_and_the_start_of_a_training(tmp_path: Path) -> None:
    saved = save_folder("SiglipModel", tmp_path / "clip")
    tuned = snapshot(randomise(make("SiglipModel"), seed=5))
    openvclip.save_checkpoint(tuned, tmp_path / "tuned.safetensors")
    loaded = load_model(str(tmp_path / "clip"), checkpoint=tmp_path / "tuned.safetensors")
    assert loaded.tuned is not None
    assert_same_state(dict(sorted(loaded.tuned.items())), dict(sorted(tuned.items())))
    assert_same_state(snapshot(loaded.model), snapshot(saved))
    start = load_original("", "", hugging_face=str(tmp_path / "clip"))
    assert (start.transform.name, start.transform.mean) == ("train", (0.5, 0.5, 0.5))
    start = load_original(
        str(tmp_path / "clip"), "openai", start_from=tmp_path / "tuned.safetensors"
    )
    assert_same_state(snapshot(start.model), tuned)
    del tuned["vision_model.post_layernorm.bias"]
    openvclip.save_checkpoint(tuned, tmp_path / "less.safetensors")
    with pytest.raises(StateMismatchError, match=r"missing \(1\): vision_model\.post_layernorm\.b"):
        load_model(str(tmp_path / "clip"), checkpoint=tmp_path / "less.safetensors")


def test_a_folder_that_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(ModelNameError, match=r"no config\.json with a model_type.*'local-dir:"):
        load_model(str(tmp_path))
    make("CLIPModel").save_pretrained(tmp_path / "clip")
    with pytest.raises(
        ModelNameError, match=r"tokenizer of .*clip knows no words.*save_pretrained"
    ):
        load_model(str(tmp_path / "clip"))
    make_tokenizer().save_pretrained(tmp_path / "clip")
    with pytest.raises(ModelNameError, match=r"pretrained is 'openai', but .* weights already"):
        load_model(str(tmp_path / "clip"), "openai")
    make("CLIPModel").vision_model.save_pretrained(tmp_path / "vision")
    with pytest.raises(UnsupportedModelError, match="vision: CLIPVisionModel has no text tower"):
        load_model(str(tmp_path / "vision"))
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    (tmp_path / "clip" / "config.json").write_text(json.dumps({**config, "model_type": "none"}))
    with pytest.raises(ModelNameError, match=r"transformers can't load .*none"):
        load_model(str(tmp_path / "clip"))
    deeper = {**config["text_config"], "num_hidden_layers": 3}
    config["text_config"] = deeper
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    with pytest.raises(StateMismatchError, match=r"would be random(.|\n)*text_model\.encoder\.lay"):
        load_model(str(tmp_path / "clip"))


def test_the_hub_without_a_connection_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub would try again for half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(ModelNameError, match=r"load nobody/nothing: .*not be reached from here"):
        load_model("transformers:nobody/nothing")
    with pytest.raises(ModelNameError, match=r"hf-hub:nobody/nothing can't be downloaded: http"):
        load_model("hf-hub:nobody/nothing")
    assert time.perf_counter() - started < 5


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    monkeypatch.delitem(sys.modules, "openvclip.models.hugging_face")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"loaded with transformers: pip install"):
        load_model(str(tmp_path))


def test_a_name_of_the_hub_says_both_libraries() -> None:
    with pytest.raises(
        ModelNameError, match=r"ViT-B-32-quickgelu.*'transformers:openai/clip-vit-b"
    ):
        load_model("openai/clip-vit-base-patch32")
    with pytest.raises(ModelNameError, match=r"'hf-hub:some/one'.*'transformers:some/one'"):
        load_model("some/one")


# --- predictions -------------------------------------------------------------------------------


def test_predictions_with_plain_models(world: World, tmp_path: Path) -> None:
    video = world.folder / world.samples[0][0]
    saved = save_folder("SiglipModel", tmp_path)
    plain = type(saved).from_pretrained(tmp_path)
    clip = openvclip.video.read_clip(video, **vars(openvclip.video.Sampling()))
    pixels = transform_for(saved)(clip)
    classifier = openvclip.ZeroShotClassifier(saved, make_tokenizer(), LABELS)
    with torch.no_grad():
        expected = classifier(pixels).mean(dim=0).softmax(dim=-1)
    found = predict(plain, video, LABELS)  # the tokenizer is in the folder of the model
    torch.testing.assert_close(found.probabilities, expected)
    given = predict(saved, video, LABELS, tokenizer=make_tokenizer())
    assert torch.equal(given.probabilities, found.probabilities)
    timeline = predict_timeline(plain, video, LABELS, num_frames=2, seconds=0.2, progress=False)
    assert timeline.probabilities.shape[1] == 3
    with pytest.raises(
        UsageError, match=r"The tokenizer of SiglipModel is not known.*transformers"
    ):
        predict(saved, video, LABELS)
    assert isinstance(HuggingFaceCLIP(make("CLIPModel").config), transformers.CLIPModel)


@pytest.mark.filterwarnings("ignore:64 labels get the same")
def test_the_commands_take_the_folder(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_folder("CLIPModel", tmp_path / "clip")
    video = str(world.folder / world.samples[0][0])
    openvclip.save_checkpoint(
        randomise(make("CLIPModel"), seed=5).state_dict(), tmp_path / "tuned.safetensors"
    )
    flags = ["--model", str(tmp_path / "clip"), "--no-cache", "--device", "cpu"]
    tuned = ["--checkpoint", str(tmp_path / "tuned.safetensors"), "--lam", "1"]
    shown = []
    for more in ([], ["--text", "original", *tuned, "--no-expand"]):
        arguments = ["predict", video, "--labels", *LABELS, "--json", *flags, *more]
        assert cli.main(arguments) == 0
        (entry,) = json.loads(capsys.readouterr().out)
        shown.append({row["label"]: row["probability"] for row in entry["labels"]})
    expected = predict(model, video, LABELS, tokenizer=make_tokenizer())
    for label, value in expected.top():
        assert all(probability[label] == pytest.approx(value, abs=1e-6) for probability in shown)
    assert cli.main(["predict", video, "--labels", *LABELS, *flags, "--pretrained", "openai"]) != 0
    assert "has weights already" in capsys.readouterr().err
    data = ["--annotations", str(world.folder / "seen_test.csv"), "--videos", str(world.folder)]
    data += ["--classes", str(world.folder / "classes.txt"), "--out", str(tmp_path / "out")]
    data += ["--views", "1", "--frames", "2", "--num-workers", "0"]
    assert cli.main(["evaluate", *flags, *data]) == 0
    assert (tmp_path / "out" / "results.json").is_file()
