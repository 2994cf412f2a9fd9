"""Paired t-tests, Holm's correction, and the power of both.

A claim compares two rows of a table. Each cell gives the difference of their accuracies on the same
list of clips. The claim is clear if the two-sided t-test of these differences has a p-value below
5 % after Holm's correction for all claims of the page. Training noise, the division of the actions
and the choice of the test clips all enter the differences, because each cell has its own clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

__all__ = ["cells_needed", "holm", "p_value", "power", "smallest_difference", "upper_tail"]

LEVEL = 0.05
"""The largest probability that the page calls any claim clear for which no difference exists."""

_POINTS = 2001  # of the integral


def upper_tail(t: float, df: int, shift: float = 0.0) -> float:
    """Return the probability that a variable with a noncentral t-distribution is above ``t``.

    With a standard normal Z and an independent chi-squared variable of ``df`` degrees of freedom
    the variable is ``(Z + shift) / S``, where ``S = sqrt(chi2 / df)``. The probability is the
    integral of ``P(Z > t s - shift)`` over the density of S.

    Args:
        t: the limit.
        df: degrees of freedom, at least 1.
        shift: the noncentrality; 0 gives Student's t.
    """
    # s = limit * v ** 4: many points near 0, where the integrand changes fast if t is large.
    limit, v = 1 + 12 / math.sqrt(df), np.linspace(0.0, 1.0, _POINTS)[1:]
    s = limit * v**4
    log_density = (
        math.log(2)
        + df / 2 * math.log(df / 2)
        - math.lgamma(df / 2)
        + (df - 1) * np.log(s)
        - df * s**2 / 2
    )
    tail = 0.5 * torch.from_numpy((t * s - shift) / math.sqrt(2)).erfc().numpy()
    values = tail * np.exp(log_density) * 4 * limit * v**3
    # Simpson's rule; the integrand is 0 at v = 0.
    total = values[-1] + 4 * values[0:-1:2].sum() + 2 * values[1:-1:2].sum()
    return float(min(1.0, total / (3 * (_POINTS - 1))))


def p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired t-test; 1 for fewer than three differences.

    An accuracy is a multiple of 1 over the number of clips. So two differences are often equal, and
    the t-test would take their lack of a deviation for certainty. The cells are not independent
    draws: the 20 divisions are all that there are, some occur twice, and a division and its
    complement often have opposite effects. Given the divisions, the noise of the cells is
    independent. The differences between the divisions then only widen the deviation, so the test
    errs towards "not clear".
    """
    values = np.asarray(differences, np.float64)
    if len(values) < 3:
        return 1.0
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return 1.0 if values.mean() == 0 else 0.0
    return min(1.0, 2 * upper_tail(abs(float(values.mean())) / error, len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values after Holm's correction (Holm, 1979), in the order of the input.

    The smallest of m p-values is multiplied by m, the next one by m - 1, and so on. A corrected
    value is at least as large as those before it, and at most 1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def power(cells: int, deviation: float, difference: float, level: float) -> float:
    """Return the probability that a true difference is called clear, with the right sign.

    Args:
        cells: number of cells, at least 2.
        deviation: standard deviation of the differences over cells.
        difference: the true difference, in the unit of the deviation, positive.
        level: level of the two-sided test.
    """
    shift = difference / deviation * math.sqrt(cells)
    return upper_tail(_critical(cells - 1, level), cells - 1, shift)


def cells_needed(
    deviation: float, difference: float, level: float, wanted: float = 0.9, limit: int = 500
) -> int | None:
    """Return the smallest number of cells with the wanted power, ``None`` if above ``limit``."""
    if power(limit, deviation, difference, level) < wanted:
        return None
    low, high = 1, limit  # the power grows with the number of cells
    while high - low > 1:
        middle = (low + high) // 2
        if power(middle, deviation, difference, level) < wanted:
            low = middle
        else:
            high = middle
    return high


def smallest_difference(cells: int, deviation: float, level: float, wanted: float = 0.9) -> float:
    """Return the smallest true difference that is called clear with the wanted probability."""
    low, high = 0.0, deviation
    while power(cells, deviation, high, level) < wanted:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if power(cells, deviation, middle, level) < wanted else (low, middle)
        )
    return high


@lru_cache
def _critical(df: int, level: float) -> float:
    """Return the t above which a two-sided test at ``level`` is significant."""
    low, high = 0.0, 1.0
    while upper_tail(high, df) > level / 2:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle, df) > level / 2 else (low, middle)
    return high
