"""The numbers of a page: models, tests, and what each model does on each test at each λ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openvclip.errors import UsageError, listed
from openvclip.evaluation.report.details import (
    Details,
    accuracies_only,
    details_of_confusion,
    details_of_predictions,
)
from openvclip.evaluation.report.reading import Results

__all__ = ["Run", "numbers_of", "runs_of"]

# What tells the weights and the use of two models apart, in the settings of an evaluation. The
# frames are not among them: a test of long videos can need more frames.
_OF_A_MODEL = ("model", "architecture", "weights", "tuned", "expand", "text", "pooling", "amp")
# What else changes the accuracy. (The settings do not hold the templates.)
_OF_USE = ("num_frames", "sampling_rate", "target_fps", "views", "sampler", "transform", "pooling")


@dataclass
class Run:
    """A model on a test.

    Attributes:
        results: the folder of results.
        protocol: the protocol of the test; ``""`` for the user's own list.
        model: index of the model.
        test: index of the test.
        details: classes, confusions and clips; ``None`` if the folder does not have them.
        is_clip: whether the model is the original CLIP, see :func:`_is_original`.
    """

    results: Results
    protocol: str
    model: int
    test: int
    details: Details | None
    is_clip: bool = False

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The accuracies at each λ, smallest λ first."""
        return self.results.of(self.protocol)


@dataclass
class _Test:
    """The videos and the classes of an evaluation.

    Attributes:
        key: the protocol, and what the settings and the splits say about the videos.
        classes: the class names, or ``None`` if no folder of the test has them.
        results: the first folder of the test.
        protocol: the protocol; ``""`` for the user's own list.
    """

    key: str
    classes: frozenset[str] | None
    results: Results
    protocol: str


def runs_of(
    results: Sequence[Results], names: Sequence[str] = ()
) -> tuple[list[Run], list[str], list[str]]:
    """Sort folders of results by models and tests.

    Args:
        results: the folders of results.
        names: names of the models, in the order in which the folders name them. Default: the
            names in the settings, with the name of a folder if two models have the same name.

    Returns:
        The runs, the names of the models and the names of the tests.

    Raises:
        UsageError: ``names`` is given, and there are more or fewer models.
    """
    models: dict[tuple[str, int], Results] = {}
    tests: list[_Test] = []
    bases = {_weights(one) for one in results if one.settings.get("tuned") is not None}
    bases.discard(None)
    runs: list[Run] = []
    taken = set()
    for one in results:
        for protocol in one.protocols:
            details = _details(one, protocol)
            test = _test_index(tests, one, protocol, details)
            model = _model_key(one, bases)
            again = 0
            while (model, again, test) in taken:  # such as the same model on another device
                again += 1
            taken.add((model, again, test))
            models.setdefault((model, again), one)
            index = list(models).index((model, again))
            runs.append(Run(one, protocol, index, test, details, _is_original(one, bases)))
    labels = _model_names(list(models.values()), bases)
    if names and (len(names) != len(labels) or len(set(names)) < len(names)):
        raise UsageError(
            f"The names are {listed(names, 10)}, and the models are {listed(labels, 10)}; expected "
            "a different name for each model."
        )
    return runs, list(names) or labels, _test_names(tests)


def _model_key(results: Results, bases: set[str | None]) -> str:
    """Return what two evaluations of the same model have in common."""
    original = _is_original(results, bases)
    names = [name for name in _OF_A_MODEL if name != "tuned" or not original]
    return json.dumps([original, *(results.settings.get(name) for name in names)])


def _test_index(
    tests: list[_Test], results: Results, protocol: str, details: Details | None
) -> int:
    """Return the index of a test, which is added to ``tests`` if it is a new one.

    Two evaluations are of one test if they have the same videos and the same classes.
    """
    splits = [
        (split["name"], split["classes"], split["clips"] + split["left_out"])
        for split in results.of(protocol)[0]["splits"]
    ]
    # A published protocol has its own videos. The list of the settings holds those of all
    # protocols of the evaluation.
    own = [] if protocol else [results.settings.get("protocol"), results.settings.get("list")]
    key = json.dumps([protocol, splits, own])
    classes = None if details is None else frozenset(details.classes)
    for index, test in enumerate(tests):
        if test.key == key and (None in (classes, test.classes) or classes == test.classes):
            test.classes = test.classes or classes
            return index
    tests.append(_Test(key, classes, results, protocol))
    return len(tests) - 1


def _details(results: Results, protocol: str) -> Details | None:
    if results.predictions is not None:
        return details_of_predictions(results.predictions, protocol)
    entries = results.of(protocol)
    return details_of_confusion(entries) or accuracies_only(entries)


def _weights(results: Results) -> str | None:
    """Return the hash of the original weights."""
    weights = results.settings.get("weights")
    return weights if isinstance(weights, str) else None


def _origin(results: Results) -> tuple[str | None, Any]:
    """Return the hash of the original weights; without a hash, the name of the model."""
    weights = _weights(results)
    return weights, None if weights else results.settings.get("model")


def _is_original(results: Results, bases: set[str | None]) -> bool:
    """Return whether a model is the original CLIP of a fine-tuned model.

    The user can say so. Otherwise, with fine-tuned weights, it is the original CLIP if λ = 1 is the
    only λ. Without fine-tuned weights, it is the original CLIP if another model of the page was
    fine-tuned from its weights. The settings alone do not tell: the results of a folder with a
    fine-tuned model have no other weights either.

    Args:
        results: the results of the model.
        bases: the original weights of all fine-tuned models.
    """
    if results.original:
        return True
    if results.settings.get("tuned") is not None:
        return {entry["lam"] for entry in results.entries} == {1.0}
    return _weights(results) in bases


def _model_names(results: Sequence[Results], bases: set[str | None]) -> list[str]:
    plain = []
    for one in results:
        name = str(one.settings.get("model") or one.folder.resolve().name)
        plain.append(f"{name}, original CLIP" if _is_original(one, bases) else name)
    return _distinct(plain, results)


def _test_names(tests: Sequence[_Test]) -> list[str]:
    folders = [test.results for test in tests]
    names = [
        str(test.protocol or one.settings.get("protocol") or one.folder.resolve().name)
        for test, one in zip(tests, folders, strict=True)
    ]
    return _distinct(names, folders)


def _distinct(names: list[str], results: Sequence[Results]) -> list[str]:
    """Add the name of the folder to names that occur more than once, then a number."""
    count = Counter(names)
    names = [
        f"{name} ({one.folder.resolve().name})" if count[name] > 1 else name
        for name, one in zip(names, results, strict=True)
    ]
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[index] = f"{name} {seen[name]}"
    return names


def numbers_of(
    runs: Sequence[Run], models: Sequence[str], tests: Sequence[str], clips: int
) -> dict[str, Any]:
    """Return what the script of a page shows, as JSON objects.

    Args:
        runs: the models on the tests.
        models: names of the models.
        tests: names of the tests.
        clips: largest number of wrong clips for each run and λ.
    """
    return {
        "models": list(models),
        "tests": list(tests),
        "runs": [_run_numbers(run, _baseline_of(run, runs), clips) for run in runs],
    }


def _baseline_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the original CLIP on the same test.

    The results that the user names come first, whatever the weights are. Of the others, which have
    the same original weights, results with classes come first, then those with the same settings,
    and then the original CLIP frame by frame.
    """
    candidates = [
        other
        for other in runs
        if other.is_clip
        and other is not run
        and other.test == run.test
        and (other.results.original or _origin(other.results) == _origin(run.results))
    ]
    return min(
        candidates,
        key=lambda other: (
            not other.results.original,
            other.details is None,
            len(_other_use(run, other)),
            other.results.settings.get("expand") is not None,
        ),
        default=None,
    )


def _other_use(run: Run, other: Run) -> list[str]:
    """Return the names of the settings in which the use of two models differs."""
    a, b = run.results.settings, other.results.settings
    return [name for name in _OF_USE if a.get(name) != b.get(name)]


def _run_numbers(run: Run, clip: Run | None, clips: int) -> dict[str, Any]:
    entries, details = run.entries, run.details
    first = entries[0]["splits"]
    lams = [None if entry["lam"] is None else float(f"{entry['lam']:g}") for entry in entries]
    result: dict[str, Any] = {
        "model": run.model,
        "test": run.test,
        "folder": run.results.folder.resolve().name,
        "lams": lams,
        "clips": sum(split["clips"] for split in first),
        "left_out": any(split["left_out"] for e in run.results.entries for split in e["splits"]),
        "unreadable": run.results.unreadable,
        "several_tests": len(run.results.protocols) > 1,
        "resumable": run.results.resumable,
        "splits": [
            {
                "name": split["name"],
                "classes": split["classes"],
                "clips": split["clips"],
                **{k: [entry["splits"][i][k] for entry in entries] for k in ("top1", "top5")},
            }
            for i, split in enumerate(first)
        ],
        "baseline": None,
        "details": None,
    }
    for k in ("top1", "top5"):
        result[k] = [entry[k]["mean"] for entry in entries]
        result[f"{k}_std"] = [entry[k]["std"] for entry in entries]
    if run.is_clip:
        result["clip"] = True
        if len(lams) == 1:  # the original CLIP has no λ, also if it was evaluated as λ = 1
            result["lams"] = [None]
        clip = None
    reference: tuple[Details | None, int] | None = None
    if clip is not None:
        reference = (clip.details, 0)
        top1 = clip.entries[0]["top1"]["mean"]
        result["baseline"] = {
            "name": "the original CLIP",
            "top1": top1,
            "model": clip.model,
            "differs": _other_use(run, clip),
        }
    elif 1.0 in lams and len(lams) > 1:
        at = lams.index(1.0)
        reference = (details, at)
        result["baseline"] = {"name": "CLIP at λ = 1", "top1": result["top1"][at]}
    if details is not None:
        result["details"] = details.as_json(clips, reference)
    return result
