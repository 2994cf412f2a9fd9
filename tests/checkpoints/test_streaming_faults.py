"""Merging files while the process is really killed, the disk is full, or a file changes."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import openvclip
from openvclip.errors import CheckpointError
from tests.forked import run_code, started

SETUP = """
    import json, os, random, re, resource, signal, sys, time
    from pathlib import Path
    import safetensors.torch, torch, tqdm
    import openvclip
    from openvclip import cli

    folder = Path(sys.argv[1])
    inputs = folder / "inputs"
    a, b = inputs / "a.safetensors", inputs / "b.safetensors"
    numbers = random.Random(0)

    def child(work, moment=None, number=signal.SIGKILL):
        \"\"\"Run work in another process, and send it a signal after some seconds.\"\"\"
        pid = os.fork()
        if pid == 0:
            # SIGINT is ignored at first if a shell runs the tests in the background.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                work()
            except KeyboardInterrupt:  # between two calls of the command
                os._exit(130)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(3)
            os._exit(0)
        if moment is not None:
            time.sleep(moment)
            os.kill(pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def write(target, lam, **options):
        return lambda: openvclip.interpolate_files(a, b, target, lam, **options)

    index = folder / "m.safetensors.index.json"
    four_shards = {"max_shard_size": 4_000_000}

    def strays():
        \"\"\"Return the temporary files and the shards that no index names.\"\"\"
        names = {path.name for path in folder.iterdir() if path.is_file()} - {index.name}
        if index.exists():
            names -= set(json.loads(index.read_text())["weight_map"].values())
        temporary = {name for name in names if re.fullmatch("[.].*[.]tmp", name)}
        tagged = "m-[0-9a-f]{8}-0000[1-4]-of-00004[.]safetensors"
        shards = {name for name in names if re.fullmatch(tagged, name)}
        assert names == temporary | shards, names
        return temporary, shards
"""


def run(folder: Path, script: str) -> str:
    """Run a script that forks in a process without threads, and return its output."""
    pytest.importorskip("resource")
    inputs = folder / "inputs"
    inputs.mkdir()
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        state = {f"w{k}": torch.randn(1_000_000, generator=generator) for k in range(4)}
        save_file(state, inputs / f"{name}.safetensors")
    code = textwrap.dedent(SETUP) + textwrap.dedent(script)
    out, errors = folder.with_name("out.log"), folder.with_name("errors.log")
    with started(run_code, code, [str(folder)], log=out, errors=errors) as process:
        process.join(240)
    assert process.exitcode == 0, errors.read_text()
    return out.read_text()


def test_a_kill_at_any_moment_leaves_the_older_model_or_the_new_one(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        """
        contents = []
        for lam in (0.25, 0.75):
            assert child(write(inputs / f"{lam}.safetensors", lam)) == 0
            contents.append((inputs / f"{lam}.safetensors").read_bytes())
        out = folder / "out.safetensors"

        def forever(target, **options):
            while True:
                write(target, 0.75, **options)()
                write(target, 0.25, **options)()

        out.write_bytes(contents[0])
        half_written = 0
        for _ in range(15):
            moment = numbers.uniform(0.0, 0.25)
            assert child(lambda: forever(out), moment) == -signal.SIGKILL
            assert out.read_bytes() in contents
            for stray in [path for path in folder.iterdir() if path.is_file() and path != out]:
                assert stray.name.startswith(".") and stray.name.endswith(".tmp"), stray
                if stray.read_bytes() not in contents:
                    assert stray.read_bytes()[:8] in (b"", bytes(8)), "it looks like a whole file"
                    half_written += 1
                stray.unlink()
        print(half_written)
        out.unlink()

        def compare():
            state = openvclip.load_checkpoint(index)
            models = [openvclip.load_checkpoint(inputs / f"{x}.safetensors") for x in (0.25, 0.75)]
            same = [all(torch.equal(state[n], model[n]) for n in model) for model in models]
            assert state.keys() == models[0].keys() and any(same)

        assert child(write(index, 0.25, **four_shards)) == 0
        for _ in range(8):
            moment = numbers.uniform(0.0, 0.25)
            assert child(lambda: forever(index, **four_shards), moment) == -signal.SIGKILL
            assert child(compare) == 0
            strays()
        assert child(write(index, 0.25, **four_shards)) == 0
        assert not strays()[1]
        """,
    )
    assert int(out) >= 1, "no process was killed while it wrote"


def test_shards_that_a_kill_left_are_removed_by_the_next_write(tmp_path: Path) -> None:
    """Killed just before the index takes its name, and just after it."""
    run(
        tmp_path,
        """
        def killed(lam, after):
            def rename(source, target, replace=os.replace):
                if after or Path(target) != index:
                    replace(source, target)
                if Path(target) == index:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.replace = rename
            write(index, lam, **four_shards)()

        def holds(lam):
            def compare():
                a_state, b_state, state = map(openvclip.load_checkpoint, (a, b, index))
                expected = openvclip.interpolate(a_state, b_state, lam)
                assert all(torch.equal(state[n], expected[n]) for n in state.keys() | expected)
            return child(compare) == 0

        def counts():
            return tuple(map(len, strays()))

        assert child(lambda: killed(0.25, after=False)) == -signal.SIGKILL
        assert counts() == (1, 4) and not index.exists()
        assert child(write(index, 0.25, **four_shards)) == 0
        assert counts() == (1, 0) and holds(0.25)

        assert child(lambda: killed(0.75, after=False)) == -signal.SIGKILL
        assert counts() == (2, 4) and holds(0.25)
        assert child(lambda: killed(0.75, after=True)) == -signal.SIGKILL
        assert counts() == (2, 8) and holds(0.75)  # the older model's, too
        assert child(write(index, 0.5, **four_shards)) == 0
        assert counts() == (2, 0) and holds(0.5)
        """,
    )


def test_a_full_disk_and_ctrl_c_leave_the_older_files(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        def full(work):
            def limited():
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (9_000_000, 9_000_000))
                try:
                    work()
                except openvclip.OpenVCLIPError as error:
                    assert "Could not write" in str(error), error
                    assert "An existing file is unchanged; check free space" in str(error), error
                    os._exit(7)
            return child(limited)

        out = folder / "out.safetensors"
        out.write_bytes(b"older")
        index.write_bytes(b"{}")
        assert full(write(out, 0.5)) == 7
        assert full(write(index, 0.5, max_shard_size=12_000_000)) == 7
        assert full(lambda: openvclip.average_files([a, b], out)) == 7
        several = [out, folder / "second.safetensors"]
        assert full(lambda: openvclip.interpolate_files(a, b, several, [0.5, 1.0])) == 7
        assert out.read_bytes() == b"older" and index.read_bytes() == b"{}"
        assert {path.name for path in folder.iterdir()} == {"inputs", out.name, index.name}

        out.unlink()

        def command():
            while True:
                for lam in ("0.25", "0.75"):
                    arguments = ["interpolate", str(a), str(b), "--lam", lam, "-o", str(out)]
                    status = cli.main([*arguments, "--overwrite"])
                    if status:
                        os._exit(status)

        for _ in range(8):
            assert child(command, numbers.uniform(0.02, 0.15), signal.SIGINT) == 130
            assert {path.name for path in folder.iterdir()} <= {"inputs", out.name, index.name}
            assert not out.exists() or child(lambda: openvclip.load_checkpoint(out)) == 0
        """,
    )


def a_file(path: Path, entries: int = 3) -> Path:
    save_file({f"w{k}": torch.full((50,), float(k)) for k in range(entries)}, path)
    return path


def test_an_exception_in_a_method_leaves_the_older_file(tmp_path: Path) -> None:
    a, out = a_file(tmp_path / "a.safetensors"), a_file(tmp_path / "out.safetensors", 1)

    def fails_late(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if "w2" in states[0]:
            raise ZeroDivisionError("in the method")
        return states[0]

    with pytest.raises(ZeroDivisionError, match="in the method"):
        openvclip.merge_files([a], out, fails_late)
    with pytest.raises(ZeroDivisionError, match="in the method"):
        openvclip.merge_files(
            [a], tmp_path / "m.safetensors.index.json", fails_late, max_shard_size=200
        )
    assert load_file(out).keys() == {"w0"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "out.safetensors"]


def test_an_input_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    a = a_file(tmp_path / "a.safetensors", 9)

    def cuts(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        os.truncate(a, a.stat().st_size - 100)
        return states[0]

    with pytest.raises(CheckpointError, match=r"a\.safetensors: the file became shorter"):
        openvclip.merge_files([a], tmp_path / "out.safetensors", cuts)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def shards_of(index: Path) -> list[Path]:
    named = set(json.loads(index.read_text())["weight_map"].values())
    return [index.with_name(name) for name in sorted(named)]


def test_no_shard_goes_that_another_made_or_a_json_file_names(tmp_path: Path) -> None:
    folder = tmp_path / "ü"
    a = a_file(tmp_path / "a.safetensors")
    index = folder / "mü.safetensors.index.json"

    def write(target: Path = index) -> list[Path]:
        openvclip.average_files([a], target, max_shard_size=200)
        return shards_of(target)

    kept_files = write()
    index.rename(folder / "other.safetensors.index.json")
    kept_files += write()
    index.rename(folder / f"{index.name}.bak")
    kept_files += write()
    listed = {"files": [shard.name for shard in shards_of(index)]}
    (folder / "manifest.json").write_text(json.dumps(listed, ensure_ascii=False))
    kept_files += write(folder / "mü-deadbeef.safetensors.index.json")
    shard = kept_files[0]
    stray = folder / "mü-deadbeef-00001-of-00001.safetensors"
    for name in (
        "mü-00001-of-00001.safetensors",
        "mü-deadbee-00001-of-00001.safetensors",
        "mü-DEADBEEF-00001-of-00001.safetensors",
        "mü-large-deadbeef-00001-of-00001.safetensors",
        "other-deadbeef-00001-of-00001.safetensors",
        f"{stray.name}.bak",
    ):
        kept_files.append(folder / name)
        kept_files[-1].write_bytes(shard.read_bytes())
    kept_files.append(a_file(folder / "mü-20260131-00001-of-00001.safetensors"))  # has no recipe
    kept_files.append(folder / "mü-20260131-00002-of-00002.safetensors")
    kept_files[-1].write_bytes(b"not whole")
    stray.write_bytes(shard.read_bytes())
    contents = [path.read_bytes() for path in kept_files]
    new = write()
    assert [path.read_bytes() for path in kept_files] == contents
    shards = {path.name for path in folder.iterdir() if ".json" not in path.name}
    assert shards == {path.name for path in kept_files + new}


def test_strays_stay_while_it_is_not_known_whose_they_are(tmp_path: Path) -> None:
    """After a write that failed, and if the shards appear while a write is running."""
    a, index = a_file(tmp_path / "a.safetensors"), tmp_path / "m.safetensors.index.json"
    openvclip.average_files([a], index, max_shard_size=10_000)
    (shard,) = shards_of(index)
    stray, late = (tmp_path / f"m-{tag * 8}-00001-of-00001.safetensors" for tag in "12")
    stray.write_bytes(shard.read_bytes())

    def fails(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        raise ZeroDivisionError

    def another_writes(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        late.write_bytes(stray.read_bytes())
        return states[0]

    with pytest.raises(ZeroDivisionError):
        openvclip.merge_files([a], index, fails)
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (a, index, shard, stray)
    }
    openvclip.merge_files([a], index, another_writes)
    (new,) = shards_of(index)
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (a, index, new, late)
    }


def test_shards_that_got_no_index_are_removed(tmp_path: Path) -> None:
    a, index = a_file(tmp_path / "a.safetensors"), tmp_path / "m.safetensors.index.json"
    index.mkdir()  # onto which no file can be renamed
    with pytest.raises(CheckpointError, match="Could not write"):
        openvclip.average_files([a], index, max_shard_size=200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", index.name]
