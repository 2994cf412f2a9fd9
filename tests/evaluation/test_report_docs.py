"""What docs/report.md shows runs: its Python, and the command lines of its examples."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch

import openvclip
from examples.shapes.clips import ClipSettings, make_clips
from examples.shapes.trials.command import AVERAGED
from openvclip.cli.main import build_parser
from openvclip.evaluation.report import writing
from tests.evaluation.small_results import result_of, splits_of, write_results
from tests.evaluation.test_report import Page
from tests.helpers import REPO, random_video, tiny_clip, tiny_tokenizer

PAGE = (REPO / "docs" / "report.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The commands of a block of bash, with the values of its variables."""
    values: dict[str, str] = {}
    result = []
    for line in re.findall(r'^\w+="[^"]*"|^.+$', block.replace("\\\n", " "), re.MULTILINE):
        text = Template(line).safe_substitute(values)
        if assigned := re.fullmatch(r'(\w+)="([^"]*)"', text, re.DOTALL):
            values[assigned[1]] = assigned[2]
        else:
            result.append(shlex.split(text, comments=True))
    return result


def test_the_python_of_the_page_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's names stand for a tiny model, and its folders for results of random logits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writing, "vega_script", lambda: "window.vegaEmbed = null;")
    write_results(Path("results/tuned"), result_of([0.0, 0.5], splits_of(), videos="gone"))
    clip = {"tuned": None, "expand": None, "videos": "gone"}
    write_results(Path("results/clip"), result_of([None], splits_of(), **clip))
    model = openvclip.expand_temporal_attention(tiny_clip())
    theta = {name: value.clone() for name, value in model.state_dict().items()}
    namespace: dict[str, Any] = {
        "classifier": openvclip.ZeroShotClassifier(model, tiny_tokenizer, ["red", "blue"], ["{}"]),
        "theta_clip": theta,
        "theta_tuned": {name: value + 0.1 * value for name, value in theta.items()},
        "loader": [(random_video(2, 2, 0), torch.tensor([0, 1]))],
    }
    code = blocks("py")
    assert len(code) == 2
    for block in code:
        exec(block, namespace)
    assert "['tiny', 'tiny, original CLIP'] ['list.csv']" in capsys.readouterr().out
    assert Page(Path("report.html")).numbers["models"] == ["tiny", "tiny, original CLIP"]
    # the folder of the last block gives a page with classes and confusions, as the text says
    writing.write_report("sweep.html", ["results/sweep"])
    (run,) = Page(Path("sweep.html")).numbers["runs"]
    assert run["lams"] == [0, 0.5, 1]
    assert run["details"]["cells"] is not None
    assert run["details"]["wrong"] is None


def test_the_command_lines_of_the_page_are_understood() -> None:
    parsed = [
        build_parser().parse_args(arguments)
        for block in blocks("bash")
        for program, *arguments in commands(block)
        if program == "openvclip"
    ]
    assert [options.command for options in parsed].count("report") == 5
    evaluated = {str(options.out) for options in parsed if options.command == "evaluate"}
    assert {"results/tuned", "results/clip", "results/seen", "results/unseen"} <= evaluated
    (example,) = (one for one in parsed if one.command == "report" and len(one.results) == 4)
    assert {str(folder) for folder in example.results} <= evaluated


def test_the_example_uses_the_files_that_the_shapes_world_writes(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("bash") if "examples.shapes" in block)
    lines = commands(block)
    assert lines[0] == ["python", "-m", "examples.shapes", "--out", "shapes-out"]
    assert lines[1][:4] == ["python", "-m", "examples.shapes.clips", "shapes-clips"]
    flags = {a: b for line in lines[2:] for a, b in pairwise(line) if a.startswith("--")}
    for name in ("--model", "--pretrained"):
        assert (REPO / flags[name]).is_file()
    assert Path(flags["--checkpoint"]) == Path("shapes-out") / AVERAGED
    assert flags["--videos"] == lines[1][3]
    lists = {b for line in lines for a, b in pairwise(line) if a == "--annotations"}
    written = make_clips(tmp_path, ClipSettings(train=1, test=1), num_workers=0, progress=False)
    assert lists == {f"shapes-clips/{written[name].name}" for name in ("seen_test", "unseen")}
