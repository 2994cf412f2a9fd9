"""How well does a model know that a clip is none of its labels?

This command measures it in the shapes world, and writes the tables and the figure of
docs/none-of-these.md: which score separates clips of the labels from other clips, what a calibrated
threshold keeps and rejects, and what a temperature does to the probabilities. It trains Open-VCLIP
once for each seed. Scores are compared, and thresholds and temperatures are chosen, on clips of the
development shapes. They are reported on clips of the unseen shapes, with other labels.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import openvclip
from examples.finetune import train
from examples.shapes.clips import make_clips
from examples.shapes.experiment import (
    Settings,
    clips_folder,
    load_clips,
    make_classifier,
    recipe_of,
)
from examples.shapes.model import Tokenizer, create_model
from examples.shapes.settings import FULL, SMOKE
from examples.shapes.studies import OPEN_VCLIP
from examples.shapes.study_options import read_arguments
from examples.shapes.world import ACTIONS, TEMPLATES, Split, class_names
from openvclip.checkpoints import atomic_path, load_checkpoint, save_checkpoint
from openvclip.commands.streams import command
from openvclip.evaluation import (
    accuracy_coverage,
    auroc,
    expected_calibration_error,
    markdown_table,
    mean_and_std,
)
from openvclip.models import (
    class_features,
    confidence_score,
    fit_temperature,
    threshold_to_keep,
)
from openvclip.models.confidence import require_score
from openvclip.models.drawing import new_figure, save_figure

KEEP = 0.95
LAM = 0.5
MODELS = ("CLIP", "fine-tuned (λ = 0)", "Open-VCLIP (λ = 0.5)")
OTHERS = ("shapes", "actions")
"""What the clips of none of the labels show: other shapes, or other actions of the same shapes."""
SCORES = ("cosine", "energy", "probability", "probability, background")
RULES = ("development", "own clips", "background")
COVERAGES = [i / 20 for i in range(1, 21)]
BINS = 10
SPLITS: tuple[Split, Split] = ("development", "unseen")

Measures = dict[str, Any]
"""Numbers by name. The parts of a name are separated by ``/``. A number has a list over the
seeds."""


@dataclass(frozen=True)
class Clips:
    """The logits of clips, some of which belong to none of the labels.

    Attributes:
        cosines: cosines of the labels, ``[N, K]``.
        logits: logits of the labels, ``[N, K]``.
        with_background: logits of the labels and of the background texts, ``[N, K + B]``.
        targets: index of the label of each clip; -1 for none of the labels, ``[N]``.
    """

    cosines: Tensor
    logits: Tensor
    with_background: Tensor
    targets: Tensor

    @property
    def inside(self) -> Tensor:
        """Whether each clip belongs to one of the labels, ``[N]``."""
        return self.targets >= 0

    @property
    def correct(self) -> Tensor:
        """Whether the label with the highest logit is right, ``[N]``."""
        return self.logits.argmax(dim=1) == self.targets

    def scores(self, name: str) -> Tensor:
        """Return a score of :data:`SCORES` for each clip, ``[N]``."""
        score, _, background = name.partition(", ")
        logits = self.with_background if background else self.logits
        return confidence_score(require_score(score), self.cosines, logits)


def measure_seed(settings: Settings, seed: int, out: Path, measures: Measures) -> None:
    """Add the numbers of one seed to the measures."""
    clips = replace(settings.clips, seed=seed)
    folder = clips_folder(out, seed)
    make_clips(folder, clips)
    tuned = _trained(settings, seed, folder, out)
    data = {split: load_clips(folder, split) for split in SPLITS}
    for name, model, tokenizer in _models(tuned):
        features = {split: _features(model, data[split]) for split in SPLITS}
        _measure_calibration(name, model, tokenizer, features, measures)
        for others in OTHERS:
            sides = {
                split: _clips(model, tokenizer, split, others, *features[split]) for split in SPLITS
            }
            _measure_rejection(f"{name}/{others}", sides, measures)


def _trained(settings: Settings, seed: int, folder: Path, out: Path) -> dict[str, Tensor]:
    """Return the averaged weights of Open-VCLIP, from the file of an earlier call if it exists.

    The name of the file holds a hash of the recipe and of the clips, so that weights of other
    settings are not used.
    """
    recipe = recipe_of(settings, OPEN_VCLIP, seed)
    about = repr((recipe, OPEN_VCLIP.how, replace(settings.clips, seed=seed)))
    key = hashlib.sha256(about.encode()).hexdigest()[:12]
    path = out / f"none-of-these-{seed}-{key}.safetensors"
    if not path.exists():
        model, tokenizer = create_model()
        openvclip.expand_temporal_attention(model)
        loader = DataLoader(
            load_clips(folder, "train"),
            recipe.batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
        )
        classifier = make_classifier(model, tokenizer, "seen")
        _, average = train(classifier, loader, len(loader), recipe, run=OPEN_VCLIP.how)
        assert average is not None
        save_checkpoint(average.averaged_state_dict(), path)
    return load_checkpoint(path)


def _models(tuned: dict[str, Tensor]) -> Iterator[tuple[str, Any, Tokenizer]]:
    """Yield the name, the model and the tokenizer of each of :data:`MODELS`."""
    model, tokenizer = create_model()
    yield MODELS[0], model, tokenizer
    clip = {name: value.clone() for name, value in model.state_dict().items()}
    openvclip.expand_temporal_attention(model)
    for name, lam in zip(MODELS[1:], (0.0, LAM), strict=True):
        openvclip.interpolate_into(model, clip, tuned, lam)
        yield name, model, tokenizer


@torch.no_grad()
def _features(model: Any, data: TensorDataset) -> tuple[Tensor, Tensor]:
    """Return the features ``[N, D]`` of clips, and their class indices ``[N]``."""
    videos, classes = data.tensors
    encoded = [openvclip.encode_video(model, batch) for batch in videos.split(64)]
    return torch.cat(encoded), classes


@torch.no_grad()
def _clips(
    model: Any, tokenizer: Tokenizer, split: Split, others: str, features: Tensor, classes: Tensor
) -> Clips:
    """Return clips of a split. Half of its classes are labels; the background are seen classes."""
    names = class_names(split)
    index = torch.arange(len(names))
    part = index // len(ACTIONS) if others == "shapes" else index % len(ACTIONS)
    is_label = part % 2 == 0
    labels = [name for name, is_one in zip(names, is_label.tolist(), strict=True) if is_one]
    texts = class_features(model, tokenizer, [*labels, *class_names("seen")], TEMPLATES)
    cosines, scale = features @ texts.T, model.logit_scale.exp()
    position = (is_label.cumsum(0) - 1).masked_fill(~is_label, -1)
    n = len(labels)
    return Clips(cosines[:, :n], scale * cosines[:, :n], scale * cosines, position[classes])


def _measure_rejection(key: str, sides: dict[Split, Clips], measures: Measures) -> None:
    unseen = sides["unseen"]
    for score in SCORES:
        for split in SPLITS:
            clips = sides[split]
            values = clips.scores(score)
            _add(measures, f"auroc/{key}/{split}/{score}", auroc(values, clips.inside))
            inside = accuracy_coverage(values[clips.inside], clips.correct[clips.inside])
            _add(measures, f"aurc of labels/{key}/{split}/{score}", inside.aurc)
            everything = accuracy_coverage(values, clips.correct)
            _add(measures, f"aurc/{key}/{split}/{score}", everything.aurc)
        curve = accuracy_coverage(unseen.scores(score), unseen.correct)
        heights = [curve.accuracy_at(coverage) for coverage in COVERAGES]
        _add(measures, f"curve/{key}/{score}", heights)
    _measure_rules(key, sides, measures)


def _measure_rules(key: str, sides: dict[Split, Clips], measures: Measures) -> None:
    """Add what each of :data:`RULES` keeps and rejects of the clips of unseen shapes."""
    unseen = sides["unseen"]
    cosines = {split: sides[split].scores("cosine") for split in SPLITS}
    of_development = cosines["development"][sides["development"].inside]
    is_own = torch.arange(len(unseen.targets)) % 128 < 64  # every second clip of each class
    own = cosines["unseen"][unseen.inside & is_own]
    n_labels = unseen.logits.shape[1]
    beaten = unseen.with_background.argmax(dim=1) >= n_labels
    rejected = {
        "development": cosines["unseen"] < threshold_to_keep(of_development, KEEP),
        "own clips": cosines["unseen"] < threshold_to_keep(own, KEEP),
        "background": beaten,
    }
    for rule in RULES:
        counted = ~is_own if rule == "own clips" else torch.ones_like(is_own)
        kept = ~rejected[rule][unseen.inside & counted]
        out = rejected[rule][~unseen.inside & counted]
        _add(measures, f"kept/{key}/{rule}", float(kept.double().mean()))
        _add(measures, f"rejected/{key}/{rule}", float(out.double().mean()))


@torch.no_grad()
def _measure_calibration(
    name: str,
    model: Any,
    tokenizer: Tokenizer,
    features: dict[Split, tuple[Tensor, Tensor]],
    measures: Measures,
) -> None:
    """Fit the temperature on the development classes, and measure it on the unseen classes."""
    logits: dict[Split, Tensor] = {}
    for split, (encoded, _) in features.items():
        texts = class_features(model, tokenizer, class_names(split), TEMPLATES)
        logits[split] = model.logit_scale.exp() * encoded @ texts.T
    temperature = fit_temperature(logits["development"], features["development"][1])
    _add(measures, f"temperature/{name}", temperature)
    for split in SPLITS:
        correct = logits[split].argmax(dim=1) == features[split][1]
        _add(measures, f"top1/{name}/{split}", float(correct.double().mean()))
        for when, divisor in (("before", 1.0), ("after", temperature)):
            best = (logits[split] / divisor).softmax(dim=1).max(dim=1).values
            ece = expected_calibration_error(best, correct)
            _add(measures, f"ece/{name}/{split}/{when}", ece)
            _add(measures, f"reliability/{name}/{split}/{when}", _reliability(best, correct))


def _reliability(probabilities: Tensor, correct: Tensor) -> list[list[float]]:
    """Return the number of clips, the sum of probabilities and the right answers in each bin."""
    place = (probabilities * BINS).long().clamp(max=BINS - 1)
    rows = (torch.ones_like(probabilities), probabilities, correct)
    return [torch.bincount(place, row.double(), BINS).tolist() for row in rows]


def _add(measures: Measures, name: str, value: Any) -> None:
    measures.setdefault(name, []).append(_rounded(value))


def _rounded(value: Any) -> Any:
    """Return numbers, or lists of numbers, with 5 digits after the decimal point."""
    return [_rounded(part) for part in value] if isinstance(value, list) else round(value, 5)


# --- tables and figure -------------------------------------------------------------------------


def tables(measures: Measures) -> dict[str, str]:
    """Return the Markdown tables by name. Cells are in %, mean ± standard deviation over seeds."""
    return {
        "auroc": _score_table(measures, "auroc"),
        "aurc": _score_table(measures, "aurc", "aurc of labels"),
        "threshold": _threshold_table(measures),
        "ece": _ece_table(measures),
    }


def _score_table(measures: Measures, measure: str, of_labels: str = "") -> str:
    columns = [(split, others) for others in OTHERS for split in SPLITS]
    header = ["model", "score", *(f"other {others}, {split}" for split, others in columns)]
    rows = []
    for model in MODELS:
        for score in SCORES:
            cells = [
                mean_and_std(measures[f"{measure}/{model}/{others}/{split}/{score}"])
                for split, others in columns
            ]
            if of_labels:
                values = measures[f"{of_labels}/{model}/shapes/unseen/{score}"]
                cells.append(mean_and_std(values))
            rows.append([model, score, *cells])
    return markdown_table([*header, *(["labels alone, unseen"] if of_labels else [])], rows)


def _threshold_table(measures: Measures) -> str:
    header = ["model", "rejected by"]
    header += [f"{what}, other {others}" for others in OTHERS for what in ("kept", "rejected")]
    words = {
        "development": "threshold of development clips",
        "own clips": "threshold of own clips",
        "background": "background texts",
    }
    rows = []
    for model in MODELS:
        for rule in RULES:
            cells = [
                mean_and_std(measures[f"{what}/{model}/{others}/{rule}"])
                for others in OTHERS
                for what in ("kept", "rejected")
            ]
            rows.append([model, words[rule], *cells])
    return markdown_table(header, rows)


def _ece_table(measures: Measures) -> str:
    columns = [(split, when) for split in SPLITS for when in ("before", "after")]
    header = ["model", "temperature", "top-1, unseen"]
    header += [f"ECE {when}, {split}" for split, when in columns]
    rows = []
    for model in MODELS:
        temperature = mean_and_std([t / 100 for t in measures[f"temperature/{model}"]], digits=2)
        cells = [mean_and_std(measures[f"ece/{model}/{split}/{when}"]) for split, when in columns]
        top1 = mean_and_std(measures[f"top1/{model}/unseen"])
        rows.append([model, temperature, top1, *cells])
    return markdown_table(header, rows)


def draw(measures: Measures, path: Path) -> None:
    """Draw accuracy over coverage, and accuracy over probability, of Open-VCLIP."""
    figure = new_figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    for score in SCORES:
        seeds = torch.tensor(measures[f"curve/{MODELS[2]}/shapes/{score}"])
        left.plot([100 * c for c in COVERAGES], 100 * seeds.mean(dim=0), "o-", ms=3, label=score)
    left.set(xlabel="answered clips (%)", ylabel="right answers (%)", ylim=(0, 100))
    left.set_title("Half of the clips are none of the labels")
    for when in ("before", "after"):
        bins = torch.tensor(measures[f"reliability/{MODELS[2]}/unseen/{when}"]).sum(dim=0)
        count, probability, correct = bins[:, bins[0] >= 20]
        right.plot(100 * probability / count, 100 * correct / count, "o-", ms=4, label=when)
    right.plot([0, 100], [0, 100], color="grey", linewidth=1, linestyle="--")
    right.set(xlabel="probability of the answer (%)", ylabel="right answers (%)", ylim=(0, 100))
    right.set_title("Before and after the temperature")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


@command
def main(arguments: list[str] | None = None) -> None:
    """Measure all seeds, then write and print the tables."""
    args = read_arguments("none_of_these", __doc__, arguments)
    settings, started = FULL, time.perf_counter()
    if args.smoke:  # a threshold needs 19 clips of the labels
        settings = replace(SMOKE, clips=replace(SMOKE.clips, test=128))
    measures: Measures = {}
    try:
        for seed in range(args.seeds):
            measure_seed(settings, seed, args.out, measures)
            print(f"seed {seed}: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
    except (openvclip.OpenVCLIPError, FileExistsError) as error:
        raise SystemExit(str(error)) from error
    content = {"clips": asdict(settings.clips), "seeds": args.seeds, "measures": measures}
    with atomic_path(args.out / "none-of-these.json") as temporary:
        temporary.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    draw(measures, args.out / "none-of-these.png")
    for name, table in tables(measures).items():
        print(f"\n{name} (%):\n\n{table}")
    print(f"\nwrote {args.out / 'none-of-these.json'}, {args.out / 'none-of-these.png'}")


if __name__ == "__main__":
    main()
