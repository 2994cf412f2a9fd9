"""Video fine-tuning, and weight-space methods with fine-tuned models and with prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from openvclip import InterpolatedWeightRegularizer, SWATracker, interpolate
from openvclip import prompting as P
from openvclip.errors import (
    PromptingError,
    PromptOptionError,
    StateMismatchError,
    UnsupportedModelError,
)
from openvclip.evaluation import sweep
from tests.helpers import (
    assert_same_state,
    gradients,
    random_video,
    randomise,
    same_bits,
    snapshot,
    tiny_tower,
)
from tests.on_device import placed
from tests.prompting.reference import NAMES, prompt_clip, word_tokenizer

VIDEO, LABEL = random_video(3, 4), torch.arange(3)


def classifier(model: Any) -> P.VideoClassifier:
    return P.VideoClassifier(model, word_tokenizer, NAMES)


def loss_of(head: Any) -> Tensor:
    return functional.cross_entropy(head(placed(VIDEO)), placed(LABEL))


def prompted(method: str, seed: int = 3) -> Any:
    model = prompt_clip()
    if method == "vifi":
        P.attach_vifi(model, vision_prompts=2, vision_depth=2, text_prompts=2, text_depth=2)
    else:
        P.attach_vita(model, frames=4, global_prompts=2, text_prompts=2)
    randomise(model.openvclip_prompts, seed)
    return model


# --- video fine-tuning -------------------------------------------------------------------------


def side_of(name: str) -> str:
    if name.startswith("visual."):
        return "image"
    if name == "logit_scale":
        return "temperature"
    return "neither" if name.startswith("token_embedding.") else "text"


@pytest.mark.parametrize(
    ("train", "sides"),
    [("both", {"image", "text", "temperature"}), ("image", {"image"}), ("text", {"text"})],
)
def test_which_weights_a_fine_tune_trains(train: Any, sides: set[str]) -> None:
    model = prompt_clip()
    before = snapshot(model)
    expected = [p for n, p in model.named_parameters() if side_of(n) in sides]
    trained = P.fine_tune(model, train)
    assert [id(p) for p in trained] == [id(p) for p in expected]
    head, optimizer = classifier(model).train(), torch.optim.AdamW(trained, lr=0.01)
    loss_of(head).backward()
    names = {n for n in before if side_of(n) in sides}
    assert gradients(model).keys() == names
    optimizer.step()
    moved = {n for n, v in model.state_dict().items() if not same_bits(v, before[n])}
    # A key bias shifts all scores of a query alike; not every position occurs in a text.
    assert {side_of(name) for name in moved} == sides
    assert len(moved) > 0.8 * len(names)


def test_fine_tunes_that_make_no_sense() -> None:
    with pytest.raises(PromptOptionError, match="train='all': expected one of 'both', 'image'"):
        P.fine_tune(prompt_clip(), "all")  # type: ignore[arg-type]
    with pytest.raises(PromptingError, match="backbone is frozen"):
        P.fine_tune(prompted("vifi"))
    with pytest.raises(UnsupportedModelError, match="has no image tower"):
        P.fine_tune(tiny_tower())


def fine_tuned() -> tuple[dict[str, Tensor], Any]:
    """Return the original weights, and a classifier with a fine-tuned model."""
    model = prompt_clip()
    clip = snapshot(model)
    head = classifier(model).train()
    optimizer = torch.optim.AdamW(P.fine_tune(model, "both"), lr=3e-3)
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=clip)
    swa = SWATracker(model, start=1, every=1)
    path = []
    for _ in range(4):
        iwr.step(lambda: loss_of(head))
        if swa.update(model):
            path.append(snapshot(model))
    mean = {n: torch.stack([p[n] for p in path]).double().mean(0) for n in clip}
    averaged = swa.averaged_state_dict()
    for name, value in averaged.items():
        torch.testing.assert_close(value.double(), mean[name], rtol=1e-6, atol=1e-7)
    model.load_state_dict(averaged)
    return clip, head.eval()


def test_regularised_averaged_and_interpolated_fine_tunes() -> None:
    clip, head = fine_tuned()
    tuned = snapshot(head.model)
    assert sum(not same_bits(tuned[n], clip[n]) for n in clip) > 50
    video, batches = placed(VIDEO), [(placed(VIDEO), placed(LABEL))]
    points = sweep(head, clip, tuned, batches, lams=[0.0, 0.5, 1.0])  # type: ignore[arg-type]
    assert_same_state(snapshot(head.model), tuned)
    for lam, evaluation in points.items():
        # The text tower is interpolated too, so its features are computed again for each λ.
        other = prompt_clip()
        other.load_state_dict(interpolate(clip, tuned, lam))
        logits = classifier(other)(video)
        assert evaluation.predictions.tolist() == logits.argmax(1).tolist()
    with torch.no_grad():
        assert (head(video) - classifier(prompt_clip())(video)).abs().max() > 0.1


def test_prompts_on_a_fine_tune() -> None:
    _, head = fine_tuned()
    bridge = snapshot(head.model)
    P.attach_vifi(head.model, vision_prompts=2, vision_depth=3, text_prompts=2, text_depth=3)
    second = classifier(head.model)
    optimizer = torch.optim.SGD(P.parameters(head.model), lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(second)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    P.detach(head.model)
    assert_same_state(snapshot(head.model), bridge)


# --- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vifi", "vita"])
def test_interpolations_of_prompts(method: str) -> None:
    a, b = prompted(method, 3), prompted(method, 4)
    ours = {n: v.detach().clone() for n, v in P.state_dict(a).items()}
    mixed = interpolate(ours, P.state_dict(b), 0.25)
    plain = snapshot(prompt_clip())
    P.load_state_dict(a, mixed)
    for name, value in a.state_dict().items():
        if name in plain:
            assert same_bits(value, plain[name])
        else:
            expected = 0.25 * ours[name].double() + 0.75 * b.state_dict()[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    assert classifier(a)(placed(VIDEO)).isfinite().all()


@pytest.mark.parametrize("method", ["vifi", "vita"])
def test_averages_and_regularisation_of_prompts(method: str) -> None:
    model = prompted(method)
    anchor, head = snapshot(model), classifier(model).train()
    optimizer = torch.optim.SGD(P.parameters(model), lr=0.05)
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=anchor)
    swa = SWATracker(model)
    path = []
    for _ in range(3):
        iwr.step(lambda: loss_of(head))
        swa.update(model)
        path.append(snapshot(model))
    averaged = swa.averaged_state_dict()
    for name, value in averaged.items():
        mean = torch.stack([p[name] for p in path]).double().mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
        if "openvclip_prompts" not in name:
            assert same_bits(value, anchor[name])
    only = {n: v for n, v in averaged.items() if n.startswith("openvclip_prompts.")}
    P.load_state_dict(model, only)
    assert_same_state(model.state_dict(), averaged)


def test_prompts_of_other_sizes_are_refused_whole() -> None:
    model = prompted("vifi")
    before = snapshot(model)
    state = {n: v + 1 for n, v in P.state_dict(model).items()}
    state["openvclip_prompts.vision.tokens"] = torch.zeros(1, 2, 16)
    with pytest.raises(StateMismatchError, match=r"vision\.tokens: expected \[2, 2, 16\]"):
        P.load_state_dict(model, state)
    with pytest.raises(StateMismatchError, match="missing"):
        P.load_state_dict(model, P.state_dict(prompted("vita")))
    assert_same_state(snapshot(model), before)
    wrapped = {f"module.{n}": v for n, v in P.state_dict(prompted("vifi", 8)).items()}
    P.load_state_dict(model, wrapped)
    assert_same_state(snapshot(model), snapshot(prompted("vifi", 8)))
