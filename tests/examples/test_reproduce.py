"""docs/reproduce.md: its commands are ones that exist, its numbers the paper's or a script's."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser
from torch.utils.flop_counter import FlopCounterMode

import openvclip
from examples import evaluate, finetune, tradeoff
from examples.evaluate import ENCODERS, PUBLISHED, published
from openvclip.cli.main import build_parser
from openvclip.towers import attention
from openvclip.training import shards
from tests.benchmarks import recipe_cost
from tests.helpers import FACTS, REPO, random_video, tiny_clip

PAGE = (REPO / "docs" / "reproduce.md").read_text(encoding="utf-8")
DATA_SETS = {"UCF-101": "ucf101", "HMDB-51": "hmdb51", "Kinetics-600": "kinetics600"}

# --- commands ----------------------------------------------------------------------------------

PARSERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "openvclip": lambda words: build_parser().parse_args(words),
    "examples/finetune.py": lambda words: finetune.parse_arguments(list(words)),
    "examples/evaluate.py": evaluate.parse_arguments,
    "examples/tradeoff.py": tradeoff.parse_arguments,
    "tests.benchmarks.recipe_cost": recipe_cost.parse_arguments,
}


def commands() -> list[list[str]]:
    """The words of each command on the page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def started(words: list[str]) -> tuple[str, list[str]]:
    """The program that a command starts, and its arguments."""
    first, *rest = words
    if first == "torchrun":
        launched = get_args_parser().parse_args(rest)
        return launched.training_script, launched.training_script_args
    if first == "python":
        return (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
    return first, rest


def test_every_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for words in commands():
        program, arguments = started(words)
        seen.add(program)
        if program == "openvclip.training.shards":
            monkeypatch.setattr(shards, "find_shards", lambda pattern: [])
            monkeypatch.setattr(shards, "atomic_path", _nowhere)
            shards.main(arguments, tell=lambda text: None)
        else:
            PARSERS[program](arguments)
    assert seen == {*PARSERS, "openvclip.training.shards"}


class _nowhere:  # noqa: N801
    """A stand-in for ``atomic_path`` that writes nothing."""

    def __init__(self, path: object) -> None:
        self.path = path

    def __enter__(self) -> _nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write_text(self, text: str, encoding: str) -> None:
        assert text


def test_files_that_are_evaluated_come_from_a_run_of_the_same_model() -> None:
    """Every ``runs/...`` file belongs to a training command that leaves it, of the same model."""
    trained, tested = {}, 0
    for words in commands():
        program, arguments = started(words)
        if program == "examples/finetune.py":
            args = finetune.parse_arguments(arguments)
            trained[str(args.out)] = args
    for words in commands():
        program, arguments = started(words)
        for path in re.findall(r"runs/[\w-]+/\w+\.safetensors", " ".join(arguments)):
            folder, _, file = path.rpartition("/")
            args = trained[folder]
            assert arguments[arguments.index("--model") + 1] == args.model, words
            averages = args.method in ("openvclip", "swa")
            assert file == "finetuned.safetensors" or (averages and "averaged" in file), words
            tested += 1
    assert len(trained) == 8
    assert tested > 8


def test_lambdas_are_the_papers() -> None:
    facts = _facts()["training"]["interpolation_lambda_weights_CLIP"]
    for words in commands():
        program, arguments = started(words)
        if program == "examples/finetune.py":
            args = finetune.parse_arguments(arguments)
            if args.method == "openvclip":
                assert args.lam == facts[ENCODERS[args.model]]
        if program == "examples/evaluate.py" and "averaged" in " ".join(arguments):
            chosen = evaluate.parse_arguments(arguments)
            assert chosen.lam == facts[ENCODERS[chosen.model]]


# --- numbers -----------------------------------------------------------------------------------


def _facts() -> Any:
    return json.loads((FACTS / "facts.json").read_text(encoding="utf-8"))


def table_after(text: str) -> list[list[str]]:
    """The cells of the first table behind a text on the page, without the rule."""
    behind = PAGE[PAGE.index(text) + len(text) :]
    found = re.search(r"(?:^\|.*\|\n)+", behind, re.MULTILINE)
    assert found
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found[0].splitlines()]
    return [rows[0], *rows[2:]]


def column_of(head: str) -> str:
    """The column of ``PUBLISHED`` that a heading of the page means."""
    name, _, rest = head.partition(" ")
    if name == "Kinetics-400":
        return "kinetics400"
    if name == "Kinetics-600":
        return "kinetics600 top-5" if rest == "top-5" else "kinetics600"
    return f"{DATA_SETS[name]}-{(rest or 'EP2').lower()}"


@pytest.mark.parametrize("title", ["Tables 1 and 2:", "Table 3:"])
def test_tables_of_open_vclip(title: str) -> None:
    head, *rows = table_after(title)
    assert [row[0] for row in rows] == list(ENCODERS.values())
    for encoder, *cells in rows:
        given = dict(zip(map(column_of, head[1:]), cells, strict=True))
        assert given.items() <= PUBLISHED["Open-VCLIP", encoder].items()
        assert len(given) == len(head) - 1


def test_tables_4_and_5() -> None:
    head, *rows = table_after("the three sets of Kinetics-600:")
    assert len(rows) == 9
    for encoder, data_set, *cells in rows:
        for method, cell in zip(head[2:], cells, strict=True):
            assert cell == PUBLISHED[method, encoder][column_of(data_set)].partition("±")[0]
    head, *rows = table_after("Expected for ViT-B/16, on EP2:")
    for name, *cells in rows:
        row = PUBLISHED[name.partition(",")[0], "ViT-B/16"]
        assert cells == [row[column_of(title)] for title in head[1:]]


def test_what_is_shown_beside_ones_own_is_the_papers() -> None:
    paper = _facts()["paper_results"]
    expected: dict[tuple[str, str], dict[str, str]] = {key: {} for key in PUBLISHED}
    for encoder in ENCODERS.values():
        row = expected["Open-VCLIP", encoder]
        for title, columns in (
            ("table1", ("ucf101-ep1", "ucf101-ep2", "hmdb51-ep1", "hmdb51-ep2")),
            ("table2_EP3", ("ucf101-ep3", "hmdb51-ep3")),
            ("table3_K600", ("kinetics600", "kinetics600 top-5")),
        ):
            row.update(zip(columns, paper[title][encoder], strict=True))
        for data_set, values in paper["table4"][encoder.removeprefix("ViT-")].items():
            column = {"UCF": "ucf101-ep2", "HMDB": "hmdb51-ep2", "K600": "kinetics600"}[data_set]
            for method, value in zip(("CLIP", "FINE-TUNE", "Open-VCLIP"), values, strict=True):
                known = expected[method, encoder].setdefault(column, f"{value:.1f}")
                assert known.partition("±")[0] == f"{value:.1f}"
    columns = ("kinetics400", "ucf101-ep2", "hmdb51-ep2", "kinetics600")
    for method, title in (("L2", "L2 REG (weight 0.5)"), ("Open-VCLIP", "OPEN-VCLIP")):
        values = map(str, paper["table5"][title])
        expected[method, "ViT-B/16"].update(zip(columns, values, strict=True))
    given = {
        key: {column: value for column, value in row.items() if value != "-"}
        for key, row in PUBLISHED.items()
    }
    assert given == expected
    assert published("CLIP", "ViT-L-14-quickgelu", "ucf101-ep2") == "80.5"
    assert published("CLIP", "another", "ucf101-ep2") == "-"


# --- times -------------------------------------------------------------------------------------


def test_operations_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # All frames at once, as on a GPU; a CPU multiplies no zero keys.
    monkeypatch.setattr(attention, "_prefers_frame_by_frame", lambda q: False)
    # Some releases of torch have no count for the kernel of CPUs.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    video = random_video(2, 8)
    tower = recipe_cost.Tower("tiny", layers=3, width=16, patch=4, features=8, pixels=8)
    for window in (0, 1):
        model = tiny_clip()
        if window:
            openvclip.expand_temporal_attention(model, window=window)
        counter = FlopCounterMode(display=False, custom_mapping={kernel: attention_flops})
        with counter:
            model.encode_image(video if window else video.flatten(0, 1))
        assert counter.get_total_flops() == 2 * 8 * tower.flops(window)


def attention_flops(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products of ``[B, heads, queries, keys]`` with heads of ``d``, from the shapes."""
    *batch, queries, d = q
    return 4 * math.prod(batch) * queries * k[-2] * d


@pytest.mark.parametrize("name", recipe_cost.TOWERS)
def test_the_towers_are_open_clips(name: str) -> None:
    import open_clip

    config = open_clip.get_model_config(name)
    tower, vision = recipe_cost.TOWERS[name], config["vision_cfg"]
    assert tower.name == ENCODERS[name]
    assert (tower.layers, tower.width) == (vision["layers"], vision["width"])
    assert (tower.patch, tower.pixels) == (vision["patch_size"], vision["image_size"])
    assert tower.features == config["embed_dim"]


def test_times_on_the_page_are_the_scripts() -> None:
    assert recipe_cost.training_table() in PAGE
    assert recipe_cost.share_table() in PAGE
    assert recipe_cost.evaluation_table() in PAGE
    assert f"{recipe_cost.steps():,} steps" in PAGE
    assert f"{recipe_cost.TRAIN_VIDEOS:,} training videos" in PAGE
    assert f"{recipe_cost.TEST_VIDEOS:,} test videos" in PAGE
    assert f"{recipe_cost.SHARE:.0%}".replace("%", " %") in PAGE
    step = recipe_cost.step_flops(recipe_cost.TOWERS["ViT-B-32-quickgelu"], clips=4)
    assert f"{step / 1e12:.2f} TFLOP (4 clips)" in PAGE
    step = recipe_cost.step_flops(recipe_cost.TOWERS["ViT-B-16-quickgelu"], clips=1)
    assert f"{step / 1e12:.2f} TFLOP (1 clip)" in PAGE
    hours = recipe_cost.steps() * recipe_cost.BATCH * 0.14 / 3600
    text = " ".join(PAGE.split())
    assert f"{hours:.0f} hours of one core, {hours / 96:.1f} hours of 96" in text
