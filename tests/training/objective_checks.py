"""The contrastive objective in two processes; ``tests/training/test_objectives.py`` starts them."""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import Dataset

import openvclip
from openvclip.evaluation import retrieval_metrics
from openvclip.processes import Processes
from openvclip.training.captions import CaptionedVideos
from openvclip.training.methods import choose_trained
from openvclip.training.objectives import Contrastive, make_objective
from openvclip.training.pairs import PairEncoder
from openvclip.training.processes import give_scalars_an_axis, wrap
from openvclip.training.recipe import Run
from openvclip.training.validation import SharedRetrieval
from openvclip.video import VideoSample
from openvclip.weights.shards import whole
from tests.helpers import random_video, tiny_clip, tiny_tokenizer

# The last two pairs have a caption of an earlier pair, and a video of an earlier pair.
CAPTIONS = ["a dog", "a cat", "the sea", "a red kite", "two men", "the sea", "a lion", "a tiger"]
NAMES = ["a", "b", "c", "d", "e", "f", "g", "b"]
Batch = tuple[Tensor, list[str], list[str]]


def encoder(method: str = "openvclip", dtype: torch.dtype = torch.float64) -> PairEncoder:
    model = openvclip.expand_temporal_attention(tiny_clip()).to(dtype)
    choose_trained(model, method)
    return PairEncoder(model, tiny_tokenizer)


def joint(size: int = 8) -> Batch:
    return random_video(size, 3, 1).double(), CAPTIONS[:size], NAMES[:size]


def parts(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """A batch in micro-batches."""
    result, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        result.append((batch[0][rows], batch[1][rows], batch[2][rows]))
        start += size
    assert start == len(batch[1])
    return result


def slow_losses(videos: Tensor, texts: Tensor, scale: Tensor, batch: Batch) -> list[Tensor]:
    """The symmetric InfoNCE loss of each pair, written out with one exponential at a time."""
    _, captions, names = batch
    losses = []
    for i in range(len(captions)):
        # As many characters as the tokenizer reads.
        rivals = [
            j
            for j in range(len(captions))
            if j == i or (captions[j] != captions[i] and names[j] != names[i])
        ]
        right = torch.exp(scale * (videos[i] * texts[i]).sum())
        of_texts = sum(torch.exp(scale * (videos[i] * texts[j]).sum()) for j in rivals)
        of_videos = sum(torch.exp(scale * (videos[j] * texts[i]).sum()) for j in rivals)
        losses.append(-(torch.log(right / of_texts) + torch.log(right / of_videos)) / 2)
    return losses


def by_hand(learner: PairEncoder, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss of a whole batch and its gradients, with autograd in one process."""
    model: Any = copy.deepcopy(learner.model)
    frames = model.encode_image(batch[0])
    frames = frames / frames.norm(dim=-1, keepdim=True)
    videos = frames.mean(dim=1)
    videos = videos / videos.norm(dim=-1, keepdim=True)
    texts = model.encode_text(tiny_tokenizer(batch[1]))
    texts = texts / texts.norm(dim=-1, keepdim=True)
    losses = slow_losses(videos, texts, model.logit_scale.exp(), batch)
    loss = sum(losses[1:], losses[0]) / len(losses)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def objective_of(
    learner: PairEncoder, forward: nn.Module | None = None, processes: Processes | None = None
) -> Contrastive:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    made = make_objective(learner, forward or learner, scaler, Run(), processes or Processes())
    assert isinstance(made, Contrastive)
    return made


def assert_gradients(model: nn.Module, expected: dict[str, Tensor], factor: float = 1.0) -> None:
    actual = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        wanted = factor * expected[name].reshape(value.shape)
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12, msg=f"{name}: {{}}".format)


def compare(
    processes: Processes, method: str, *, fsdp: bool, sizes: Sequence[Sequence[int]]
) -> None:
    """Each process has its own part of the joint batch, in its own micro-batches."""
    learner = encoder(method)
    loss, expected = by_hand(learner, joint())
    if fsdp:
        give_scalars_an_axis(learner.model)
    device = torch.device("cpu")
    forward = wrap(learner, processes, device, fsdp=fsdp, compiler=None)
    objective = objective_of(learner, forward, processes)
    flat = parts(joint(), [size for share in sizes for size in share])
    first = sum(map(len, sizes[: processes.rank]))
    own = flat[first : first + len(sizes[processes.rank])]
    # As in a step with the regulariser: a pass whose gradients wait for the second pass.
    objective.add_gradients(own, 0.5, reduce=False)
    shares = objective.add_gradients(own, 1.0, reduce=True)
    total = shares.sum()
    distributed.all_reduce(total)
    torch.testing.assert_close(float(total) / 2, loss, rtol=1e-9, atol=0)
    assert_gradients(learner.model, expected, 1.5)
    objective.after_step()


class Clips(Dataset[VideoSample]):
    """Five clips of noise, of which the second can't be read."""

    videos = random_video(5, 3, 2).double()

    def __getitem__(self, index: int) -> VideoSample:
        return VideoSample(self.videos[index], index, index, "broken" if index == 1 else "")

    def __len__(self) -> int:
        return len(self.videos)


def check_recall(processes: Processes, *, fsdp: bool = False) -> None:
    """The recall of five videos, which processes share, against that of all features at once."""
    captions = [["a dog"], ["a cat", "one cat"], ["the sea"], ["a red kite"], ["two men"]]
    learner, clips = encoder("vifi").eval(), Clips()
    with torch.no_grad():
        texts = learner(None, learner.tokens([t for texts in captions for t in texts]))[1]
        similarities = texts @ learner(clips.videos, None)[0].T
    similarities[:, 1] = float("-inf")
    expected = retrieval_metrics(similarities, [1, 2, 1, 1, 1])
    if fsdp:
        give_scalars_an_axis(learner.model)
        wrap(learner, processes, torch.device("cpu"), fsdp=True, compiler=None)
    videos: Any = clips
    shared = SharedRetrieval(
        CaptionedVideos(videos, captions), processes, batch_size=2, num_workers=0, amp=None
    )
    measured = shared.of(learner)
    assert measured == {f"{name}_R1": values["R1"] / 100 for name, values in expected.items()}


def main(out: Path) -> None:
    distributed.init_process_group("gloo")
    processes = Processes(distributed.get_rank(), distributed.get_world_size())
    runs = {
        "data parallel": ("vifi", False, ([2, 2], [3, 1])),
        "unlike sizes": ("openvclip", False, ([3, 2], [2, 1])),
        "sharded": ("vifi", True, ([4], [4])),
        "sharded, micro-batches": ("openvclip", True, ([2, 2], [2, 2])),
    }
    checks: dict[str, Any] = {
        name: partial(compare, processes, method, fsdp=fsdp, sizes=sizes)
        for name, (method, fsdp, sizes) in runs.items()
    }
    checks["recall"] = partial(check_recall, processes)
    checks["recall, sharded"] = partial(check_recall, processes, fsdp=True)
    results = {}
    for name, check in checks.items():
        try:
            check()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc(limit=-8, chain=False)
        (out / f"{processes.rank}.json").write_text(json.dumps(results))
        distributed.barrier()
    distributed.destroy_process_group()
