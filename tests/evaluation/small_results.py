"""Folders of results as ``openvclip evaluate`` writes them, from random logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openvclip.evaluation import (
    Answers,
    ProtocolEvaluation,
    SplitScore,
    Timing,
    as_json,
    save_results,
    score,
)
from openvclip.video import Failure
from openvclip.video.protocols import Split

NASTY = '</script><img src=x onerror="boom()"> & <b>'


def splits_of(classes: int = 4, n: int = 30, *, several: bool = False) -> list[Split]:
    """A split, or two splits of a protocol that share a class."""
    names = [NASTY, "swim", "run", *(f"class {i}" for i in range(3, classes))]
    samples = [
        (f"{names[i % classes][:4].strip('<>/')}/v{i:03d}.mp4", i % classes) for i in range(n)
    ]
    if not several:
        return [Split("all", names, samples)]
    half = classes // 2
    first = [(path, label) for path, label in samples if label <= half]
    last = [(path, label - half) for path, label in samples if label >= half]
    return [
        Split("first", names[: half + 1], first, "twice"),
        Split("last", names[half:], last, "twice"),
    ]


def result_of(
    lams: Sequence[float | None],
    splits: Sequence[Split],
    *,
    seed: int = 0,
    videos: str = "",
    broken: Sequence[int] = (),
    **settings: Any,
) -> ProtocolEvaluation:
    """A result with random logits, which are better at small λ."""
    generator = torch.Generator().manual_seed(seed)
    scores: dict[float | None, list[SplitScore]] = {}
    for lam in lams:
        scores[lam] = []
        for split in splits:
            targets = torch.tensor([label for _, label in split.samples], dtype=torch.long)
            logits = torch.randn(len(targets), len(split.class_names), generator=generator)
            logits[range(len(targets)), targets] += 1.5 - (lam or 0.0)
            logits[list(broken)] = float("nan")
            best = logits.sort(dim=1, descending=True)
            labels = best.indices[:, :5].masked_fill(best.values[:, :5].isnan(), -1)
            answers = Answers([p for p, _ in split.samples], labels, best.values[:, :5] / 10)
            names = list(split.class_names)
            scores[lam].append(
                SplitScore(split.name, names, score(logits, targets), 0, split.protocol, answers)
            )
    failures = [Failure(i, f"/secret/{i}.mp4", "broken") for i in broken]
    known = {"model": "tiny", "weights": "w", "tuned": "t", "expand": "1 zero", "list": "l"}
    known = {**known, "protocol": "list.csv", "lams": [lam for lam in lams if lam is not None]}
    return ProtocolEvaluation(scores, failures, Timing(), {**known, **settings}, videos)


def write_results(
    folder: Path, result: ProtocolEvaluation, *, predictions: bool = True, **parts: bool
) -> Path:
    """Write a folder of results, without predictions as older versions did."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(as_json(result, **parts)))
    (folder / "settings.json").write_text(json.dumps(result.settings))
    if predictions:
        save_results(folder, result, **parts)
    return folder
