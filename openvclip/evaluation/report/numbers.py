"""The numbers of a page: models, tests, and what each model does on each test at each λ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from openvclip.errors import UsageError
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


@dataclass
class Run:
    """A model on a test.

    Attributes:
        results: the folder of results.
        protocol: the protocol of the test; ``""`` for the user's own list.
        model: index of the model.
        test: index of the test.
        details: classes, confusions and clips; ``None`` if the folder does not have them.
        is_clip: whether the model is the original CLIP: another model of the page was fine-tuned
            from its weights. The settings alone do not tell: a folder of a fine-tuned model has no
            other weights either.
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
        own = [entry for entry in self.results.entries if entry["protocol"] == self.protocol]
        return sorted(own, key=lambda entry: entry["lam"] if entry["lam"] is not None else 0.0)


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
    models: dict[Hashable, list[Results]] = {}
    tests: dict[Hashable, Results] = {}
    found = []
    taken = set()
    for one in results:
        for protocol in one.protocols:
            test = _test_key(one, protocol)
            key: Hashable = tuple(one.settings.get(name) for name in _OF_A_MODEL)
            while (key, test) in taken:  # the same model once more, such as on another device
                key = (key, "again")
            taken.add((key, test))
            models.setdefault(key, []).append(one)
            tests.setdefault(test, one)
            found.append((one, protocol, key, test))
    model_index, test_index = _indices(models), _indices(tests)
    bases = {_weights(one) for one in results if one.settings.get("tuned") is not None}
    runs = [
        Run(
            one,
            protocol,
            model_index[key],
            test_index[test],
            _details(one, protocol),
            _is_original(one, bases),
        )
        for one, protocol, key, test in found
    ]
    labels = _model_names([folders[0] for folders in models.values()], bases)
    if names and (len(names) != len(labels) or len(set(names)) < len(names)):
        raise UsageError(
            f"There are {len(names)} names ({', '.join(names)}) for {len(labels)} models "
            f"({', '.join(labels)}); expected a different name for each model."
        )
    return runs, list(names) or labels, _test_names(tests)


def _indices(keys: dict[Hashable, Any]) -> dict[Hashable, int]:
    return {key: index for index, key in enumerate(keys)}


def _test_key(results: Results, protocol: str) -> Hashable:
    """Return what two evaluations on the same videos and classes have in common."""
    entry = next(entry for entry in results.entries if entry["protocol"] == protocol)
    splits = tuple((split["name"], split["classes"]) for split in entry["splits"])
    # A published protocol has its own videos. The list of the settings holds those of all
    # protocols of the evaluation.
    own = () if protocol else (results.settings.get("protocol"), results.settings.get("list"))
    return (protocol, splits, own)


def _details(results: Results, protocol: str) -> Details | None:
    if results.predictions is not None:
        return details_of_predictions(results.predictions, protocol)
    entries = [entry for entry in results.entries if entry["protocol"] == protocol]
    entries.sort(key=lambda entry: entry["lam"] if entry["lam"] is not None else 0.0)
    return details_of_confusion(entries) or accuracies_only(entries)


def _weights(results: Results) -> str | None:
    """Return the hash of the original weights."""
    return results.settings.get("weights")


def _is_original(results: Results, bases: set[str | None]) -> bool:
    """Return whether a model is the original CLIP of a fine-tuned model.

    Args:
        results: the results of the model.
        bases: the original weights of all fine-tuned models.
    """
    weights = _weights(results)
    return results.settings.get("tuned") is None and weights is not None and weights in bases


def _model_names(results: Sequence[Results], bases: set[str | None]) -> list[str]:
    plain = []
    for one in results:
        name = str(one.settings.get("model") or one.folder.name)
        plain.append(f"{name}, original CLIP" if _is_original(one, bases) else name)
    return _distinct(plain, results)


def _test_names(tests: dict[Hashable, Results]) -> list[str]:
    plain = []
    for key, one in tests.items():
        protocol = key[0]  # type: ignore[index]
        plain.append(str(protocol or one.settings.get("protocol") or one.folder.name))
    return _distinct(plain, list(tests.values()))


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
    """Return the original CLIP on the same test; rather frame by frame than expanded."""
    candidates = [
        other
        for other in runs
        if other.is_clip
        and other is not run
        and other.test == run.test
        and _weights(other.results) == _weights(run.results)
        and other.details is not None
    ]
    candidates.sort(key=lambda other: other.results.settings.get("expand") is not None)
    return candidates[0] if candidates else None


def _run_numbers(run: Run, clip: Run | None, clips: int) -> dict[str, Any]:
    entries, details = run.entries, run.details
    first = entries[0]["splits"]
    lams = [entry["lam"] for entry in entries]
    result: dict[str, Any] = {
        "model": run.model,
        "test": run.test,
        "folder": run.results.folder.resolve().name,
        "lams": lams,
        "clips": sum(split["clips"] for split in first),
        "left_out": sum(split["left_out"] for split in first),
        "unreadable": run.results.unreadable,
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
        clip = None
    reference: tuple[Details | None, int] | None = None
    if clip is not None:
        reference = (clip.details, 0)
        top1 = clip.entries[0]["top1"]["mean"]
        result["baseline"] = {"name": "the original CLIP", "top1": top1, "model": clip.model}
    elif 1.0 in lams and len(lams) > 1:
        at = lams.index(1.0)
        reference = (details, at)
        result["baseline"] = {"name": "CLIP at λ = 1", "top1": result["top1"][at]}
    if details is not None:
        result["details"] = details.as_json(clips, reference)
    return result
