"""Results of a comparison that were made up, so that what is read from them can be told by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from examples.shapes import comparison
from examples.shapes.comparison_settings import RATES, SMOKE, Setting, Sizes
from examples.shapes.results import Results


def made_result(
    by_test: dict[str, dict[str, float]], seconds: float | None = 1.0
) -> dict[str, Any]:
    return {"accuracy": by_test, "trained": [10, 2000], "seconds": seconds, "loss": {}}


def made_up() -> Results:
    """Two seeds with numbers chosen so that each choice can be told by hand."""
    sizes = Sizes(
        SMOKE.clips,
        {
            "closed-set and zero-shot": Setting(2, ("seen", "unseen")),
            "base-to-novel": Setting(2, ("base", "novel"), shots=2, base=True),
        },
        methods=("CLIP", "FINE-TUNE", "Open-VCLIP"),
    )
    results: Results = {
        "settings": comparison.recorded(sizes, rates=RATES),
        "environments": [{"machine": "abacus", "torch": "0", "runs": 7}],
        "seeds": {},
    }
    for seed, more in enumerate((0.0, 0.02)):
        fine = {
            "seen": {"0": 0.6 + more, "0.3": 0.5, "0.5": 0.4, "0.7": 0.3},
            "unseen": {"0": 0.2, "0.3": 0.3, "0.5": 0.9, "0.7": 0.1},
            "development": {"0": 0.2, "0.3": 0.5, "0.5": 0.4, "0.7": 0.3},
        }
        ours = deepcopy(fine)
        ours["seen"]["0.3"] = 0.7 + 2 * more
        halves = {"base": {"0": 0.5}, "novel": {"0": 0.25}}
        results["seeds"][str(seed)] = {
            "closed-set and zero-shot": {
                "CLIP": made_result({"seen": {"1": 0.2}, "unseen": {"1": 0.3 + more}}, None),
                "FINE-TUNE": made_result(fine, 2.0),
                "Open-VCLIP": made_result(ours, 3.0 + seed),
            },
            "base-to-novel": {"CLIP": made_result(halves, None)},
        }
    return results


def cells(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


TIMING: Results = {
    "environment": {"machine": "abacus", "torch": "0"},
    "seconds": {"FINE-TUNE": [1.0, 2.0, 1.0], "Open-VCLIP": [2.0, 3.0, 3.0]},
}


def tuning_results() -> Results:
    tried = {
        f"{rate:g}": made_result({"seen": {"0": rate}, "development": {"0": 0.01 / rate}})
        for rate in (0.01, 0.2, 0.3)
    }
    settings = comparison.recorded(SMOKE)
    return {"settings": settings, "environments": [], "seeds": {"100": {"vita": tried}}}
