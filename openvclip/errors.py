"""Errors and warnings of openvclip.

Every error derives from :class:`OpenVCLIPError` and from a built-in exception of the same kind.
Each error text says what was given, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class OpenVCLIPError(Exception):
    """Base class of all errors that openvclip raises on purpose."""


class StateMismatchError(OpenVCLIPError, KeyError):
    """Raised when the names or shapes of two state dicts do not match.

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
        lines = [summary]
        if self.missing:
            lines.append(f"  missing ({len(self.missing)}): " + ", ".join(self.missing))
        if self.unexpected:
            lines.append(f"  unexpected ({len(self.unexpected)}): " + ", ".join(self.unexpected))
        lines.extend(
            f"  shape of {name}: expected {list(expected)}, given {list(given)}"
            for name, expected, given in self.mismatched
        )
        if hint:
            lines.append(hint)
        self.text = "\n".join(lines)
        super().__init__(self.text)

    def __str__(self) -> str:
        return self.text  # KeyError would show the repr, with escaped line breaks

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_mismatch, (type(self), self.text, dict(self.__dict__)))


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
    """Raised when weights that hold NaN or infinity are given to an average."""


class EmptyAverageError(OpenVCLIPError, RuntimeError):
    """Raised when an average is requested before any model was added to it."""


class RegularizationError(OpenVCLIPError, ValueError):
    """Raised when a setting of the regulariser is invalid."""


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


class EvaluationError(OpenVCLIPError, ValueError):
    """Raised when videos, splits or settings cannot be evaluated."""


class RecordsError(OpenVCLIPError, ValueError):
    """Raised when a results folder belongs to another evaluation or is not writable."""


class CheckpointError(OpenVCLIPError, ValueError):
    """Raised when a checkpoint cannot be read or written, or does not hold the expected weights."""


class UnsafeCheckpointError(CheckpointError):
    """Raised when reading a checkpoint would execute code. No code was executed."""


class ActivationWarning(UserWarning):
    """Issued when weights trained with QuickGELU are loaded into a model that uses GELU."""


class PromptBackboneWarning(UserWarning):
    """Issued when prompts are loaded into a model with other weights than in their training.

    The file of the prompts describes the backbone with which the prompts were trained. The model
    has the same sizes as this backbone, but other weights.
    """


class MissingDependencyError(OpenVCLIPError, ImportError):
    """Raised when an optional dependency is required but not installed."""
