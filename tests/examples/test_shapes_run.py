"""The shapes world from end to end, at its smallest, and the files that come out."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.shapes import predict, results, run
from examples.shapes.settings import FULL
from openvclip.checkpoints import load_checkpoint
from tests.helpers import REPO


def _fake_results() -> results.Results:
    """Two seeds, three lambdas, numbers chosen so that each choice can be told by hand."""

    def row(shift: float) -> dict[str, dict[str, float]]:
        return {
            "seen_test": {"0": 0.6 + shift, "0.5": 0.5, "0.8": 0.3},
            "development": {"0": 0.3, "0.5": 0.5 + shift, "0.8": 0.4},
            "unseen": {"0": 0.9, "0.5": 0.4 + shift, "0.8": 0.2},
        }

    clip = {name: {"1": 0.25} for name in ("seen_test", "development", "unseen")}
    seeds = {
        str(seed): {"Open-VCLIP": row(0.1 * seed), "FINE-TUNE": row(0.0), "CLIP": clip}
        for seed in range(2)
    }
    return {"settings": {}, "environment": {}, "seeds": seeds}


def test_lambda_is_chosen_on_development_shapes_alone() -> None:
    found = _fake_results()
    assert results.chosen_lambda(found, "Open-VCLIP") == 0.5  # unseen would say 0
    for seed in found["seeds"].values():
        seed["Open-VCLIP"]["development"]["0.8"] = 1.0
    assert results.chosen_lambda(found, "Open-VCLIP") == 0.8


def test_table_by_hand() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in results.table(_fake_results()).splitlines()
    ]
    assert rows[2] == ["CLIP", "", "", "", "", "", "25.0 ± 0.0", "25.0 ± 0.0"]
    half = ["50.0 ± 0.0", "45.0 ± 7.1"]
    assert rows[4] == ["Open-VCLIP", "65.0 ± 7.1", "90.0 ± 0.0", *half, "0.5", *half]


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.save_results({"settings": {"a": 1}, "seeds": {}}, path)
    assert results.load_results(path, {"a": 1})["settings"] == {"a": 1}
    with pytest.raises(FileExistsError, match="other settings"):
        results.load_results(path, {"a": 2})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The command of the README at its smallest, run as a user runs it."""
    out = tmp_path_factory.mktemp("shapes") / "out"
    command = [sys.executable, "-m", "examples.shapes", "--smoke", "--out", str(out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_run_leaves_what_it_names(finished: tuple[Path, str]) -> None:
    out, text = finished
    for name in ("tradeoff.png", "results.json", "openvclip-shapes.safetensors"):
        assert (out / name).is_file()
        assert name in text
    assert (out / "table.md").read_text() in text
    found = json.loads((out / "results.json").read_text())
    assert set(found["seeds"]["0"]) == {"CLIP", "FINE-TUNE", "SWA", "IWR", "Open-VCLIP"}
    assert not list(out.rglob("*.tmp"))


def test_final_weights_lie_between_clip_and_the_average(finished: tuple[Path, str]) -> None:
    from examples.shapes.model import create_model

    out, _ = finished
    lam = results.chosen_lambda(json.loads((out / "results.json").read_text()), "Open-VCLIP")
    final = load_checkpoint(out / "openvclip-shapes.safetensors")
    average, clip = load_checkpoint(out / run.AVERAGED), create_model()[0].state_dict()
    for name, value in final.items():
        expected = lam * clip[name] + (1 - lam) * average[name]
        torch.testing.assert_close(value.float(), expected, rtol=1e-3, atol=1e-4)


def test_the_last_line_can_be_pasted(finished: tuple[Path, str]) -> None:
    line = finished[1].strip().splitlines()[-1]
    command = shlex.split(line)
    assert command[:3] == ["python", "-m", "examples.shapes.predict"]
    done = subprocess.run(
        [sys.executable, *command[1:]], check=False, capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ *\d+\.\d%  \w+ \w+$", done.stdout, re.MULTILINE)) == 5


def test_a_finished_run_is_not_repeated(finished: tuple[Path, str]) -> None:
    out, text = finished
    before = (out / "results.json").stat().st_mtime_ns
    run.main(["--smoke", "--out", str(out)])
    assert (out / "results.json").stat().st_mtime_ns == before
    assert (out / "table.md").read_text() in text


def test_prediction_of_a_broken_file_is_one_clear_line(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    weights = finished[0] / "openvclip-shapes.safetensors"
    (tmp_path / "empty.mp4").touch()
    for clip in ("absent.mp4", "empty.mp4"):
        with pytest.raises(SystemExit, match=clip):
            predict.main([str(weights), str(tmp_path / clip)])
    with pytest.raises(SystemExit, match="no-weights"):
        predict.main([str(tmp_path / "no-weights"), str(tmp_path / "empty.mp4")])


def test_zero_seeds_are_refused() -> None:
    with pytest.raises(SystemExit, match="--seeds 0: expected at least 1"):
        run.main(["--seeds", "0"])


@pytest.mark.parametrize("page", ["README.md", "docs/shapes.md"])
def test_published_table_is_that_of_the_published_results(page: str) -> None:
    published = json.loads((REPO / "docs" / "assets" / "shapes-results.json").read_text())
    assert len(published["seeds"]) == 3
    assert f"<!-- table: shapes -->\n{results.table(published)}\n" in (REPO / page).read_text()


def test_published_results_are_of_the_present_settings() -> None:
    published = json.loads((REPO / "docs" / "assets" / "shapes-results.json").read_text())
    assert published["settings"] == run.recorded(FULL)


def test_figure_is_drawn_from_results(tmp_path: Path) -> None:
    results.draw(_fake_results(), tmp_path / "t.png")
    from matplotlib.image import imread

    assert np.asarray(imread(tmp_path / "t.png")).std() > 0.05
