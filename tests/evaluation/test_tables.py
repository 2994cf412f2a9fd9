"""Tables of results: means, standard deviations and Markdown."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from openvclip.evaluation import markdown_table, mean_and_std, tables


def test_mean_and_standard_deviation_of_a_sample() -> None:
    assert mean_and_std([0.5, 0.6, 0.7]) == "60.0 ± 10.0"  # by hand: deviations -10, 0, 10; n - 1
    assert mean_and_std([0.1234]) == "12.3"
    assert mean_and_std([0.5, 0.5], digits=2) == "50.00 ± 0.00"


def test_mean_and_standard_deviation_equal_those_of_numpy() -> None:
    values = np.random.default_rng(0).random(7)
    expected = f"{100 * values.mean():.6f} ± {100 * values.std(ddof=1):.6f}"
    assert mean_and_std(values, digits=6) == expected
    assert mean_and_std([0.5, float("nan")]) == "nan ± nan"


def test_table_is_markdown_and_aligned() -> None:
    text = markdown_table(["method", "seen"], [["CLIP", "9.5"], ["Open-VCLIP", "50.0 ± 1.0"]])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].replace(" ", "") == "|----------|---------:|"
    assert [cell.strip() for cell in lines[3].split("|")] == ["", "Open-VCLIP", "50.0 ± 1.0", ""]


def test_rows_of_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        markdown_table(["a", "b"], [["only one"]])


def test_the_examples_in_docstrings_run() -> None:
    result = doctest.testmod(tables)
    assert (result.attempted, result.failed) == (1, 0)
