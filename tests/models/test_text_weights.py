"""Whose text it is: text features belong to the evaluated weights. Equal ends encode once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip import ZeroShotClassifier, expand_temporal_attention, interpolate
from openvclip import prompting as P
from openvclip.errors import NonFiniteWeightsError, TextFeaturesWarning, UsageError
from openvclip.evaluation import Evaluation, Mixture, evaluate, sweep
from openvclip.models import class_features
from openvclip.models.text_weights import same_text, text_names
from tests.helpers import (
    TEXT,
    VISION,
    assert_same_state,
    random_video,
    randomise,
    same_bits,
    snapshot,
    tiny_clip,
    tiny_tokenizer,
)

NAMES = ["red", "green", "blue", "black"]
LAMS = [0.0, 0.3, 1.0]
TEMPLATES = ["a {}.", "{} now"]


def custom_clip() -> nn.Module:
    """A model with a text tower of its own module, ``text``, and a bias of the logits."""
    torch.manual_seed(0)
    vision, text = dict(VISION), dict(TEXT)
    model = open_clip.CustomTextCLIP(8, vision, text, init_logit_bias=-1.0)
    return randomise(model).eval()


class OtherText(nn.Module):
    """A text tower that openvclip does not know, around the image tower of open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.words = tiny_clip().visual, nn.Embedding(64, 8)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.words(tokens).sum(dim=1)


def hugging_face_clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from openvclip.models.hugging_face import HuggingFaceCLIP

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "projection_dim": 8}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return randomise(HuggingFaceCLIP(config)).eval()


KINDS: dict[str, Callable[[], Any]] = {
    "open_clip": tiny_clip,
    "custom text": custom_clip,
    "unknown text tower": OtherText,
    "hugging face": hugging_face_clip,
}


def ends(model: nn.Module, *, text: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The original and a fine-tuned state dict, with or without a trained text tower."""
    original, tuned = snapshot(model), snapshot(randomise(copy.deepcopy(model), 5, 0.5))
    if not text:
        tuned |= {name: original[name] for name in text_names(original)}
    return original, tuned


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(random_video(3, 2, seed), torch.tensor([0, 1, 2])) for seed in range(2)]


def counted(model: nn.Module, patch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts in each call of ``encode_text``."""
    calls: list[int] = []
    made = model.encode_text
    patch.setattr(model, "encode_text", lambda tokens: calls.append(len(tokens)) or made(tokens))
    return calls


def by_hand(make: Callable[[], Any], weights: dict[str, Tensor]) -> list[int]:
    """Rank of the true class of each clip: one clip and one text at a time, in float64."""
    model = make()
    expand_temporal_attention(model).load_state_dict(weights)
    rows = []
    for name in NAMES:
        tokens = tiny_tokenizer([form.replace("{}", name) for form in TEMPLATES])
        texts = [model.encode_text(row[None])[0].double() for row in tokens]
        mean = sum((text / text.norm() for text in texts), torch.zeros(8).double())
        rows.append(mean / mean.norm())
    ranks = []
    for video, labels in batches():
        for clip, label in zip(video, labels.tolist(), strict=True):
            frames = model.encode_image(clip[None])[0].double()
            cosines = (frames / frames.norm(dim=-1, keepdim=True)) @ torch.stack(rows).T
            values = cosines.mean(dim=0)
            ranks.append(sum(values[k] >= values[label] for k in range(4) if k != label))
    return [int(rank) for rank in ranks]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "trained"), [*((kind, True) for kind in KINDS), ("open_clip", False)]
)
def test_a_sweep_encodes_the_texts_with_the_weights_of_each_lambda(
    kind: str, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Report 36: a text tower that was fine-tuned was replaced by that of the original CLIP.
    make = KINDS[kind]
    model = expand_temporal_attention(make())
    original, tuned = ends(model, text=trained)
    classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES, TEMPLATES)
    before, calls = classifier.text_features.clone(), counted(model, monkeypatch)
    results = sweep(classifier, original, tuned, batches(), lams=LAMS, progress=False)
    assert calls == ([8, 8] if trained else [])  # once for each λ < 1, or none: still known
    assert {lam: result.ranks.tolist() for lam, result in results.items()} == {
        lam: by_hand(make, interpolate(original, tuned, lam)) for lam in LAMS
    }
    assert same_bits(classifier.text_features, before)
    assert_same_state(snapshot(model), original)
    held = sweep(classifier, original, tuned, batches(), lams=LAMS, text="original", progress=False)
    for lam in LAMS:
        weights = interpolate(original, tuned, lam)
        weights |= {name: original[name] for name in text_names(original)}
        assert held[lam].ranks.tolist() == by_hand(make, weights)
    assert torch.equal(held[0.0].ranks, results[0.0].ranks) == (not trained)


def test_a_sweep_of_a_classifier_made_at_other_weights() -> None:
    """Neither end has the text weights at which the classifier was created."""
    model = expand_temporal_attention(tiny_clip())
    original, tuned = ends(model, text=False)
    expected = ranks_of(
        sweep(ZeroShotClassifier(model, tiny_tokenizer, NAMES), original, tuned, batches())
    )
    model.load_state_dict(snapshot(tiny_clip(7)))
    later = ZeroShotClassifier(model, tiny_tokenizer, NAMES)
    assert ranks_of(sweep(later, original, tuned, batches())) == expected


def ranks_of(results: dict[float, Evaluation]) -> list[list[int]]:
    return [result.ranks.tolist() for result in results.values()]


def test_a_video_classifier_encodes_once_for_each_lambda(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_clip()
    original, tuned = ends(model, text=True)
    head = P.VideoClassifier(model, tiny_tokenizer, NAMES)
    calls = counted(model, monkeypatch)
    results = sweep(head, original, tuned, batches(), lams=LAMS, progress=False)
    assert calls == [4, 4, 4]  # not once for each batch
    for lam in LAMS:
        other = tiny_clip()
        other.load_state_dict(interpolate(original, tuned, lam))
        alone = evaluate(P.VideoClassifier(other, tiny_tokenizer, NAMES), batches())
        assert torch.equal(alone.ranks, results[lam].ranks)


class Around(nn.Module):
    """A user's own module around a classifier."""

    def __init__(self, classifier: ZeroShotClassifier) -> None:
        super().__init__()
        self.head, self.model = classifier, classifier.model

    def forward(self, video: Tensor) -> Tensor:
        return self.head(video).softmax(dim=-1)


def test_a_classifier_inside_another_module_and_within_autocast() -> None:
    model = expand_temporal_attention(tiny_clip())
    original, tuned = ends(model, text=True)
    around = Around(ZeroShotClassifier(model, tiny_tokenizer, NAMES))
    with torch.autocast("cpu", torch.bfloat16):
        results = sweep(around, original, tuned, batches(), lams=LAMS, progress=False)
        for lam in LAMS:
            model.load_state_dict(interpolate(original, tuned, lam))
            torch.clear_autocast_cache()
            around.head.refresh_text()
            assert torch.equal(evaluate(around, batches()).ranks, results[lam].ranks)


def test_text_features_of_other_weights_are_noticed() -> None:
    # Report 36: features that were computed before the weights were loaded.
    model = tiny_clip()
    classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES, TEMPLATES)
    model.load_state_dict(ends(model, text=False)[1])
    evaluate(classifier, batches())  # the text tower is the same: no warning
    with torch.no_grad():
        model.token_embedding.weight[40, 0] += 1e-3  # one value of all
    for part in (classifier, nn.Sequential(classifier)):
        with pytest.warns(TextFeaturesWarning, match=r"Call classifier\.refresh_text\(\)"):
            evaluate(part, batches())
    classifier.refresh_text()
    evaluate(classifier, batches())
    expected = class_features(model, tiny_tokenizer, NAMES, TEMPLATES)
    assert same_bits(classifier.text_features, expected)
    twin = copy.deepcopy(classifier)
    assert twin.text_is_current(quick=True)
    twin.model.text_projection.data *= 2
    assert not twin.text_is_current()
    assert classifier.text_is_current()
    evaluate(classifier.double(), [(v.double(), y) for v, y in batches()])  # the same weights
    original, tuned = ends(model, text=False)
    lams = {"lams": [0.5], "progress": False}
    wide = sweep(classifier, original, tuned, [(v.double(), y) for v, y in batches()], **lams)  # type: ignore[arg-type]
    again = ZeroShotClassifier(model, tiny_tokenizer, NAMES, TEMPLATES)
    same = sweep(again, original, tuned, [(v.double(), y) for v, y in batches()], **lams)  # type: ignore[arg-type]
    assert torch.equal(wide[0.5].ranks, same[0.5].ranks)


def test_an_interpolation_of_equal_texts_is_the_same_text_though_a_zero_changes_its_sign() -> None:
    model = tiny_clip()
    with torch.no_grad():
        model.token_embedding.weight[40] = -0.0
    original, tuned = ends(model, text=False)
    classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES, TEMPLATES)
    model.load_state_dict(interpolate(original, tuned, 0.25))
    evaluate(classifier, batches())


def test_features_from_a_cache_are_taken_as_they_are() -> None:
    model = tiny_clip()
    features = class_features(model, tiny_tokenizer, NAMES, TEMPLATES)
    made = ZeroShotClassifier(model, tiny_tokenizer, NAMES, TEMPLATES)
    taken = ZeroShotClassifier(model, tiny_tokenizer, NAMES, TEMPLATES, text_features=features)
    assert same_bits(taken.text_features, made.text_features)
    model.load_state_dict(snapshot(tiny_clip(3)))
    taken.refresh_text()
    assert same_bits(taken.text_features, class_features(model, tiny_tokenizer, NAMES, TEMPLATES))


def test_a_mixture_encodes_once_or_at_each_lambda() -> None:
    model = tiny_clip()
    for text, trained, expected in (("own", True, 3), ("own", False, 1), ("original", True, 1)):
        original, tuned = ends(model, text=trained)
        seen: list[dict[str, Tensor]] = []

        def encode(seen: list[dict[str, Tensor]] = seen) -> Tensor:
            seen.append(snapshot(model))
            return torch.tensor(float(len(seen)))

        mixture = Mixture(tuned, LAMS, text)  # type: ignore[arg-type]
        features = mixture.text_features(model, encode)
        assert len(seen) == expected
        assert [int(f) for f in features] == ([1, 2, 3] if expected == 3 else [1, 1, 1])
        for weights, lam in zip(seen, LAMS if expected == 3 else [1.0], strict=True):
            assert_same_state(weights, interpolate(original, tuned, lam))
        assert_same_state(snapshot(model), original)
    assert [int(f) for f in Mixture().text_features(model, lambda: torch.tensor(1))] == [1]
    for wrong in (lambda: Mixture(text="clip"), lambda: sweep(None, {}, {}, [], text="clip")):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="text='clip': expected 'own' or 'original'"):
            wrong()


def test_the_entries_that_texts_depend_on() -> None:
    model = P.attach_vifi(
        tiny_clip(), vision_prompts=2, text_prompts=2, vision_depth=1, text_depth=1
    )
    names = text_names(model.state_dict())
    assert {name.split(".")[0] for name in names} == {
        *("positional_embedding", "text_projection", "token_embedding", "transformer"),
        *("ln_final", "openvclip_prompts"),
    }
    assert all("vision" not in name for name in names)
    a = snapshot(model)
    for name in a:
        assert same_text(a, {**a, name: a[name] + 1}) == (name not in names), name
    assert same_text(a, {n: v.double() for n, v in a.items()})
    assert not same_text({n: v for n, v in a.items() if n != "ln_final.bias"}, a)


def test_a_text_tower_with_nan_is_named() -> None:
    # Report 12 (openai/CLIP#222).
    model = tiny_clip()
    model.ln_final.bias.data[1] = float("nan")
    with pytest.raises(NonFiniteWeightsError, match=r"The text features .* \(1\): ln_final\.bias"):
        ZeroShotClassifier(model, tiny_tokenizer, NAMES)
    head = P.VideoClassifier(model, tiny_tokenizer, NAMES)
    with pytest.raises(NonFiniteWeightsError, match=r"ln_final\.bias"):
        head.present_text()


@pytest.mark.parametrize("boundary", ["zero", "replicate"])
def test_images_are_those_of_plain_clip(boundary: Any) -> None:
    # Reports 42 and 47: images are not clips of one frame.
    plain, images = tiny_clip(), random_video(4, 1)[:, 0]
    labels = torch.tensor([0, 1, 2, 3])
    expected_features = functional.normalize(plain.encode_image(images), dim=-1)
    expanded = expand_temporal_attention(tiny_clip(), boundary=boundary)
    for model in (plain, expanded):
        classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES, TEMPLATES)
        expected = model.logit_scale.exp() * expected_features @ classifier.text_features.T
        assert same_bits(classifier(images), expected)
        head = P.VideoClassifier(model, tiny_tokenizer, NAMES)
        assert same_bits(
            head(images), model.logit_scale.exp() * expected_features @ head.text_features().T
        )
        ranks = evaluate(classifier, [(images, labels)]).ranks
        assert ranks.tolist() == [
            sum(row[k] >= row[i] for k in range(4) if k != i) for i, row in enumerate(expected)
        ]
        results = sweep(
            classifier, snapshot(model), ends(model, text=False)[1], [(images, labels)], lams=[1.0]
        )
        assert torch.equal(results[1.0].ranks, ranks)
    clips = ZeroShotClassifier(expanded, tiny_tokenizer, NAMES, TEMPLATES)(images[:, None])
    assert torch.allclose(clips, expected, atol=1e-4) == (boundary == "replicate")


def test_no_warning_on_the_normal_path() -> None:
    model = expand_temporal_attention(tiny_clip())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier = ZeroShotClassifier(model, tiny_tokenizer, NAMES)
        evaluate(classifier, batches())
        sweep(classifier, *ends(model, text=True), batches())
        evaluate(classifier, batches())
