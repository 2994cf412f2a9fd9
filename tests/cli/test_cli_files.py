"""The output, the files and the errors of the commands that merge files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import openvclip
from openvclip.weights.lambdas import visual_only
from tests.cli.test_cli import Captured, failure, help_text, run
from tests.helpers import assert_same_state, tiny_clip


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "text.w": torch.randn(3, 4, generator=generator),
        "visual.w": torch.randn(5, generator=generator),
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "clip.safetensors", tmp_path / "tuned.safetensors"
    for seed, path in enumerate(paths):
        save_file(state(seed), path)
    return paths


Pair = tuple[Path, Path]


def test_interpolate_writes_what_interpolate_gives(
    tmp_path: Path, pair: Pair, capsys: Captured
) -> None:
    out = tmp_path / "new" / "out.safetensors"
    assert run("interpolate", *pair, "--lam", 0.25, "-o", out) == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote        {out}\n"
    assert printed.err == "", "a progress bar where there is no terminal"
    assert_same_state(load_file(out), openvclip.interpolate(state(0), state(1), 0.25))


def test_interpolate_with_many_weights(tmp_path: Path, pair: Pair, capsys: Captured) -> None:
    pattern = tmp_path / "out-{lam}.safetensors"
    assert run("interpolate", *pair, "--lam", "0", "0.20", "1", "-o", pattern) == 0
    outs = [tmp_path / f"out-{lam}.safetensors" for lam in ("0", "0.2", "1")]
    for out, lam in zip(outs, (0.0, 0.2, 1.0), strict=True):
        assert_same_state(load_file(out), openvclip.interpolate(state(0), state(1), lam))
    assert capsys.readouterr().out.splitlines() == [f"wrote        {out}" for out in outs]
    call = ("interpolate", *pair, "--lam", "0.2", "0.4", "-o")
    assert "put {lam} into the name" in failure(capsys, *call, tmp_path / "one.safetensors")
    twice = ("interpolate", *pair, "--lam", "0.3", "0.30", "-o", pattern)
    assert "would be written twice" in failure(capsys, *twice)


def test_interpolate_the_visual_tower_alone(tmp_path: Path, pair: Pair) -> None:
    out = tmp_path / "out.safetensors"
    assert run("interpolate", *pair, "--lam", 0.5, "--visual-only", "-o", out) == 0
    expected = openvclip.interpolate(state(0), state(1), visual_only(0.5))
    assert_same_state(load_file(out), expected)
    assert torch.equal(load_file(out)["text.w"], state(0)["text.w"])


def test_average_writes_the_mean(tmp_path: Path, pair: Pair, capsys: Captured) -> None:
    out = tmp_path / "swa.safetensors"
    assert run("average", *pair, pair[0], "-o", out, "--dtype", "float16") == 0
    for name, value in load_file(out).items():
        exact = (2 * state(0)[name].double() + state(1)[name].double()) / 3
        assert torch.equal(value, exact.half())
    assert capsys.readouterr().out == f"wrote        {out} (mean of 3 files)\n"


def test_shards_of_a_size(tmp_path: Path, pair: Pair, capsys: Captured) -> None:
    index = tmp_path / "m.safetensors.index.json"
    assert run("average", pair[1], "-o", index, "--max-shard-size", "0048b") == 0
    loaded = openvclip.load_checkpoint(index)
    assert_same_state({name: loaded[name] for name in state(1)}, state(1))
    assert len(list(tmp_path.glob("m-*.safetensors"))) == 2
    call = ("average", pair[1], "-o", tmp_path / "out.safetensors", "--max-shard-size", "2GB")
    assert "max_shard_size=2000000000" in failure(capsys, *call)


@pytest.mark.parametrize("size", ["0", "-1", "GB", "1.5GB", "2TB", "2 G"])
def test_sizes_that_are_none(pair: Pair, capsys: Captured, size: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("average", *pair, "-o", "m.safetensors.index.json", f"--max-shard-size={size}")
    assert stopped.value.code == 2
    assert "expected a size such as 500MB or 2GB" in capsys.readouterr().err


def test_nothing_is_replaced_unasked(tmp_path: Path, pair: Pair, capsys: Captured) -> None:
    pattern = tmp_path / "out-{lam}.safetensors"
    existing = tmp_path / "out-0.4.safetensors"
    existing.write_text("precious")
    calls = [
        ("interpolate", *pair, "--lam", 0.2, 0.4, "-o", pattern),
        ("average", *pair, "-o", existing),
    ]
    for call in calls:
        assert f"{existing} exists; give --overwrite to replace it." in failure(capsys, *call)
        assert existing.read_text() == "precious"
    assert not (tmp_path / "out-0.2.safetensors").exists()
    for call in calls:
        assert run(*call, "--overwrite") == 0
    assert load_file(existing).keys() == state(0).keys()


def test_failures_are_errors_of_the_command(tmp_path: Path, pair: Pair, capsys: Captured) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(pair[0].read_bytes()[:-1])
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out.safetensors"
    calls = {
        ("average", cut, "-o", out): "is not a whole safetensors file",
        ("average", tmp_path, "-o", out): "it is a folder",
        ("average", *pair, "-o", tmp_path / "out.pt"): "ending in .safetensors",
        ("average", pair[0], tmp_path / "other.safetensors", "-o", out): "missing (2): text.w,",
        ("interpolate", pair[0], cut, "--lam", 0.5, "-o", out): "is not a whole safetensors file",
        ("interpolate", *pair, "--lam", "nan", "-o", out): "expected a finite number",
    }
    for call, reason in calls.items():
        error = failure(capsys, *call)
        assert error.startswith(f"openvclip {call[0]}: error: ")
        assert reason in error
    assert sorted(tmp_path.iterdir()) == before


def test_help_says_what_lam_weighs_and_fits_a_terminal(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_text(capsys, "interpolate")
    assert "lam weighs A, the original CLIP: --lam 1 is A, --lam 0 is B" in text
    assert "'open-vclip-{lam}.safetensors'" in text
    for part in (text, help_text(capsys, "average")):
        assert max(map(len, part.splitlines())) <= 80
        assert "--max-shard-size" in part


@pytest.mark.parametrize("command", ["convert", "average", "interpolate"])
def test_help_gives_defaults_and_says_what_happens_to_an_existing_file(
    capsys: Captured, command: str
) -> None:
    text = " ".join(help_text(capsys, command).split())
    assert "replace OUT if it exists (default: keep it and end with an error)" in text
    assert "(default: the dtype of each entry)" in text


# Report 05 (open_clip#771): what is unknown is said, and not stored.
def test_inspect_and_convert_say_what_is_known(tmp_path: Path, capsys: Captured) -> None:
    file, out = tmp_path / "last.ckpt", tmp_path / "out.safetensors"
    model = tiny_clip()
    both = {f"{p}.{n}": v for p in ("student", "teacher") for n, v in model.state_dict().items()}
    torch.save({"state_dict": both, "pytorch-lightning_version": "2.6.6"}, file)
    assert run("inspect", file) == 0
    assert "2 CLIPs, under the prefixes 'student.', 'teacher.'" in capsys.readouterr().out
    assert "allow_unexpected=['teacher.*']" in failure(capsys, "convert", file, "-o", out)
    assert run("convert", file, "-o", out, "--allow-unexpected", "teacher.*") == 0
    assert run("inspect", out) == 0
    printed = capsys.readouterr().out
    assert "source_family=open_clip CLIP" in printed
    assert "activation   unknown" in printed
    assert "QuickGELU" not in printed.replace("GELU or QuickGELU", "")
    assert_same_state(load_file(out), dict(sorted(model.state_dict().items())))


# Reports 13 and 14: factors of adapters and quantised weights are refused by the commands.
def test_what_can_not_be_merged_entry_by_entry_is_refused(tmp_path: Path, capsys: Captured) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    out = tmp_path / "out.safetensors"
    names = (("fc.lora_A.weight", "fc.lora_B.weight"), ("fc.weight", "fc.SCB"))
    advice = ("merge_and_unload", "Dequantise")
    for pair_of_names, expected in zip(names, advice, strict=True):
        for seed, file in enumerate(files, start=1):
            dtype = torch.int8 if "SCB" in pair_of_names[1] else torch.float32
            values = {n: torch.full((2, 2), seed, dtype=dtype) for n in pair_of_names[:1]}
            save_file({**values, pair_of_names[1]: torch.full((2, 2), float(seed))}, file)
        for call in (("average", *files), ("interpolate", *files, "--lam", 0.5)):
            assert expected in failure(capsys, *call, "-o", out)
    assert not out.exists()
