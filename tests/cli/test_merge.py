"""``openvclip merge``: each method by name, its list, its help and its errors."""

from __future__ import annotations

import argparse
import ast
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import openvclip
from openvclip import cli
from openvclip.checkpoints import read_contract
from openvclip.cli.main import build_parser
from openvclip.merging import METHODS, Method, task_vector
from tests.checkpoints.test_contract import CONTRACT
from tests.cli.test_cli import Captured, failure, help_text, run
from tests.helpers import REPO
from tests.helpers import assert_same_state as assert_same_order

PARTS = ("base", "tuned0", "tuned1", "tuned2")


def assert_same_state(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare bitwise. The order of entries in a file is that of safetensors."""
    assert got.keys() == expected.keys()
    assert_same_order({name: got[name] for name in expected}, dict(expected))


def state(part: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(PARTS.index(part))
    return {
        "logit_scale": torch.randn((), generator=generator),
        "text_projection": torch.randn(5, 4, generator=generator),
        "transformer.resblocks.0.w": torch.randn(6, 3, generator=generator),
        "transformer.resblocks.1.w": torch.randn(4, 2, 2, generator=generator),
        "visual.steps": torch.tensor(3),
    }


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {part: tmp_path / f"{part}.safetensors" for part in PARTS}
    for part, path in paths.items():
        save_file(state(part), path)
    return paths


Files = dict[str, Path]


def words(method: Method, files: Files, out: Path) -> list[object]:
    models = [files[part] for part in PARTS[1:]][: method.most]
    flags = [(f"--{name}", value) for name, value in method.example().items() if name != "blocks"]
    base = ["--base", files["base"]] if method.base else []
    return ["merge", method.name, *models, *base, *(w for f in flags for w in f), "-o", out]


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_each_method_writes_what_its_function_gives(
    method: Method, files: Files, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "new" / "out.safetensors"
    assert run(*words(method, files, out)) == 0
    models = [state(part) for part in PARTS[1:]][: method.most]
    assert_same_state(
        dict(load_file(out)),
        dict(method.run(state("base") if method.base else None, models, **method.example())),
    )
    printed = capsys.readouterr()
    merged = f"{len(models)} models" if len(models) > 1 else str(files["tuned0"])
    assert printed.out == f"wrote        {out} ({method.name} of {merged})\n"
    assert printed.err == ""
    recipe = recipe_of(out)
    assert recipe["method"] == method.name
    expected = {o.name: o.default for o in method.options} | method.example()
    given = {name: value for name, value in expected.items() if name != "blocks"}
    assert given.items() <= recipe.items()
    assert len(recipe["inputs"]) == len(models) + method.base


def recipe_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as opened:
        recipe: dict[str, Any] = json.loads(opened.metadata()["openvclip_recipe"])
    return recipe


def test_output_options_are_those_of_all_merges(files: Files, tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    call = ("merge", "iso_c", files["tuned0"], "--base", files["base"], "--scale", 0.5)
    assert run(*call, "-o", index, "--max-shard-size", "50B", "--dtype", "bfloat16") == 0
    expected = METHODS["iso_c"].run(
        state("base"), [state("tuned0")], scale=0.5, dtype=torch.bfloat16
    )
    loaded = openvclip.load_checkpoint(index)
    assert_same_state({name: loaded[name] for name in expected}, dict(expected))
    assert len(list(tmp_path.glob("m-*.safetensors"))) > 1
    before = index.read_text()
    error = run(*call, "-o", index)
    assert error == 2
    assert index.read_text() == before


def test_the_contract_says_that_lam_is_not_known(files: Files, tmp_path: Path) -> None:
    contract = CONTRACT.with_(lam=0.0)
    save_file(state("tuned0"), files["tuned0"], {"openvclip": contract.to_json()})
    for method, lam in (("monosoup", None), ("average", 0.0)):
        out = tmp_path / f"{method}.safetensors"
        base = ["--base", files["base"]] if METHODS[method].base else []
        assert run("merge", method, files["tuned0"], *base, "-o", out) == 0
        merged = read_contract(out)
        assert merged is not None
        assert (merged.lam, merged.expansion) == (lam, contract.expansion)
    out = tmp_path / "interpolate.safetensors"
    call = ("merge", "interpolate", files["tuned0"], "--base", files["base"], "--lam", 0.25)
    assert run(*call, "-o", out) == 0
    merged = read_contract(out)
    assert merged is not None
    assert merged.lam == 0.25


# --- task vectors --------------------------------------------------------------------------------


def test_a_task_vector_stands_in_for_its_model(
    files: Files, tmp_path: Path, capsys: Captured
) -> None:
    vector, out = tmp_path / "vector.safetensors", tmp_path / "out.safetensors"
    made = ("merge", "task_vector", files["tuned0"], "--base", files["base"], "-o", vector)
    assert run(*made) == 0
    assert capsys.readouterr().out == f"wrote        {vector} (task vector of {files['tuned0']})\n"
    assert_same_state(
        openvclip.load_checkpoint(vector, names="original"),
        task_vector(state("base"), state("tuned0")),
    )
    assert "exists; give --overwrite" in failure(capsys, *made)
    call = ("merge", "ties", vector, files["tuned1"], "--base", files["base"], "-o", out)
    assert run(*call) == 0
    expected = METHODS["ties"].run(state("base"), [state("tuned0"), state("tuned1")])
    for name, value in load_file(out).items():
        torch.testing.assert_close(value, expected[name])
    with safe_open(out, "pt") as opened:
        assert "openvclip_task_vector" not in opened.metadata()
    other = ("merge", "ties", vector, "--base", files["tuned2"], "-o", out, "--overwrite")
    before = out.read_bytes()
    assert "is the change of another model than" in failure(capsys, *other)
    assert out.read_bytes() == before
    assert run(*other, "--override") == 0


def test_a_task_vector_is_no_model(files: Files, tmp_path: Path, capsys: Captured) -> None:
    vector, out = tmp_path / "vector.safetensors", tmp_path / "out.safetensors"
    run("merge", "task_vector", files["tuned0"], "--base", files["base"], "-o", vector)
    capsys.readouterr()
    assert run("inspect", vector) == 0
    assert "task vector  the change of a model, and no model" in capsys.readouterr().out
    for call in (
        ("convert", vector, "-o", out),
        ("average", vector, files["base"], "-o", out),
        ("interpolate", vector, files["base"], "--lam", 0.5, "-o", out),
        ("merge", "iso_c", files["tuned0"], "--base", vector, "-o", out),
        ("merge", "task_vector", files["tuned0"], "--base", vector, "-o", out),
    ):
        assert f"{vector} is a task vector" in failure(capsys, *call)
    assert not out.exists()


# --- list, help and errors -----------------------------------------------------------------------


def test_the_list_names_each_method_and_fits_a_terminal(capsys: Captured) -> None:
    assert run("merge", "--list") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for method in METHODS.values():
        assert f"{method.name} " in text
        assert method.summary in text
        assert f"{method.inputs}; {method.paper}" in text
    assert "task_vector  " in text


@pytest.mark.parametrize("name", ["", "task_vector", *METHODS])
def test_help_fits_a_terminal_and_names_the_options(
    name: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_text(capsys, "merge", *name.split())
    assert max(map(len, text.splitlines())) <= 80
    if name in METHODS:
        method = METHODS[name]
        assert all(f"--{option.name}" in text for option in method.options)
        assert ("--base CLIP" in text) == method.base
        assert "--max-shard-size" in text


def test_what_is_no_method(capsys: Captured) -> None:
    error = failure(capsys, "merge")
    assert "expected the name of a method" in error
    for given, hint in (
        (["iso"], "did you mean iso_c, iso_cts?"),
        (["Model-Stock", "a"], "did you mean model_stock?"),
        (["iso_cts", "a", "--base", "b", "-o", "c", "--comon", "1"], "did you mean --common?"),
        (["iso_c", "a", "-o", "c"], "the following arguments are required: --base"),
        (["interpolate", "a", "--base", "b", "-o", "c"], "required: --lam"),
        (["monosoup", "a", "--base", "b", "-o", "c", "--rule", "all"], "invalid choice: 'all'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["merge", *given])
        assert stopped.value.code == 2
        assert hint in capsys.readouterr().err


def test_errors_name_the_files_and_leave_nothing(
    files: Files, tmp_path: Path, capsys: Captured
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({**state("tuned1"), "visual.new": torch.zeros(1)}, other)
    larger = tmp_path / "larger.safetensors"
    save_file({**state("tuned1"), "text_projection": torch.zeros(5, 8)}, larger)
    broken = state("tuned1")
    broken["transformer.resblocks.0.w"][0, 0] = math.nan
    nan = tmp_path / "nan.safetensors"
    save_file(broken, nan)
    one, base = files["tuned0"], ["--base", files["base"]]
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out.safetensors"
    named = f"transformer.resblocks.0.w holds NaN or infinity in {nan}"
    errors = {
        ("model_stock", one, *base): "model_stock merges 2 or more models beside the original CLIP",
        ("monosoup", one, one, *base): "monosoup merges 1 model beside the original CLIP, got 2",
        ("monosoup", one, *base, "--threshold", 0): "threshold=0.0: expected a share in (0, 1]",
        ("monosoup", one, *base, "--rule=freevariance", "--threshold=1"): "--threshold has no eff",
        ("iso_cts", one, *base, "--common", 1.5): "common=1.5: expected a share in (0, 1]",
        ("iso_c", one, other, *base): "unexpected (1): visual.new",
        ("iso_c", one, larger, *base): "shape of text_projection: expected [5, 4], given [5, 8]",
        ("tsv_merge", one, one, one, files["tuned1"], *base): "3 singular values, which is fewer",
        ("iso_c", one, nan, *base): named,
        ("monosoup", nan, *base): named,
        ("monosoup", one, "--base", nan): f"{named}, the original model",
        ("iso_c", one, *base, "--scale", "nan"): "expected a finite number",
        ("iso_c", tmp_path / "base.safetensor", *base): "did you mean",
    }
    for call, reason in errors.items():
        error = failure(capsys, "merge", *call, "-o", out)
        assert error.startswith("openvclip merge: error: ")
        assert reason in error, error
    error = failure(capsys, "merge", "--list", "iso_c", one, *base, "-o", out)
    assert "--list has no effect with a method" in error
    assert sorted(tmp_path.iterdir()) == before


def test_lines_counts_the_blocks_of_the_files(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    call = ("merge", "lines", files["tuned0"], "--base", files["base"], "--alpha", 0, "--beta", 1)
    assert run(*call, "-o", out) == 0
    got = load_file(out)
    torch.testing.assert_close(
        got["transformer.resblocks.0.w"], state("base")["transformer.resblocks.0.w"]
    )
    torch.testing.assert_close(
        got["transformer.resblocks.1.w"], state("tuned0")["transformer.resblocks.1.w"]
    )
    assert run(*call, "--blocks", 3, "-o", out, "--overwrite") == 0
    assert not torch.equal(load_file(out)["transformer.resblocks.1.w"],
                           got["transformer.resblocks.1.w"])  # fmt: skip


def test_other_subcommands_do_not_import_the_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import of all methods takes 10 ms, which each start of the command would pay."""
    for file in (REPO / "openvclip" / "cli").rglob("*.py"):
        at_start = [node for node in ast.parse(file.read_text()).body if hasattr(node, "module")]
        assert not [n.module for n in at_start if str(n.module).startswith("openvclip.merging")]
    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert "tsv_merge" not in commands.choices["merge"].format_help()
    assert parser.parse_args(["merge", "--list"]).list
    assert "tsv_merge" in commands.choices["merge"].format_help()
