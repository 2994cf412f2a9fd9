"""The contrastive objective: its loss and its gradients against a slow loop in float64."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from examples.finetune import train
from openvclip.errors import PromptingError
from openvclip.processes import Processes
from openvclip.training import PairEncoder, contrastive_loss
from openvclip.training.recipe import Run
from tests.examples.finetune_reference import TINY, prompted_classifier
from tests.forked import together
from tests.helpers import snapshot, tiny_tokenizer
from tests.training import objective_checks as checks

LIMIT = 300.0


@given(st.integers(1, 6), st.floats(0.1, 20), st.integers(0, 2**31), st.lists(st.integers(0, 2)))
def test_the_loss_is_that_of_a_slow_loop(n: int, scale: float, seed: int, kinds: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(2, n, 4, dtype=torch.float64, generator=generator)
    videos, texts = nn.functional.normalize(random, dim=-1)
    captions = [str(kinds[i]) if i < len(kinds) else f"other {i}" for i in range(n)]
    same = torch.tensor([[a == b for b in captions] for a in captions])
    batch = (videos, captions, [str(i) for i in range(n)])
    expected = torch.stack(checks.slow_losses(videos, texts, torch.tensor(scale).double(), batch))
    torch.testing.assert_close(contrastive_loss(videos, texts, scale, same), expected)
    if len(set(captions)) == n:
        torch.testing.assert_close(contrastive_loss(videos, texts, scale), expected)
    # Both directions count alike.
    torch.testing.assert_close(contrastive_loss(texts, videos, scale, same), expected)


@pytest.mark.parametrize("method", ["openvclip", "vifi", "vifi-text"])
@pytest.mark.parametrize("sizes", [[8], [3, 3, 2], [1] * 8])
def test_micro_batches_have_the_gradients_of_the_whole_batch(method: str, sizes: list[int]) -> None:
    learner = checks.encoder(method)
    loss, expected = checks.by_hand(learner, checks.joint())
    shares = checks.objective_of(learner).add_gradients(
        checks.parts(checks.joint(), sizes), 0.5, reduce=True
    )
    assert len(shares) == len(sizes)
    torch.testing.assert_close(float(shares.sum()), loss, rtol=1e-9, atol=0)
    checks.assert_gradients(learner.model, expected, 0.5)
    trained = {n for n, p in learner.model.named_parameters() if p.requires_grad}
    assert expected.keys() == trained


def test_two_processes_have_the_gradients_of_one_process_with_the_whole_batch(
    tmp_path: Path,
) -> None:
    with together(checks.main, tmp_path, logs=tmp_path) as processes:
        for process in processes:
            process.join(LIMIT)
    for rank in range(2):
        file = tmp_path / f"{rank}.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        failed = {name: text for name, text in results.items() if text != "passed"}
        assert not failed, f"process {rank}:\n" + "\n".join(failed.values())
        assert len(results) == 6, (tmp_path / f"{rank}.log").read_text()


def test_recall_of_one_process() -> None:
    checks.check_recall(Processes())


def test_both_passes_have_the_same_dropout() -> None:
    learner = checks.encoder()
    learner.model.visual.ln_post = nn.Sequential(learner.model.visual.ln_post, nn.Dropout(0.5))
    learner.train()
    outputs: list[torch.Tensor] = []
    learner.register_forward_hook(lambda _m, _i, output: outputs.append(output[0].detach()))
    torch.manual_seed(1)
    checks.objective_of(learner).add_gradients(
        checks.parts(checks.joint(), [4, 4]), 1.0, reduce=True
    )
    after = torch.rand(())
    first, second, *again = outputs
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    torch.manual_seed(1)
    for _ in range(2):
        learner(*(checks.joint(4)[0], None))
    assert torch.equal(torch.rand(()), after)  # the second pass takes no random numbers


def test_training_on_captions_with_the_regulariser_and_the_average() -> None:
    """IWR's loss is that of captions at the interpolated weights: half of it is added."""
    recipe = dataclasses.replace(TINY, lr=1e-3, epochs=3)
    learner = checks.encoder(dtype=torch.float64)
    batches = checks.parts(checks.joint(), [2, 2, 2, 2])
    losses: list[float] = []
    clip, swa = train(
        learner, batches, 2, recipe, run=Run(accumulate=2), on_step=lambda s: losses.append(s.loss)
    )
    before = checks.encoder(dtype=torch.float64)
    whole = checks.joint()
    first = tuple(part[:4] for part in whole)
    loss, _ = checks.by_hand(before, first)  # type: ignore[arg-type]
    assert losses[0] == pytest.approx(loss, rel=1e-9)
    assert swa is not None
    assert swa.n_averaged == 2
    changed = {n for n, v in snapshot(learner.model).items() if not torch.equal(v, clip[n])}
    assert changed == {n for n in clip if n.startswith("visual.") or n == "logit_scale"}


def test_the_scale_stays_below_100_as_in_the_training_of_clip() -> None:
    learner = checks.encoder()
    objective = checks.objective_of(learner)
    with torch.no_grad():
        learner.model.logit_scale.fill_(9.0)
    objective.after_step()
    assert learner.model.logit_scale.item() == pytest.approx(math.log(100))
    with torch.no_grad():
        learner.model.logit_scale.fill_(4.8)
    larger = checks.objective_of(learner)  # a model that has a larger scale keeps it
    with torch.no_grad():
        learner.model.logit_scale.fill_(9.0)
    larger.after_step()
    assert learner.model.logit_scale.item() == 4.8


def test_a_video_that_is_not_finite_is_the_only_one_that_is_named() -> None:
    batches = checks.parts(checks.joint(), [2, 2, 2, 2])
    batches[2][0][1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"nan at step 1.* Its videos: e, f\.$"):
        train(checks.encoder(), batches, 1, TINY, run=Run(accumulate=4))


def test_a_model_with_prompts_is_refused() -> None:
    model = prompted_classifier("bridge").model
    with pytest.raises(PromptingError, match="learned for class names, not for captions"):
        PairEncoder(model, tiny_tokenizer)
