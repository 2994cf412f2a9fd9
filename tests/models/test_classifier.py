"""``ZeroShotClassifier`` and the text templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip import VIDEO_TEMPLATES, ZeroShotClassifier, expand_temporal_attention
from openvclip.errors import ClassNamesError, UnsupportedModelError, VideoShapeError
from tests.helpers import (
    FACTS,
    gradients,
    random_video,
    same_bits,
    snapshot,
    tiny_clip,
    tiny_tokenizer,
)

NAMES = ["juggling", "archery", "playing the flute"]


def test_templates_are_the_released_ones() -> None:
    assert len(set(VIDEO_TEMPLATES)) == 28
    assert VIDEO_TEMPLATES[0] == "a photo of {}."
    assert VIDEO_TEMPLATES[6] == "a photo of a person practicing {}."
    assert VIDEO_TEMPLATES[7] == "a video of {}."
    assert VIDEO_TEMPLATES[27] == "a demonstration of a person practicing {}."


def test_templates_are_those_of_the_facts() -> None:
    facts = json.loads((FACTS / "facts.json").read_text())["templates"]
    expected = []
    for noun in facts["nouns"]:
        for form in facts["forms"]:
            expected.append(form.replace("{noun}", noun).replace("{c}", "{}"))
    assert list(VIDEO_TEMPLATES) == expected


def text_features(model: Any, names: list[str], templates: list[Callable[[str], str]]) -> Tensor:
    """One text at a time, in float64 after the tower."""
    rows = []
    for name in names:
        total = torch.zeros(8, dtype=torch.float64)
        for template in templates:
            feature = model.encode_text(tiny_tokenizer([template(name)]))[0].double()
            total += feature / feature.norm()
        rows.append(total / total.norm())
    return torch.stack(rows)


@torch.no_grad()
def test_text_features() -> None:
    model = tiny_clip()
    classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES)
    forms = [lambda n, t=t: t.replace("{}", n) for t in VIDEO_TEMPLATES]
    expected = text_features(model, NAMES, forms)  # type: ignore[arg-type]
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # the tokenizer tells texts apart
    torch.testing.assert_close(classifier.text_features.double(), expected, rtol=1e-5, atol=1e-6)
    mixed = ["{} {}", str.upper]
    classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES, mixed)
    expected = text_features(model, NAMES, [lambda n: f"{n} {n}", str.upper])
    torch.testing.assert_close(classifier.text_features.double(), expected, rtol=1e-5, atol=1e-6)


def test_batches_of_texts_change_nothing() -> None:
    model = tiny_clip()
    sizes: list[int] = []

    def tokenizer(texts: list[str]) -> Tensor:
        sizes.append(len(texts))
        return tiny_tokenizer(texts)

    whole = ZeroShotClassifier(model, tokenizer, NAMES)
    parts = ZeroShotClassifier(model, tokenizer, NAMES, batch_size=50)
    assert sizes == [84, 50, 34]
    torch.testing.assert_close(parts.text_features, whole.text_features)


@pytest.mark.parametrize("expanded", [False, True])
def test_logits_are_the_mean_over_frames_of_scaled_cosines(expanded: bool) -> None:
    model = tiny_clip()
    if expanded:
        expand_temporal_attention(model)
    with torch.no_grad():
        model.logit_scale.fill_(1.7)
    classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES)
    video = random_video(2, 3)
    frames = model.encode_image(video) if expanded else model.encode_image(video.flatten(0, 1))
    frames = frames.reshape(2, 3, 8)
    logits = classifier(video)
    assert logits.shape == (2, 3)
    for b in range(2):
        for k in range(3):
            cosines = [
                functional.cosine_similarity(frames[b, t], classifier.text_features[k], dim=0)
                for t in range(3)
            ]
            expected = sum(torch.tensor(1.7).exp() * c for c in cosines) / 3
            torch.testing.assert_close(logits[b, k], expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_image_tower_and_not_the_text_tower() -> None:
    model = expand_temporal_attention(tiny_clip())
    classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES)
    functional.cross_entropy(classifier(random_video(2, 3)), torch.tensor([0, 2])).backward()
    reached = set(gradients(model))
    visual = {n for n, _ in model.named_parameters() if n.startswith("visual.")}
    assert reached == visual | {"logit_scale"}
    assert not classifier.text_features.requires_grad
    assert all(g.abs().sum() > 0 for n, g in gradients(model).items() if "in_proj_bias" not in n)


def test_the_text_features_stay_when_the_weights_move() -> None:
    model = tiny_clip()
    classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES)
    before, logits = classifier.text_features.clone(), classifier(random_video(1, 2))
    model.load_state_dict(snapshot(tiny_clip(4)))
    assert same_bits(classifier.text_features, before)
    assert not torch.allclose(classifier(random_video(1, 2)), logits)


def test_the_state_dict_is_the_models_alone() -> None:
    model = tiny_clip()
    classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES)
    assert set(classifier.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_modes_of_the_modules_are_restored() -> None:
    model = tiny_clip().train()
    model.visual.transformer.resblocks[1].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    during: list[bool] = []
    handle = model.token_embedding.register_forward_hook(lambda m, i, o: during.append(m.training))
    ZeroShotClassifier(model, tiny_tokenizer, NAMES)
    handle.remove()
    assert during == [False]
    assert {name: m.training for name, m in model.named_modules()} == modes

    def broken(texts: list[str]) -> Tensor:
        raise OSError("no vocabulary")

    with pytest.raises(OSError, match="no vocabulary"):
        ZeroShotClassifier(model, broken, NAMES)
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_half_precision() -> None:
    model = expand_temporal_attention(tiny_clip()).bfloat16()
    classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES)
    assert classifier(random_video(1, 2).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        single = ZeroShotClassifier(tiny_clip(), tiny_tokenizer, NAMES)
        assert torch.isfinite(single(random_video(1, 2))).all()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "class_names is empty"),
        ("juggling", "class_names is one string, 'juggling'; expected a list"),
        (["a", ""], r"class_names\[1\] is ''"),
        (["a", "  "], r"class_names\[1\]"),
        (["a", 3], r"class_names\[1\] is 3; expected a non-empty string.*: 1\."),
        (["b", "a", "b", "a", "c"], "occur more than once: 'a', 'b'"),
    ],
)
def test_class_names_that_make_no_classifier(names: Any, text: str) -> None:
    with pytest.raises(ClassNamesError, match=text):
        ZeroShotClassifier(tiny_clip(), tiny_tokenizer, names)


@pytest.mark.parametrize(
    ("templates", "text"),
    [
        (["a video."], r"Template 'a video.' has no \{\}"),
        ([], "templates is empty"),
        ("a video of {}.", "templates is one string, 'a video of {}.'"),
    ],
)
def test_templates_that_make_no_classifier(templates: Any, text: str) -> None:
    with pytest.raises(ClassNamesError, match=text):
        ZeroShotClassifier(tiny_clip(), tiny_tokenizer, NAMES, templates)


def test_models_and_videos_that_do_not_fit() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear lacks encode_image, encode_text"):
        ZeroShotClassifier(nn.Linear(2, 2), tiny_tokenizer, NAMES)
    with pytest.raises(UnsupportedModelError, match="not a wrapper around it"):
        ZeroShotClassifier(nn.DataParallel(tiny_clip()), tiny_tokenizer, NAMES)
    classifier = ZeroShotClassifier(tiny_clip(), tiny_tokenizer, NAMES)
    with pytest.raises(VideoShapeError):
        classifier(random_video(1, 2)[0, 0])  # 4 dimensions are images
