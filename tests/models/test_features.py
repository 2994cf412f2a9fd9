"""Models of transformers in the classifiers: features, logits, tokenizers and refusals.

The references are transformers' own methods and processors.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from openvclip import (
    ZeroShotClassifier,
    encode_video,
    expand_temporal_attention,
    interpolate,
    prompting,
)
from openvclip.errors import UnsupportedModelError, UsageError
from openvclip.evaluation import sweep
from openvclip.models.classifier import class_features
from openvclip.models.features import encode_text, is_transformers, require_clip
from openvclip.models.text_cache import text_cache
from openvclip.models.tokenizers import as_tokenizer
from openvclip.towers import encode_images
from openvclip.training.methods import choose_trained
from tests.helpers import gradients, random_video, randomise, same_bits, snapshot, tiny_clip
from tests.tiny_transformers import (
    EXPANDED,
    LENGTH,
    MODELS,
    make,
    make_tokenizer,
    pixels_of,
    transformers,
)

TEXTS = ["a photo of archery", "Surfing", "the horse race ."]
NAMES = ["archery", "surfing", "the horse race"]
# The towers that see the padding, or that padding can't reach.
UNMASKED = {"CLIPModel", "SiglipModel", "Siglip2Model", "MetaClip2Model", "CLIPSegModel"}
UNMASKED |= {"GroupViTModel", "OwlViTModel"}
PADDED = {"SiglipModel", "Siglip2Model"}


def image_inputs(name: str, images: Tensor) -> dict[str, Tensor]:
    """What the image processor of the model makes of normalised images."""
    if name != "Siglip2Model":
        return {"pixel_values": images}
    from transformers.models.siglip2 import image_processing_siglip2 as processing

    patches = [processing.convert_image_to_patches(image, 4) for image in images]
    shape = torch.tensor([[side // 4 for side in images.shape[2:]]] * len(images))
    mask = torch.ones(len(images), len(patches[0]), dtype=torch.int32)
    return {
        "pixel_values": torch.stack(patches),
        "pixel_attention_mask": mask,
        "spatial_shapes": shape,
    }


def text_inputs(name: str, texts: list[str]) -> dict[str, Tensor]:
    """What the tokenizer of the model makes of texts, called as transformers documents it."""
    if name in PADDED:
        texts = [text.lower() for text in texts]
    if name not in UNMASKED:
        encoded = make_tokenizer()(texts, padding=True, return_tensors="pt")
        return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}
    padded = make_tokenizer()(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    return {"input_ids": padded.input_ids}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_features_and_logits_are_those_of_transformers(name: str) -> None:
    model, n = make(name), pixels_of(make(name))
    images = torch.randn(3, 3, n, n)
    pixels, texts = image_inputs(name, images), text_inputs(name, TEXTS)
    expected = model.get_image_features(**pixels).pooler_output
    assert same_bits(encode_images(model, images), expected)
    tokens = as_tokenizer(make_tokenizer(), model)(TEXTS)
    expected = model.get_text_features(**texts).pooler_output
    assert same_bits(encode_text(model, tokens), expected)
    assert not torch.allclose(expected[0], expected[1])  # the features depend on the text
    lower = [text.lower() for text in TEXTS]
    classifier = ZeroShotClassifier(model, make_tokenizer(), lower, ["{}"])
    whole = model(**pixels, **text_inputs(name, lower)).logits_per_image
    torch.testing.assert_close(classifier(images), whole, rtol=1e-4, atol=1e-4)
    head = prompting.VideoClassifier(model, make_tokenizer(), lower, "{}")
    torch.testing.assert_close(head(images), whole, rtol=1e-4, atol=1e-4)
    features = class_features(model, make_tokenizer(), lower, ["{}"])
    torch.testing.assert_close(features, head.present_text())
    clip = images[None, :2]
    frames = functional.normalize(encode_images(model, clip[0]), dim=-1).mean(dim=0)
    torch.testing.assert_close(encode_video(model, clip)[0], frames)


@torch.no_grad()
@pytest.mark.parametrize("name", EXPANDED)
def test_an_expanded_model_is_plain_for_images_and_sees_neighbours_in_videos(name: str) -> None:
    model, images, video = make(name), torch.randn(2, 3, 8, 8), random_video(2, 3)
    before, frames = encode_images(model, images), encode_video(model, video)
    classifier = ZeroShotClassifier(expand_temporal_attention(model), make_tokenizer(), NAMES)
    assert same_bits(encode_images(model, images), before)
    assert not torch.allclose(encode_video(model, video), frames)
    assert classifier(video).shape == (2, 3)


@pytest.mark.parametrize("name", ["AlignModel", "SiglipModel"])
def test_training_reaches_the_image_tower(name: str) -> None:
    model, n = make(name), pixels_of(make(name))
    choose_trained(model, "openvclip")
    classifier = ZeroShotClassifier(model, make_tokenizer(), NAMES, ["{}"])
    functional.cross_entropy(classifier(random_video(2, 2, n)), torch.tensor([0, 2])).backward()
    towers = {n.split(".")[0] for n in gradients(model)}
    assert towers == {"vision_model", "logit_scale" if name == "SiglipModel" else "temperature"}
    head = prompting.VideoClassifier(model, make_tokenizer(), NAMES)
    trained = prompting.fine_tune(model)
    assert any(p is q for p in trained for q in model.text_model.parameters())
    model.zero_grad(set_to_none=True)
    functional.cross_entropy(head(random_video(2, 2, n)), torch.tensor([0, 2])).backward()
    assert {"text_model", "vision_model"} <= {n.split(".")[0] for n in gradients(model)}


def test_a_sweep_encodes_the_texts_of_each_interpolation() -> None:
    model, tuned = make("SiglipModel"), snapshot(randomise(make("SiglipModel"), seed=3))
    original = snapshot(model)
    classifier = ZeroShotClassifier(model, make_tokenizer(), NAMES, ["{}"])
    batch = (random_video(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
    results = sweep(classifier, original, tuned, [batch], lams=[0.0, 0.5, 1.0], progress=False)
    for lam, evaluation in results.items():
        model.load_state_dict(interpolate(original, tuned, lam))
        fresh = ZeroShotClassifier(model, make_tokenizer(), NAMES, ["{}"])
        top1 = (fresh(batch[0]).argmax(1) == batch[1]).double().mean()
        assert evaluation.top1 == pytest.approx(float(top1))


# --- tokenizers --------------------------------------------------------------------------------


def test_texts_are_padded_cut_and_lowered_as_the_model_needs_it() -> None:
    long = "a video of the " * 10
    for name in ("CLIPModel", "SiglipModel"):
        tokens = as_tokenizer(make_tokenizer(), make(name))(["archery", long])
        assert tokens.shape == (2, LENGTH)
        assert tokens[0, 3:].eq(0).all()
        assert tokens[1].ne(0).all()
    upper = as_tokenizer(make_tokenizer(), make("SiglipModel"))(["Surfing Horse"])
    assert torch.equal(
        upper, as_tokenizer(make_tokenizer(), make("SiglipModel"))(["surfing horse"])
    )
    cased = make_tokenizer()
    cased.do_lower_case = False
    assert as_tokenizer(cased, make("SiglipModel"))(["Surfing"])[0, 1] == 1  # unknown
    unmasked = make_tokenizer()(["archery", long], padding=True, return_tensors="pt")
    masked = as_tokenizer(make_tokenizer(model_max_length=64), make("ChineseCLIPModel"))
    tokens = masked(["archery", long])
    assert tokens.shape == (2, 2, 32)  # the places of the text tower
    assert torch.equal(tokens[0, 1, :5], torch.tensor([1, 1, 1, 0, 0]))
    assert unmasked.input_ids.shape[1] > LENGTH
    # XLM-RoBERTa counts the places from the padding token, here 0.
    roberta = as_tokenizer(make_tokenizer(model_max_length=64), make("AltCLIPModel"))
    assert roberta([long]).shape == (1, 2, 31)


def test_what_a_tokenizer_can_be() -> None:
    model = make("CLIPModel")
    processor = transformers.CLIPProcessor.__new__(transformers.CLIPProcessor)
    processor.image_processor = transformers.CLIPImageProcessor()
    processor.tokenizer = make_tokenizer()
    assert torch.equal(
        as_tokenizer(processor, model)(TEXTS), as_tokenizer(processor.tokenizer, model)(TEXTS)
    )

    def function(texts: list[str]) -> Tensor:
        return torch.zeros(len(texts), LENGTH, dtype=torch.long)

    assert as_tokenizer(function, model) is function
    for wrong in (processor.image_processor, "openai/clip-vit-base-patch32", None):
        with pytest.raises(UsageError, match=r"tokenizer is a .*; expected a function"):
            ZeroShotClassifier(model, wrong, NAMES)
    call = partial(make_tokenizer(), return_tensors="pt", padding=True)
    for classifier in (ZeroShotClassifier, prompting.VideoClassifier):
        with pytest.raises(UsageError, match=r"returned a BatchEncoding; .* transformers itself"):
            classifier(model, call, NAMES)
    endless = make_tokenizer(model_max_length=int(1e30))
    assert as_tokenizer(endless, model)(["a"]).shape == (1, LENGTH)
    assert as_tokenizer(endless, tiny_clip())(["a"]).shape == (1, 8)  # a model of open_clip
    with pytest.raises(UsageError, match=r"length of a text of Linear .*tokenizer\.model_max_leng"):
        as_tokenizer(endless, torch.nn.Linear(1, 1))
    with pytest.raises(UsageError, match="CLIP takes token ids"):
        encode_text(tiny_clip(), torch.zeros(1, 2, 8, dtype=torch.long))


def test_texts_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SiglipModel", "AlignModel"):
        model = make(name)
        with text_cache(tmp_path):
            first = class_features(model, make_tokenizer(), NAMES)
            monkeypatch.setattr(type(model), "get_text_features", None)
            assert same_bits(class_features(model, make_tokenizer(), NAMES), first)
            monkeypatch.undo()
    assert len(list((tmp_path / "text-features").iterdir())) == 2


# --- models that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("XCLIPModel", "text features change with the video.*Call it through transformers"),
        ("FlavaModel", "features of tokens.*Load a CLIPModel"),
        ("ClapModel", "encodes audio"),
        ("Blip2Model", "generates text"),
        ("CLIPVisionModel", "has no text tower. Load the whole CLIPModel"),
        ("CLIPTextModelWithProjection", "has no image tower"),
        ("Siglip2VisionModel", "Load the whole Siglip2Model"),
        ("CLIPSegForImageSegmentation", "Pass its attribute clip"),
        ("OwlViTForObjectDetection", "Pass its attribute owlvit"),
    ],
)
def test_a_model_that_is_no_clip_is_refused_by_name(name: str, text: str) -> None:
    kind = getattr(transformers, name)
    with pytest.raises(UnsupportedModelError, match=f"^{name} .*{text}"):
        require_clip(kind.__new__(kind))


def test_a_model_with_half_of_the_methods_is_refused() -> None:
    class Half(torch.nn.Module):
        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return pixel_values

        def get_text_features(self, input_ids: Tensor) -> Tensor:
            return input_ids

    assert is_transformers(Half())
    with pytest.raises(UnsupportedModelError, match="Half lacks logit_scale; expected an open_cl"):
        require_clip(Half())
    tower: Any = make("CLIPModel").vision_model
    with pytest.raises(UnsupportedModelError, match="CLIPVisionModel has no text tower"):
        ZeroShotClassifier(expand_temporal_attention(tower), make_tokenizer(), NAMES)
