"""The sweep over lambda equals a separate evaluation of each interpolation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import openvclip
from openvclip.errors import UsageError
from openvclip.evaluation import FIGURE_LAMBDAS, evaluate, sweep
from tests.helpers import random_video, tiny_clip, tiny_tokenizer

NAMES = ["red", "green", "blue", "black"]


def _classifier(weights: dict[str, Tensor] | None = None) -> openvclip.ZeroShotClassifier:
    model = openvclip.expand_temporal_attention(tiny_clip())
    if weights is not None:
        model.load_state_dict(weights)
    return openvclip.ZeroShotClassifier(model, tiny_tokenizer, NAMES, ["a {}."])


def _ends(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    a = {name: value.detach().clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    b = {
        name: value + 0.5 * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for name, value in a.items()
    }
    return a, b


class CountingLoader:
    def __init__(self) -> None:
        self.batches = [(random_video(3, 2, seed), torch.tensor([0, 1, 2])) for seed in range(2)]
        self.read = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            self.read += 1
            yield batch


def test_each_point_equals_its_own_evaluation_and_clips_are_read_once() -> None:
    classifier, loader = _classifier(), CountingLoader()
    a, b = _ends(classifier.model)
    results = sweep(classifier, a, b, loader, progress=False)
    assert loader.read == len(loader.batches)
    assert tuple(results) == FIGURE_LAMBDAS
    for lam, result in results.items():
        # Report 36: the class names are encoded by the weights at each lambda.
        alone = evaluate(_classifier(openvclip.interpolate(a, b, lam)), loader.batches)
        assert torch.equal(result.ranks, alone.ranks)
    predictions = {tuple(result.predictions.tolist()) for result in results.values()}
    assert len(predictions) > 1  # otherwise the comparison above would prove nothing


def test_weights_can_be_any_numbers_in_any_iterable() -> None:
    classifier, loader = _classifier(), CountingLoader()
    a, b = _ends(classifier.model)
    for lams in (torch.tensor([0.0, 0.5]), (lam for lam in (0, 0.5))):
        results = sweep(classifier, a, b, loader, lams=lams, progress=False)
        assert list(results) == [0.0, 0.5]
        assert all(type(lam) is float for lam in results)


@pytest.mark.parametrize("index", [0, 1])
def test_an_end_may_be_the_models_own_state_dict(index: int) -> None:
    classifier, loader = _classifier(), CountingLoader()
    ends = _ends(classifier.model)
    expected = sweep(classifier, *ends, loader, progress=False)
    classifier.model.load_state_dict(ends[index])
    states = list(ends)
    states[index] = classifier.model.state_dict()
    results = sweep(classifier, *states, loader, progress=False)
    for lam, result in results.items():
        assert torch.equal(result.ranks, expected[lam].ranks)


def test_a_state_dict_without_a_copy_is_noticed() -> None:
    # Report 40: both ends are the trained model, so every lambda has the same accuracy.
    classifier, loader = _classifier(), CountingLoader()
    clip = classifier.model.state_dict()
    with pytest.raises(UsageError, match="theta_a and theta_b share the memory"):
        sweep(classifier, clip, classifier.model.state_dict(), loader, progress=False)
    assert loader.read == 0


def test_live_weights_are_back_bitwise_also_after_an_exception() -> None:
    classifier = _classifier()
    a, b = _ends(classifier.model)
    sweep(classifier, a, b, CountingLoader(), lams=[0.3], progress=False)
    with pytest.raises(openvclip.OpenVCLIPError):
        sweep(classifier, a, b, [(torch.zeros(1, 3), torch.zeros(1))], lams=[0.3], progress=False)
    for name, value in classifier.model.state_dict().items():
        assert torch.equal(value, a[name]), name
