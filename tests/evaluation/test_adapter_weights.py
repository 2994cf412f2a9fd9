"""LoRA adapters in the place of fine-tuned weights, in sweeps and in mixtures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import openvclip
from openvclip.errors import StateMismatchError
from openvclip.evaluation import Mixture, sweep
from openvclip.weights import Adapter, LowRank
from tests.helpers import assert_same_state, random_video, snapshot, tiny_clip, tiny_tokenizer

NAMES = ["red", "green", "blue", "black"]
LAMS = (0.0, 0.4, 1.0)


def adapter_for(state: dict[str, Tensor], prefix: str = "visual.") -> Adapter:
    generator = torch.Generator().manual_seed(1)
    return Adapter(
        {
            name: LowRank(
                torch.randn(value.shape[0], 2, generator=generator),
                torch.randn(2, value.shape[1], generator=generator),
            )
            for name, value in state.items()
            if name.startswith(prefix) and name.endswith("proj_weight")
        }
    )


def classifier() -> openvclip.ZeroShotClassifier:
    model = openvclip.expand_temporal_attention(tiny_clip())
    return openvclip.ZeroShotClassifier(model, tiny_tokenizer, NAMES, ["a {}."])


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_a_sweep_of_an_adapter_is_that_of_the_merged_weights(prefix: str) -> None:
    zero_shot = classifier()
    clip = snapshot(zero_shot.model)
    adapter = adapter_for(clip, prefix)
    loader = [(random_video(3, 2, seed), torch.tensor([0, 1, 2])) for seed in range(2)]
    merged = {name: value.clone() for name, value in adapter.merged(clip).items()}
    expected = sweep(zero_shot, clip, merged, loader, lams=LAMS, progress=False)
    own = zero_shot.model.state_dict()
    for theta_a in (clip, own):
        results = sweep(zero_shot, theta_a, adapter, loader, lams=LAMS, progress=False)
        for lam in LAMS:
            assert torch.equal(results[lam].ranks, expected[lam].ranks)
    assert_same_state(snapshot(zero_shot.model), clip)


def test_a_mixture_of_an_adapter_is_that_of_the_merged_weights() -> None:
    model = tiny_clip()
    clip = snapshot(model)
    adapter = adapter_for(clip)
    mixture = Mixture(adapter, LAMS)
    with mixture.setters(model) as setters:
        for lam, set_weights in zip(LAMS, setters, strict=True):
            set_weights()
            assert_same_state(
                snapshot(model), openvclip.interpolate(clip, adapter.merged(clip), lam)
            )
    assert_same_state(snapshot(model), clip)
    calls: list[None] = []
    features = mixture.text_features(model, lambda: calls.append(None) or torch.zeros(1))  # type: ignore[func-returns-value]
    assert (len(features), len(calls)) == (3, 1)  # the text weights are the same at both ends
    tuned = mixture.tuned_state(model)
    assert tuned is not None
    assert_same_state(dict(tuned), adapter.merged(clip))
    with pytest.raises(StateMismatchError, match="The adapter does not fit the base model"):
        Mixture(adapter.prefixed("x.")).setters(model).__enter__()
