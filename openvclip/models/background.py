"""Background texts: class names of a classifier that are never the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from openvclip.errors import ClassNamesError, UsageError, did_you_mean, listed


def with_background(labels: Sequence[str], background: Sequence[str]) -> Sequence[str]:
    """Return the class names of a classifier of labels and background texts.

    Args:
        labels: K labels.
        background: B background texts, possibly none.

    Returns:
        The K labels, then the B background texts. ``labels`` itself without background texts.

    Raises:
        ClassNamesError: ``background`` is no list, or one of its texts is empty, repeated or also a
            label.
    """
    background = background_texts(background)
    if not background or isinstance(labels, str) or not isinstance(labels, Iterable):
        return labels
    labels = list(labels)
    known = set(labels)
    shared = [repr(text) for text in background if text in known]
    if shared:
        raise ClassNamesError(
            f"background holds {listed(shared)}, which labels holds too. A background text is "
            "never the answer: remove it from one of the two lists."
        )
    return [*labels, *background]


def divide(class_names: Sequence[str], background: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the indices of the labels and of the background texts among class names.

    Args:
        class_names: the class names of a classifier.
        background: those of the class names that are never the answer.

    Raises:
        ClassNamesError: ``background`` is no list, or one of its texts is empty or repeated.
        UsageError: a background text is not a class name, or no label is left.
    """
    background = background_texts(background)
    unknown = [text for text in background if text not in class_names]
    if unknown:
        raise UsageError(
            f"The background text {unknown[0]!r} is not a class name of the classifier"
            f"{did_you_mean(unknown[0], class_names)}. Create the classifier with the class names "
            "[*labels, *background]."
        )
    texts = set(background)
    if len(texts) == len(class_names):
        raise UsageError(
            f"All {len(class_names)} class names of the classifier are background texts; expected "
            "at least one label."
        )
    indices = range(len(class_names))
    return (
        [index for index in indices if class_names[index] not in texts],
        [index for index in indices if class_names[index] in texts],
    )


def background_texts(background: Iterable[str]) -> list[str]:
    """Check background texts and return them as a list.

    Raises:
        ClassNamesError: ``background`` is no list, or one of its texts is empty or repeated.
    """
    if isinstance(background, (str, bytes)):
        raise ClassNamesError(f"background is one string, {background!r}; expected a list.")
    if not isinstance(background, Iterable):
        raise ClassNamesError(f"background is {background!r}; expected a list of texts.")
    texts = list(background)
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ClassNamesError(f"background[{index}] is {text!r}; expected a non-empty text.")
    repeated = [repr(text) for text, count in Counter(texts).items() if count > 1]
    if repeated:
        raise ClassNamesError(
            f"Background texts occur more than once: {listed(repeated)}. Give each text once."
        )
    return texts
