"""docs/reproduce.md: the time that each table and figure takes, from its own commands."""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

import pytest

from examples import evaluate, finetune, tradeoff
from tests.benchmarks import recipe_cost
from tests.helpers import REPO

PAGE = (REPO / "docs" / "reproduce.md").read_text(encoding="utf-8")


class Work(NamedTuple):
    """What commands need: runs as (folder, model, passes a step), and tests as models' names."""

    runs: set[tuple[str, str, int]]
    tests: list[str]

    def sentence(self) -> str:
        """What the page says of it."""
        runs = [
            recipe_cost.step_flops(recipe_cost.TOWERS[model], passes=passes) * recipe_cost.steps()
            for _, model, passes in self.runs
        ]
        videos = recipe_cost.TEST_VIDEOS * recipe_cost.VIEWS * recipe_cost.FRAMES
        tests = [videos * recipe_cost.TOWERS[model].flops() for model in self.tests]
        return (
            f"8 A100 (8 H100): {_times(sum(runs), 3600)} hours of training, in {len(runs)} runs, "
            f"and {_times(sum(tests), 60)} minutes of evaluation, of {len(tests)} sets of weights"
        )


def _times(flops: int, unit: int) -> str:
    """On the two kinds of GPU, in units of so many seconds."""
    assert list(recipe_cost.PEAKS) == ["A100", "H100"]
    rates = (recipe_cost.GPUS * peak * recipe_cost.SHARE for peak in recipe_cost.PEAKS.values())
    one, other = (flops / rate / unit for rate in rates)
    return f"{one:.1f} ({other:.1f})"


def section(title: str) -> str:
    """The text under a heading that begins with ``title``."""
    found = re.search(rf"^## {re.escape(title)}.*?(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found[0]


def commands(text: str, script: str) -> list[list[str]]:
    """The arguments of each ``torchrun`` of a script in a text."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.split(script)[1]) for line in lines if script in line]


def work(text: str) -> Work:
    """The evaluations of a text, and the runs on the page that they take files of."""
    tests, folders = list[str](), set[str]()
    for words in commands(text, "examples/evaluate.py"):
        args = evaluate.parse_arguments(words)
        tests.append(args.model)
        folders |= {str(args.checkpoint.parent)} if args.checkpoint else set()
    for words in commands(text, "examples/tradeoff.py"):
        args = tradeoff.parse_arguments(words)
        for line in args.lines:
            tests += [args.model] * (len(args.lam) if line.path else 1)
            folders |= {str(line.path.parent)} if line.path else set()
    runs = set()
    for words in commands(PAGE, "examples/finetune.py"):
        args = finetune.parse_arguments(words)
        if str(args.out) in folders:
            runs.add((str(args.out), args.model, 2 if args.method == "openvclip" else 1))
    assert len(runs) == len(folders)
    return Work(runs, tests)


def for_all_models(text: str) -> str:
    """Table 4's commands, which are of ViT-B/16, "for the others change the model"."""
    sizes = {"B-32": "b32", "B-16": "b16", "L-14": "l14"}
    assert all(f"`{short}`" in text for short in sizes.values())
    return "".join(
        text.replace("ViT-B-16", f"ViT-{model}").replace("/b16", f"/{short}")
        for model, short in sizes.items()
    )


TABLES = "Tables 1, 2 and 3"


@pytest.mark.parametrize("title", [TABLES, "Table 4", "Table 5", "Figure 3", "Figure 2"])
def test_a_section_says_how_long_it_takes(title: str) -> None:
    text = commanded = section(title)
    if title == "Table 4":
        commanded = for_all_models(text) + section(TABLES)  # "and Open-VCLIP as above"
    if title == "Figure 2":
        curve = re.search(r"`--frame-curve \"(.*?)\"`", text)  # "to the command above"
        assert curve
        commanded = text.replace("--baseline", f'--baseline --frame-curve "{curve[1]}"')
    assert work(commanded).sentence() in " ".join(text.split())
