"""Text prompts compared with loops, and the classifier with a trainable text side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from openvclip import ZeroShotClassifier
from openvclip import prompting as P
from openvclip.errors import (
    ClassNamesError,
    PromptingError,
    PromptOptionError,
    UnsupportedModelError,
)
from tests.helpers import gradients, random_video, randomise, same_bits, snapshot
from tests.on_device import placed
from tests.prompting.reference import (
    NAMES,
    prompt_clip,
    text_features,
    word_tokenizer,
    words_of,
)
from tests.prompting.test_vision import OFF, SWITCHES

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def vita(model: Any, **settings: Any) -> Any:
    P.attach_vita(model, **{**OFF, "text_prompts": 3, **settings})
    randomise(model.openvclip_prompts, seed=3)
    return model


def vifi(model: Any, count: int = 3, depth: int = 2) -> Any:
    P.attach_vifi(model, vision_prompts=2, vision_depth=2, text_prompts=count, text_depth=depth)
    randomise(model.openvclip_prompts, seed=3)
    return model


def classifier(model: Any, names: list[str] = NAMES, **settings: Any) -> P.VideoClassifier:
    return P.VideoClassifier(model, word_tokenizer, names, **settings)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


# --- what they compute -------------------------------------------------------------------------


@pytest.mark.parametrize("name_at", ["end", "middle", "front"])
@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_vita_equals_the_loops(name_at: Any, specific: bool, count: int) -> None:
    names = NAMES if specific else None
    model = vita(prompt_clip(), text_prompts=count, name_at=name_at, class_names=names)
    context = model.openvclip_prompts.text.context
    assert context.shape == ((3, count, 16) if specific else (count, 16))
    rows = list(context) if specific else [context] * 3
    expected = text_features(model, rows, [], name_at, NAMES)
    got = classifier(model).text_features()
    torch.testing.assert_close(got.double(), unit(expected), **CLOSE)


@pytest.mark.parametrize(("count", "depth"), [(1, 1), (2, 2), (3, 3)])
def test_vifi_equals_the_loops(count: int, depth: int) -> None:
    model = vifi(prompt_clip(), count, depth)
    text = model.openvclip_prompts.text
    deep = [] if text.deep is None else list(text.deep)
    assert len(deep) == depth - 1
    expected = text_features(model, [text.context] * 3, deep, "end", NAMES)
    got = classifier(model).text_features()
    torch.testing.assert_close(got.double(), unit(expected), **CLOSE)
    model.transformer.grad_checkpointing = True
    assert same_bits(classifier(model).text_features(), got)


def test_prompts_that_are_words_are_the_text() -> None:
    """Prompts at the embeddings of words give what the text tower gives for these words."""
    model = prompt_clip()
    plain = model.encode_text(placed(word_tokenizer([f"a photo of a {name}." for name in NAMES])))
    words = {"words": "a photo of a", "tokenizer": word_tokenizer}
    P.attach_vifi(model, vision_prompts=0, text_prompts=4, text_depth=1, **words)
    torch.testing.assert_close(classifier(model).text_features(), unit(plain), **CLOSE)


def test_words_come_first_and_the_rest_starts_at_random() -> None:
    model = prompt_clip()
    words = {"words": "a photo of a", "tokenizer": word_tokenizer}
    P.attach_vifi(model, vision_prompts=0, text_prompts=6, text_depth=2, **words)
    context = model.openvclip_prompts.text.context
    embedded = model.token_embedding.weight[words_of("a photo of a")]
    assert same_bits(context[:4].detach(), embedded.detach())
    assert 0 < context[4:].abs().max() < 0.1
    for count, text in ((3, "take 4 tokens; there are 3"), (8, None)):
        P.detach(model)
        if text is None:
            P.attach_vifi(model, vision_depth=1, text_prompts=count, text_depth=1, **words)
            continue
        with pytest.raises(PromptOptionError, match=text):
            P.attach_vifi(model, vision_prompts=0, text_prompts=count, text_depth=1, **words)
        vita(model)
    P.detach(model)
    with pytest.raises(PromptOptionError, match="need the model's tokenizer"):
        P.attach_vifi(model, vision_depth=1, text_prompts=4, text_depth=1, words="a photo")


def test_a_model_with_an_end_token_of_its_own() -> None:
    names, model = NAMES, prompt_clip()
    expected = classifier(vita(model)).text_features()
    model.text_pool_type, model.text_eos_id = "eos", 63
    assert same_bits(classifier(model, names).text_features(), expected)
    P.detach(model)
    model.text_pool_type = "first"
    with pytest.raises(UnsupportedModelError, match="pooled at the end-of-text token"):
        vita(model)


# --- class names -------------------------------------------------------------------------------


def test_shared_prompts_serve_any_class() -> None:
    model = vita(prompt_clip())
    others = ["diving", "a tall tree"]
    context = [model.openvclip_prompts.text.context] * 2
    expected = text_features(model, context, [], "end", others)
    got = classifier(model, others).text_features()
    torch.testing.assert_close(got.double(), unit(expected), **CLOSE)


def test_class_specific_prompts_serve_their_classes_in_any_order() -> None:
    model = vita(prompt_clip(), class_names=NAMES)
    every = classifier(model).text_features()
    some = classifier(model, [NAMES[2], NAMES[0]]).text_features()
    torch.testing.assert_close(some, every[[2, 0]])
    with pytest.raises(
        ClassNamesError, match=r"of 3 classes, and 1 of the 2 given .*'diving'.*\{\}"
    ):
        classifier(model, [NAMES[1], "diving"])
    alone = classifier(model, ["diving"], template="{}").text_features()
    expected = model.encode_text(placed(word_tokenizer(["diving"])), normalize=True)
    torch.testing.assert_close(alone, expected)
    with pytest.raises(ClassNamesError, match="more than once"):
        vita(prompt_clip(), class_names=["a", "a"])


def test_prompts_leave_the_plain_text_tower_alone() -> None:
    model, names = prompt_clip(), ["diving", "a tall tree"]
    before = ZeroShotClassifier(model, word_tokenizer, names, ["{}"]).text_features
    after = ZeroShotClassifier(vifi(model), word_tokenizer, names, ["{}"]).text_features
    torch.testing.assert_close(after, before)


# --- too much ----------------------------------------------------------------------------------


def test_more_prompts_than_the_text_holds() -> None:
    with pytest.raises(PromptOptionError, match=r"text_prompts=10: .*holds 12 tokens.*at most 9"):
        vita(prompt_clip(), text_prompts=10)
    with pytest.raises(PromptOptionError, match="text_prompts=77"):
        P.attach_vifi(prompt_clip(), text_prompts=77, vision_depth=1, text_depth=1)
    model = vita(prompt_clip(), text_prompts=8)
    classifier(model, ["one"])  # start, 8 prompts, the name, a dot, end: 12
    with pytest.raises(PromptOptionError, match=r"'juggling balls' takes 13 tokens .* 8 prompts"):
        classifier(model, ["one", "juggling balls"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"name_at": "back"}, "name_at='back': expected one of 'end', 'middle', 'front'"),
        ({"text_prompts": True}, "text_prompts=True"),
    ],
)
def test_options_out_of_range(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(PromptOptionError, match=text):
        vita(prompt_clip(), **settings)
    with pytest.raises(PromptOptionError, match="text_depth=4: the tower has 3 layers"):
        vifi(prompt_clip(), depth=4)


# --- the classifier ----------------------------------------------------------------------------


def test_logits_are_the_scaled_cosines_of_pooled_frames() -> None:
    model, video = prompt_clip(), random_video(2, 4)
    frames = model.encode_image(video.flatten(0, 1)).unflatten(0, (2, 4))
    text = model.encode_text(placed(word_tokenizer([f"a photo of a {name}." for name in NAMES])))
    expected = model.logit_scale.exp() * unit(frames.mean(1)) @ unit(text).T
    torch.testing.assert_close(classifier(model)(video), expected)
    other = classifier(model, template="{}")(video)
    assert (other - expected).abs().max() > 1e-3
    for template, wrong in (("none", "no {}"), (["{}"], "is a list")):
        with pytest.raises(ClassNamesError, match=wrong):
            classifier(model, template=template)


def test_text_features_follow_the_weights_unless_they_are_fixed() -> None:
    head, video = classifier(vifi(prompt_clip())), random_video(1, 4)
    before = head(video)
    with head.fixed_text():
        fixed = head(video)
        randomise(head.model.openvclip_prompts.text, seed=5)
        assert same_bits(head(video), fixed)
        fixed.sum().backward()
    assert same_bits(before, fixed)
    assert (head(video) - before).abs().max() > 1e-3
    assert not any(".text." in name for name in gradients(head))
    assert head.state_dict().keys() == {f"model.{name}" for name in head.model.state_dict()}


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("attach", ["vifi", "vita"])
def test_prompts_alone_receive_gradients(attach: str, specific: bool) -> None:
    if attach == "vifi":
        model = vifi(prompt_clip())
    else:
        names = NAMES if specific else None
        model = vita(prompt_clip(), frames=4, class_names=names, **SWITCHES["all"])
    head, video = classifier(model).train(), random_video(3, 4)
    assert [id(p) for p in P.parameters(head)] == [id(p) for p in P.parameters(model)]
    before = snapshot(model)
    optimizer = torch.optim.AdamW(P.parameters(model), lr=0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(video), torch.arange(3))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    prompts = {n for n in before if n.startswith("openvclip_prompts.")}
    assert gradients(model).keys() == prompts
    moved = {n for n, v in model.state_dict().items() if not same_bits(v, before[n])}
    assert moved == prompts
    assert losses[-1] < losses[0]


def test_a_classifier_outlives_its_prompts_in_vain() -> None:
    model = vifi(prompt_clip())
    head = classifier(model)
    P.detach(model)
    with pytest.raises(PromptingError, match="has no prompts"):
        head.text_features()
    for count in (0, 2):
        P.attach_vifi(model, vision_depth=1, text_prompts=count, text_depth=1)
        with pytest.raises(PromptingError, match=rf"for 3 prompts a text; the model has {count}"):
            head(random_video(1, 2))
        P.detach(model)


def test_compiled_in_one_graph() -> None:
    head, video = classifier(vifi(prompt_clip())), random_video(2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(video), head(video))
