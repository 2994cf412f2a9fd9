"""Errors and warnings of openvclip, and the parts of their texts.

Every error derives from :class:`OpenVCLIPError` and from a built-in exception of the same kind.
Each error text says what was given, what was expected and what to do. A text lists at most ten
names, and it names the known names that are close to an unknown one (:func:`did_you_mean`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

_MOST_NAMES = 10  # names in a text
_MOST_COMPARED = 2000  # names that are compared letter by letter
_CLOSE = 0.75  # least ratio of difflib


class OpenVCLIPError(Exception):
    """Base class of all errors that openvclip raises on purpose."""


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first ``most`` names as text, with ``...`` if more follow."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def reason_of(error: BaseException) -> str:
    """Return the first line of the text of an error, or the name of its class without a text."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def near_matches(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return the known names that are close to a name, the closest first.

    If names differ only in case, spaces and punctuation, these are all. Otherwise names with the
    same words in another order come first, then names that have all words of ``name`` among
    others, then names with similar letters or with the same beginning.

    Args:
        name: the unknown name.
        known: the known names. ``name`` itself is left out.
        most: largest number of names to return.
    """
    plain = {other: _plain(other) for other in known if other != name}
    wanted, words = _plain(name), _words(name)
    same = [other for other, text in plain.items() if text == wanted]
    if same:
        return same[:most]
    with_words = {other: _words(other) for other in plain}
    reordered = [other for other in plain if words and with_words[other] == words]
    similar = [other for other, text in plain.items() if _begins(wanted, text)]
    if len(plain) <= _MOST_COMPARED:
        texts = difflib.get_close_matches(wanted, set(plain.values()), most, _CLOSE)
        similar += [other for other, text in plain.items() if text in texts]
    similar.sort(key=lambda other: -difflib.SequenceMatcher(None, plain[other], wanted).ratio())
    longer = [other for other in plain if len(words) > 1 and set(words) <= set(with_words[other])]
    longer.sort(key=lambda other: len(with_words[other]))
    return list(dict.fromkeys([*reordered, *longer, *similar]))[:most]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean A, B?)"`` for the error text of an unknown name.

    The text is empty if no known name is close.
    """
    near = near_matches(name, known)
    names = (repr(other) if re.search(r"\s", other) else other for other in near)
    return f" (did you mean {', '.join(names)}?)" if near else ""


def near_path(path: str | os.PathLike[str]) -> str:
    """Return ``" (did you mean PATH?)"`` for a file or folder that does not exist.

    Each part of the path that does not exist is replaced by a close name in its folder. The text is
    empty if a part has no close name.
    """
    missing = os.fspath(path)
    parts: list[str] = []
    existing = missing
    while existing and not os.path.exists(existing):
        existing, name = os.path.split(existing)
        if not name:
            break
        parts.append(name)
    while parts:
        name = parts.pop()
        if not os.path.exists(os.path.join(existing, name)):
            try:
                names = os.listdir(existing or os.curdir)
            except OSError:
                names = []
            # Files of other numbers are other files.
            numbers = re.findall(r"\d+", name)
            near = near_matches(name, (n for n in names if re.findall(r"\d+", n) == numbers), 1)
            if not near:
                return ""
            (name,) = near
        existing = os.path.join(existing, name)
    return f" (did you mean {existing}?)" if existing and existing != missing else ""


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum()) or name.casefold()


def _words(name: str) -> list[str]:
    return sorted(re.findall(r"[^\W\d_]+|\d+", name.casefold()))


def _begins(text: str, other: str) -> bool:
    """Return whether one of two texts begins with the other, which has at least 3 letters."""
    short, long = sorted((text, other), key=len)
    return len(short) > 2 and long.startswith(short)


class StateMismatchError(OpenVCLIPError, KeyError):
    """Raised when the names or shapes of two state dicts do not match.

    The text gives the advice first, then at most ten names. The attributes hold all names.

    Attributes:
        missing: names that are expected but not given, sorted.
        unexpected: names that are given but not expected, sorted.
        mismatched: ``(name, expected shape, given shape)`` of each entry whose shapes differ.
    """

    def __init__(
        self,
        summary: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]] = (),
        hint: str = "",
    ) -> None:
        self.missing = sorted(missing)
        self.unexpected = sorted(unexpected)
        self.mismatched = sorted(
            (name, tuple(expected), tuple(given)) for name, expected, given in mismatched
        )
        shapes = [
            f"shape of {name}: expected {list(expected)}, given {list(given)}"
            for name, expected, given in self.mismatched
        ]
        groups = (self.missing, self.unexpected, shapes)
        most = _MOST_NAMES // max(1, sum(map(bool, groups)))
        lines = [summary, hint, _renamed(self.missing, self.unexpected)]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            lines.append(f"  {title} ({len(names)}): {listed(names, most)}" if names else "")
        lines.extend(f"  {text}" for text in shapes[:most])
        if len(shapes) > most:
            lines.append(f"  and {len(shapes) - most} more shapes that differ")
        lines = [line for line in lines if line]
        self.text = "\n".join(lines)
        super().__init__(self.text)

    def __str__(self) -> str:
        return self.text  # KeyError would show the repr, with escaped line breaks

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_mismatch, (type(self), self.text, dict(self.__dict__)))


def _renamed(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return a sentence about unexpected names that are close to missing names, if any are."""
    for given, wanted, advice in (
        (unexpected, missing, "Remove this prefix from the given names."),
        (missing, unexpected, "Add this prefix to the given names."),
    ):
        prefix, count = _common_prefix(given, set(wanted))
        if count > 0:
            which = ("Unexpected", "missing") if given is unexpected else ("Missing", "unexpected")
            return f"{which[0]} names are {which[1]} names after the prefix {prefix!r}. {advice}"
    pairs = []
    for name in missing[:_MOST_NAMES]:
        # Entries of two layers are similar names, but not the same entry.
        same_layer = [n for n in unexpected if re.findall(r"\d+", n) == re.findall(r"\d+", name)]
        pairs += [f"{near} for {name}" for near in near_matches(name, same_layer, 1)]
    return f"Close names, given for missing: {listed(pairs)}." if pairs else ""


def _common_prefix(names: Sequence[str], tails: Collection[str]) -> tuple[str, int]:
    """Return the prefix in front of most names of ``tails``, and for how many names it is so.

    The number is 0 if fewer than half of ``names`` have the prefix.
    """
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in tails:
                counts[".".join(parts[:i]) + "."] += 1
    prefix, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return (prefix, count) if 2 * count >= len(names) else ("", 0)


def _rebuild_mismatch(
    cls: type[StateMismatchError], text: str, attributes: dict[str, object]
) -> StateMismatchError:
    error = cls(text)
    error.__dict__.update(attributes)
    return error


class WeightTypeError(OpenVCLIPError, TypeError):
    """Raised when an argument has the wrong type: a state dict or a model was expected."""


class LambdaError(OpenVCLIPError, ValueError):
    """Raised when an interpolation weight or a scale is not a finite number."""


class MergeError(OpenVCLIPError, ValueError):
    """Raised when a setting of a merge method is invalid or the score of a model is not finite."""


class ExtrapolationWarning(UserWarning):
    """Issued when an interpolation weight lies outside [0, 1]."""


class StatisticsWarning(UserWarning):
    """Issued when an average is read whose model has running statistics, as in batch norm.

    The average holds the statistics of the last model. :func:`openvclip.update_statistics` makes
    them anew.
    """


class OptimizerModeWarning(UserWarning):
    """Issued when weights enter an average while a schedule-free optimizer is in training mode."""


class NonFiniteWeightsError(OpenVCLIPError, ValueError):
    """Raised when weights hold NaN or infinity: in an average, or if logits are not finite."""


class NonFiniteMergeError(MergeError, NonFiniteWeightsError):
    """Raised when a model of a merge holds NaN, or infinities that the other models don't hold."""


class EmptyAverageError(OpenVCLIPError, RuntimeError):
    """Raised when an average is requested before any model was added to it."""


class RegularizationError(OpenVCLIPError, ValueError):
    """Raised when a setting of the regulariser is invalid."""


class RecipeError(OpenVCLIPError, ValueError):
    """Raised when a setting of a training recipe is invalid."""


class LossError(OpenVCLIPError, ValueError):
    """Raised when a closure does not return a scalar loss that requires gradients."""


class UsageError(OpenVCLIPError, RuntimeError):
    """Raised when a call is not possible in the current state or with these arguments."""


class UnsupportedModelError(OpenVCLIPError, TypeError):
    """Raised when a model has no image tower of a supported architecture."""


class ExpansionError(OpenVCLIPError, RuntimeError):
    """Raised when a model is expanded twice, or restored although it is not expanded."""


class ExpansionOptionError(ExpansionError, ValueError):
    """Raised when the window, the boundary mode or the layers of an expansion are invalid."""


class PromptingError(OpenVCLIPError, RuntimeError):
    """Raised when a model already has prompts, or when it has none but prompts are required."""


class PromptOptionError(PromptingError, ValueError):
    """Raised when the number, depth or placement of prompts is invalid for the model."""


class VideoShapeError(OpenVCLIPError, ValueError):
    """Raised when a video tensor has a wrong rank, dtype, number of frames or frame size."""


class ClassNamesError(OpenVCLIPError, ValueError):
    """Raised when a classifier cannot be built from the class names or templates."""


class VideoError(OpenVCLIPError, ValueError):
    """Raised when a video file cannot be read."""


class VideoNotFoundError(VideoError, FileNotFoundError):
    """Raised when the path of a video does not exist."""


class VideoOptionError(OpenVCLIPError, ValueError):
    """Raised when an option of the video reader is unknown or out of range.

    This class does not derive from :class:`VideoError`. A data set that skips unreadable files
    catches :class:`VideoError`, and must not hide a wrong option.
    """


class AnnotationError(OpenVCLIPError, ValueError):
    """Raised when a line of an annotation file cannot be parsed."""


class ProtocolError(OpenVCLIPError, ValueError):
    """Raised when an evaluation protocol is unknown or its annotation files are incomplete."""


class ModelNameError(OpenVCLIPError, ValueError):
    """Raised when a model name is unknown, or when the model lacks the requested weights."""


class HubError(ModelNameError, OSError):
    """Raised when a model can't be loaded from the Hugging Face Hub or written to it."""


class EvaluationError(OpenVCLIPError, ValueError):
    """Raised when videos, splits or settings cannot be evaluated."""


class SearchError(OpenVCLIPError, ValueError):
    """Raised when an index of videos can't be made, read, changed or searched as requested."""


class RecordsError(OpenVCLIPError, ValueError):
    """Raised when a results folder belongs to another evaluation or is not writable."""


class CheckpointError(OpenVCLIPError, ValueError):
    """Raised when a checkpoint cannot be read or written, or does not hold the expected weights."""


class ContractError(CheckpointError):
    """Raised when the contract of a model can't be read, or contradicts other settings."""


class UnsafeCheckpointError(CheckpointError):
    """Raised when reading a checkpoint would execute code. No code was executed."""


class ActivationWarning(UserWarning):
    """Issued when weights trained with QuickGELU are loaded into a model that uses GELU."""


class ContractWarning(UserWarning):
    """Issued when a contract that can't be read is left out, because ``override`` is given."""


class LabelWarning(UserWarning):
    """Issued when labels can't be told apart by the text tower, or when there is only one label."""


class CalibrationWarning(UserWarning):
    """Issued when the temperature can't be chosen: all clips are classified correctly."""


class TextFeaturesWarning(UserWarning):
    """Issued when a classifier has text features of other weights than its model has now."""


class PromptBackboneWarning(UserWarning):
    """Issued when prompts are loaded into a model with other weights than in their training.

    The file of the prompts describes the backbone with which the prompts were trained. The model
    has the same sizes as this backbone, but other weights.
    """


class MissingDependencyError(OpenVCLIPError, ImportError):
    """Raised when an optional dependency is required but not installed."""
