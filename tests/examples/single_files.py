"""What the tests of the single-file examples share: classes, options, printed tables."""

from __future__ import annotations

CLASSES = ("square spinning", "heart resting", "star pulsing")
OTHERS = ("ring resting", "tree spinning")
FRAMES = ("--frames", "2", "--sampling-rate", "7", "--num-workers", "0", "--device", "cpu")


def rows_of(text: str) -> dict[str, list[float]]:
    """The rows of a printed table by their first column, the name of a model or a λ."""
    rows = {}
    for line in filter(str.strip, text.splitlines()):
        words = line.split()
        if line[:1].isalpha():  # names of models have spaces, and 16 columns
            words = [line[:16].strip(), *line[16:].split()]
        numbers = [float(word) for word in words[1:] if word.replace(".", "", 1).isdigit()]
        if numbers:
            rows[words[0]] = numbers
    return rows
