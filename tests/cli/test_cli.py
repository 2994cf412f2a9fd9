"""The output, the files and the errors of the command ``openvclip``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import openvclip
from openvclip import cli
from tests.checkpoints.test_conversion import FILES, clip_state, froster, same_entries
from tests.helpers import REPO

Captured = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def failure(capsys: Captured, *arguments: object) -> str:
    """Run a command that must fail, and return its text on standard error."""
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err


def help_text(capsys: Captured, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command_and_fits_a_terminal(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    texts = [help_text(capsys), help_text(capsys, "inspect"), help_text(capsys, "convert")]
    assert "inspect" in texts[0]
    assert "convert" in texts[0]
    for option in ("-o", "--allow-missing", "--allow-unexpected", "--dtype", "--overwrite"):
        assert option in texts[2]
    assert "openvclip convert swa_2_22.pth -o" in texts[2]
    texts += [help_text(capsys, "evaluate"), help_text(capsys, "predict")]
    for text in texts:
        assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["convert"], ["convert", "a"], ["convert", "a", "-o", "b", "--dtype", "f"]],
)
def test_wrong_use_ends_with_status_2(capsys: Captured, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: openvclip" in capsys.readouterr().err


def test_inspect_prints_what_a_file_holds(tmp_path: Path, capsys: Captured) -> None:
    FILES["open-vclip-training"].write(tmp_path / "w.pth")
    assert run("inspect", tmp_path / "w.pth") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{openvclip.inspect_checkpoint(tmp_path / 'w.pth')}\n"
    assert printed.err == ""
    rows = dict(line.split(maxsplit=1) for line in printed.out.splitlines())
    assert rows["family"] == "Open-VCLIP under 'model_state'"
    assert rows["beside"] == "3: epoch, optimizer_state, cfg"


@pytest.mark.parametrize("case", ["openai-archive", "hugging-face", "open-vclip-averaged"])
def test_convert_prints_then_writes(tmp_path: Path, capsys: Captured, case: str) -> None:
    original = FILES[case].write(tmp_path / "w")
    out = tmp_path / "new" / "out.safetensors"
    assert run("convert", tmp_path / "w", "-o", out) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{openvclip.inspect_checkpoint(tmp_path / 'w')}\nwrote ")
    same_entries(load_file(out), original)
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["source_family"] == FILES[case].family


def test_convert_to_another_dtype(tmp_path: Path) -> None:
    state = FILES["open-vclip-averaged"].write(tmp_path / "w")
    out = tmp_path / "out.safetensors"
    assert run("convert", tmp_path / "w", "--output", out, "--dtype", "float16") == 0
    same_entries(load_file(out), {name: value.half() for name, value in state.items()})


def test_left_over_weights_are_listed_after_the_report_unless_allowed(
    tmp_path: Path, capsys: Captured
) -> None:
    state = clip_state()
    torch.save(froster(state), tmp_path / "w")
    call = ("convert", tmp_path / "w", "-o", tmp_path / "out.safetensors")
    assert run(*call) == 2
    printed = capsys.readouterr()
    assert "FROSTER" in printed.out
    assert printed.err.startswith("openvclip convert: error: ")
    assert "projector_t.0.weight" in printed.err
    # Report 50: the advice comes before the names, of which ten at most are listed.
    error = printed.err
    assert error.index("allow_unexpected=") < error.index("unexpected (")
    assert 0 < sum(f"raw_model.{name}," in error for name in state) <= 10
    assert not (tmp_path / "out.safetensors").exists()
    allowed = ("--allow-unexpected", "projector_*", "--allow-unexpected", "raw_model.*")
    assert run(*call, *allowed) == 0
    same_entries(load_file(tmp_path / "out.safetensors"), state)


def test_missing_weights_are_listed_unless_allowed(tmp_path: Path, capsys: Captured) -> None:
    state = clip_state()
    del state["logit_scale"]
    torch.save({"model_state": {f"model.{n}": v for n, v in state.items()}}, tmp_path / "w")
    call = ("convert", tmp_path / "w", "-o", tmp_path / "out.safetensors")
    assert "missing (1): logit_scale" in failure(capsys, *call)
    assert run(*call, "--allow-missing", "logit_*") == 0


def test_failures_are_one_line(tmp_path: Path, capsys: Captured) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not weights")
    FILES["open-clip-plain"].write(tmp_path / "w")
    out = tmp_path / "out.safetensors"
    calls = {
        ("inspect", tmp_path / "absent"): "There is no file",
        ("inspect", tmp_path): "holds no weights",
        ("inspect", text): "it is a text",
        ("convert", text, "-o", out): "it is a text",
        ("convert", tmp_path / "w", "-o", tmp_path / "out.pt"): "ending in .safetensors",
        ("convert", tmp_path / "w", "-o", text / "out.safetensors"): "Could not write",
    }
    for call, reason in calls.items():
        error = failure(capsys, *call)
        assert error.startswith(f"openvclip {call[0]}: error: ")
        assert reason in error
        assert error.count("\n") == 1
    assert not out.exists()


def test_nothing_is_replaced_unasked(tmp_path: Path, capsys: Captured) -> None:
    state = FILES["open-vclip-averaged"].write(tmp_path / "w")
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    assert "give --overwrite" in failure(capsys, "convert", tmp_path / "w", "-o", out)
    assert out.read_text() == "precious"
    assert run("convert", tmp_path / "w", "-o", out, "--overwrite") == 0
    same_entries(load_file(out), state)
    assert run("convert", out, "-o", out, "--overwrite") == 0
    same_entries(load_file(out), state)


def test_the_module_runs_as_the_command(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "openvclip", "inspect", str(tmp_path / "absent")]
    done = subprocess.run(call, check=False, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("openvclip inspect: error: There is no file")
    assert done.stderr.count("\n") == 1


def test_the_installed_command_is_this_one() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["openvclip"].partition(":")
    assert module == cli.__name__
    assert getattr(cli, function) is cli.main
