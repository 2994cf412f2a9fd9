"""The parts of the library together equal Algorithms 1 and 2 as the paper prints them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from openvclip import (
    InterpolatedWeightRegularizer,
    SWATracker,
    ZeroShotClassifier,
    expand_temporal_attention,
    interpolate,
)
from tests.helpers import assert_same_state, random_video, snapshot, tiny_clip, tiny_tokenizer

NAMES = ["juggling", "archery", "playing the flute"]
STEPS, LR, C, R = 7, 0.05, 0.5, 0.6
T, CYCLE, LAMBDA = 2, 2, 0.5


def prepared() -> ZeroShotClassifier:
    model = tiny_clip().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual.") or name == "logit_scale")
    expand_temporal_attention(model)
    return ZeroShotClassifier(model, tiny_tokenizer, NAMES)


def clips(step: int) -> tuple[Tensor, Tensor]:
    return random_video(3, 3, seed=step).double(), torch.tensor([0, 1, 2]).roll(step)


def as_printed(alphas: list[float]) -> dict[str, Tensor]:
    """The weights after Algorithm 1 and the first line of Algorithm 2."""
    classifier = prepared()
    theta = {n: p.detach().clone() for n, p in classifier.named_parameters() if p.requires_grad}
    theta_clip = {n: v.clone() for n, v in theta.items()}
    theta_swa: dict[str, Tensor] = {}
    counting = 0

    def loss(weights: dict[str, Tensor], step: int) -> Tensor:
        video, labels = clips(step)
        return functional.cross_entropy(functional_call(classifier, weights, (video,)), labels)

    for step in range(1, STEPS + 1):
        alpha = alphas[step - 1]
        theta = {n: v.detach().requires_grad_() for n, v in theta.items()}
        tilde = {n: alpha * theta_clip[n] + (1 - alpha) * theta[n] for n in theta}
        total = loss(theta, step) + C / (1 - alpha) * loss(tilde, step)
        grads = torch.autograd.grad(total, list(theta.values()))
        theta = {n: (v - LR * g).detach() for (n, v), g in zip(theta.items(), grads, strict=True)}
        if step > T and (step - T) % CYCLE == 0:
            theta_swa = {
                n: (theta_swa[n] * counting + v) / (counting + 1) if counting else v.clone()
                for n, v in theta.items()
            }
            counting += 1
    assert counting == 2
    return {n: LAMBDA * theta_clip[n] + (1 - LAMBDA) * v for n, v in theta_swa.items()}


def test_the_parts_together_are_the_algorithms() -> None:
    classifier = prepared()
    model = classifier.model
    clip = snapshot(model)
    alphas: list[float] = []
    probe = InterpolatedWeightRegularizer(model, interval=(0.0, R), seed=11)
    for _ in range(STEPS):
        with probe.interpolated() as alpha:
            alphas.append(alpha)
    assert_same_state(model.state_dict(), clip)

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    iwr = InterpolatedWeightRegularizer(
        model, optimizer, anchor=clip, interval=(0.0, R), weight=C, seed=11
    )
    swa = SWATracker(model, start=T, every=CYCLE)
    entered = []
    for step in range(1, STEPS + 1):
        video, labels = clips(step)
        iwr.step(lambda v=video, y=labels: functional.cross_entropy(classifier(v), y))  # type: ignore[misc]
        entered.append(swa.update(model))
    assert entered == [False, False, False, True, False, True, False]
    theta = interpolate(clip, swa.averaged_state_dict(), LAMBDA)

    expected = as_printed(alphas)
    assert len(expected) > 20
    for name, value in expected.items():
        torch.testing.assert_close(theta[name.removeprefix("model.")], value, rtol=1e-9, atol=1e-11)
    frozen = {n: v for n, v in theta.items() if f"model.{n}" not in expected}
    assert_same_state(frozen, {n: clip[n] for n in frozen})  # the text tower did not change
    model.load_state_dict(theta)
    assert (theta["visual.proj"] - clip["visual.proj"]).abs().max() > 1e-4
