"""The error family: one base class, each member also the built-in that a caller would expect.

Every text says what was given, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class OpenVCLIPError(Exception):
    """Base of every error that openvclip raises on purpose."""


class StateMismatchError(OpenVCLIPError, KeyError):
    """Two sets of named weights do not fit together.

    Attributes:
        missing: names that were expected and are not there.
        unexpected: names that are there and were not expected.
        mismatched: ``(name, expected shape, given shape)`` for entries of different shapes.
    """

    def __init__(
        self,
        what: str,
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
        lines = [what]
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
        return self.text  # KeyError would show the repr, with its line breaks escaped

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_mismatch, (type(self), self.text, dict(self.__dict__)))


def _rebuild_mismatch(
    cls: type[StateMismatchError], text: str, attributes: dict[str, object]
) -> StateMismatchError:
    error = cls(text)
    error.__dict__.update(attributes)
    return error


class WeightTypeError(OpenVCLIPError, TypeError):
    """Something that should map names to tensors does not."""


class LambdaError(OpenVCLIPError, ValueError):
    """An interpolation weight is not a finite number."""


class MergeError(OpenVCLIPError, ValueError):
    """The settings of a merge do not make sense, or the score of a model is no number."""


class ExtrapolationWarning(UserWarning):
    """An interpolation weight lies outside [0, 1]."""


class NonFiniteWeightsError(OpenVCLIPError, ValueError):
    """Weights that hold NaN or infinity were given to an average."""


class EmptyAverageError(OpenVCLIPError, RuntimeError):
    """An average of nothing was asked for."""


class RegularizationError(OpenVCLIPError, ValueError):
    """The settings of the regulariser do not make sense."""


class LossError(OpenVCLIPError, ValueError):
    """The closure did not return a scalar loss with a graph behind it."""


class UsageError(OpenVCLIPError, RuntimeError):
    """A call came in a state in which it can't be answered."""


class UnsupportedModelError(OpenVCLIPError, TypeError):
    """The model holds no tower that the operation is known to be right for."""


class ExpansionError(OpenVCLIPError, RuntimeError):
    """A model was expanded twice, or restored without having been expanded."""


class ExpansionOptionError(ExpansionError, ValueError):
    """The window, the boundary mode or the layers of an expansion do not make sense."""


class PromptingError(OpenVCLIPError, RuntimeError):
    """Prompts were attached twice, or asked for where none are attached."""


class PromptOptionError(PromptingError, ValueError):
    """The number, depth or placing of prompts does not make sense for the model."""


class VideoShapeError(OpenVCLIPError, ValueError):
    """A video tensor has the wrong rank, dtype, number of frames or frame size."""


class ClassNamesError(OpenVCLIPError, ValueError):
    """The class names or the templates can't make a classifier."""


class VideoError(OpenVCLIPError, ValueError):
    """A video file can't be read."""


class VideoNotFoundError(VideoError, FileNotFoundError):
    """There is no file at the path of a video."""


class VideoOptionError(OpenVCLIPError, ValueError):
    """An option of the video reader is not one of those known, or out of range.

    It is not a :class:`VideoError`: no file is at fault, so a data set that skips broken files
    must not skip over it.
    """


class AnnotationError(OpenVCLIPError, ValueError):
    """A line of an annotation file can't be understood."""


class ProtocolError(OpenVCLIPError, ValueError):
    """An evaluation protocol is not known, or the annotation files at hand do not make it."""


class ModelNameError(OpenVCLIPError, ValueError):
    """There is no such model, or there are no such weights for it."""


class EvaluationError(OpenVCLIPError, ValueError):
    """The videos, splits or settings given can't be evaluated."""


class RecordsError(OpenVCLIPError, ValueError):
    """A folder holds results of another evaluation, or can't be written."""


class CheckpointError(OpenVCLIPError, ValueError):
    """A file of weights can't be read, or holds something else."""


class UnsafeCheckpointError(CheckpointError):
    """A file of weights can't be read without running code that it names; none was run."""


class ActivationWarning(UserWarning):
    """Weights that were trained with QuickGELU are loaded into a model that has GELU."""


class PromptBackboneWarning(UserWarning):
    """Prompts are attached to a backbone of the right sizes and other weights than their own."""


class MissingDependencyError(OpenVCLIPError, ImportError):
    """An optional dependency is needed and not installed."""
