"""docs/recipes.md: every command is understood, and its flags make the preset's settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from examples import accuracy, finetune, lists
from openvclip.training.options import recipe_of
from openvclip.training.presets import PRESETS
from tests.helpers import REPO

PAGE = (REPO / "docs" / "recipes.md").read_text(encoding="utf-8")
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "examples/finetune.py": finetune.parse_arguments,
    "examples/accuracy.py": accuracy.parse_arguments,
    "examples/lists.py": lists.parse_arguments,
}


def commands() -> list[tuple[str, list[str]]]:
    """The script and the arguments of each command on the page, with numbers for the variables."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    scripts = []
    for line in lines:
        words = shlex.split(re.sub(r"\$\w+", "2", line), comments=True)
        if words[0] == "torchrun":
            launched = get_args_parser().parse_args(words[1:])
            scripts.append((launched.training_script, launched.training_script_args))
        elif words[0] == "python":
            scripts.append((words[1], words[2:]))
        else:
            assert words[0] in ("for", "done"), line
    return scripts


def test_every_command_is_understood() -> None:
    scripts = commands()
    assert {script for script, _ in scripts} == {*PARSERS}
    for script, arguments in scripts:
        PARSERS[script](arguments)


def test_a_model_is_tested_with_the_preset_of_its_training() -> None:
    trained, tested = {}, 0
    for script, arguments in commands():  # a later section may use a folder of an earlier one
        if script == "examples/finetune.py":
            training = finetune.parse_arguments(arguments)
            trained[training.out] = training.preset
        elif script == "examples/accuracy.py":
            test = accuracy.parse_arguments(arguments)
            assert trained[(test.prompts or test.checkpoint).parent] == test.preset
            tested += 1
    assert tested == 7


def test_lists_of_one_name_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    lists_of_seeds = ["--annotations", "seed-1/base.csv", "seed-2/base.csv", "--videos", "v"]
    with pytest.raises(SystemExit):
        accuracy.parse_arguments([*lists_of_seeds, "--harmonic-mean"])
    assert "different names, got base base" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_has_the_numbers_of_each_preset(name: str) -> None:
    (line,) = (text for text in PAGE.splitlines() if text.startswith(f"| `{name}`"))
    _, trained, rate, batch, length, frames = (cell.strip() for cell in line.split("|")[1:-1])
    paths = ["--annotations", "a", "--videos", "b", "--out", "c", "--start-from", "d"]
    args = finetune.parse_arguments(["--preset", name, *paths])
    recipe = recipe_of(args)
    assert (float(rate), int(batch)) == (recipe.lr, recipe.batch_size)
    expected = f"{recipe.epochs} epochs" if args.steps is None else f"{args.steps:,} steps"
    assert length == expected
    assert frames == f"{args.frames}, {args.sampler}"
    if recipe.method == "bridge":
        assert trained == (
            f"{args.vision_prompts} + {args.text_prompts} prompts, "
            f"depth {args.vision_depth} / {args.text_depth}"
        )
