"""What merges of files write: dtypes, values out of range, contracts, threads on one output."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import openvclip
from openvclip.checkpoints import atomic_path, read_contract, task_vector_file
from openvclip.errors import CheckpointError, ContractError, NonFiniteMergeError, WeightTypeError
from openvclip.merging import average
from tests.checkpoints.test_contract import CONTRACT

State = dict[str, Tensor]


def written(folder: Path, *states: State) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(states))]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    return paths


def test_complex_entries_stay_complex_in_another_dtype(tmp_path: Path) -> None:
    a, b = ({"c": torch.randn(3, dtype=torch.complex64), "w": torch.ones(2)} for _ in range(2))
    paths, out = written(tmp_path, a, b), tmp_path / "out.safetensors"
    expected = 0.5 * a["c"] + 0.5 * b["c"]
    openvclip.interpolate_files(*paths, out, 0.5, dtype=torch.float16)
    in_memory = openvclip.interpolate(a, b, 0.5, dtype=torch.float16)
    openvclip.average_files(paths, tmp_path / "mean.safetensors", dtype=torch.float16)
    mean = load_file(tmp_path / "mean.safetensors")
    for result in (load_file(out), in_memory, mean, average([a, b], dtype=torch.float16)):
        assert {name: value.dtype for name, value in result.items()} == {
            "c": torch.complex64,
            "w": torch.float16,
        }
        torch.testing.assert_close(result["c"], expected)


@pytest.mark.parametrize("order", [1, -1])
def test_the_mean_of_a_complex_and_a_real_entry_is_complex(tmp_path: Path, order: int) -> None:
    states = [{"w": torch.tensor([1 + 2j, 3 - 4j])}, {"w": torch.tensor([1.0, 1.0])}][::order]
    openvclip.average_files(written(tmp_path, *states), tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [1 + 1j, 2 - 2j]


@pytest.mark.parametrize("how", ["average", "interpolate", "own"])
def test_values_beyond_the_range_of_the_dtype_are_refused(tmp_path: Path, how: str) -> None:
    paths = written(tmp_path, {"w": torch.tensor([7e4, 1.0])}, {"w": torch.tensor([7e4, 2.0])})
    out = tmp_path / "out.safetensors"
    calls = {
        "average": lambda: openvclip.average_files(paths, out, dtype=torch.float16),
        "interpolate": lambda: openvclip.interpolate_files(*paths, out, 0.5, dtype=torch.float16),
        "own": lambda: openvclip.merge_files(
            paths, out, lambda s: {"w": s[0]["w"].half()}, dtype=torch.float16
        ),
    }
    with pytest.raises(NonFiniteMergeError, match=r"w: .*beyond the range of torch\.float16"):
        calls[how]()
    assert not out.exists()


def test_a_merge_of_ones_own_writes_no_nan_into_masks(tmp_path: Path) -> None:
    mask = torch.tensor([float("-inf"), 0.0])
    paths, out = written(tmp_path, {"m": mask}, {"m": mask}), tmp_path / "out.safetensors"
    with pytest.raises(NonFiniteMergeError, match=r"m: the merge gives NaN, .*Look at the merge"):
        openvclip.merge_files(paths, out, lambda s: {"m": s[0]["m"] + 2 * (s[1]["m"] - s[0]["m"])})
    openvclip.merge_files(paths, out, lambda s: {"m": s[1]["m"]})
    assert torch.equal(load_file(out)["m"], mask)


@pytest.mark.parametrize("lam", [-0.5, 1.5])
@pytest.mark.filterwarnings("ignore:lam:openvclip.errors.ExtrapolationWarning")
def test_an_extrapolation_keeps_equal_infinities(tmp_path: Path, lam: float) -> None:
    mask = torch.tensor([float("-inf"), float("inf"), 1.0])
    a, b = {"m": mask}, {"m": mask.clone()}
    assert torch.equal(openvclip.interpolate(a, b, lam)["m"], mask)
    openvclip.interpolate_files(*written(tmp_path, a, b), tmp_path / "out.safetensors", lam)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["m"], mask)


def test_one_path_in_place_of_a_list_is_refused(tmp_path: Path) -> None:
    (path,) = written(tmp_path, {"w": torch.ones(1)})
    for one in (path, str(path)):
        with pytest.raises(WeightTypeError, match="expected a list of files, got the one path"):
            openvclip.merge_files(one, tmp_path / "out.safetensors", lambda s: s[0])  # type: ignore[arg-type]


def test_two_threads_that_write_one_file_do_not_mix_their_bytes(tmp_path: Path) -> None:
    target, both_open = tmp_path / "out.bin", threading.Barrier(2)

    def write(byte: bytes) -> None:
        with atomic_path(target) as partial, partial.open("wb") as file:
            both_open.wait()
            for _ in range(20):
                file.write(byte * 1000)
                file.flush()
            both_open.wait()

    threads = [threading.Thread(target=write, args=(byte,)) for byte in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in (b"a" * 20_000, b"b" * 20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]


@pytest.mark.parametrize("how", ["average", "merge"])
def test_the_lambda_of_a_mean_with_a_model_without_contract_is_not_known(
    tmp_path: Path, how: str
) -> None:
    """The model without a contract may be the original CLIP, which then weighs more."""
    clip, tuned = written(tmp_path, {"w": torch.zeros(2)}, {"w": torch.ones(2)})
    contract = CONTRACT.with_(lam=0.0)
    openvclip.save_checkpoint(load_file(tuned), tuned, metadata={"openvclip": contract.to_json()})
    out = tmp_path / "out.safetensors"

    def merged(paths: list[Path]) -> float | None:
        if how == "average":
            openvclip.average_files(paths, out)
        else:
            openvclip.merge_files(paths, out, lambda states: average(states))
        found = read_contract(out)
        assert found is not None
        return found.lam

    assert merged([clip, tuned]) is None
    assert merged([tuned, tuned]) == 0.0


def test_a_task_vector_of_another_use_is_written_if_it_is_overridden(tmp_path: Path) -> None:
    base, tuned = written(tmp_path, {"w": torch.zeros(2)}, {"w": torch.ones(2)})
    for path, pooling in ((base, "unit_frames"), (tuned, "frames")):
        contract = CONTRACT.with_(pooling=pooling)
        metadata = {"openvclip": contract.to_json()}
        openvclip.save_checkpoint(load_file(path), path, metadata=metadata)
    out = tmp_path / "vector.safetensors"
    with pytest.raises(ContractError, match="override"):
        task_vector_file(base, tuned, out)
    task_vector_file(base, tuned, out, override=True)
    assert load_file(out)["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EIO])
def test_a_folder_that_can_not_be_flushed(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems refuse it. An error of the disk itself is told."""
    flush = os.fsync

    def refused(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    path = tmp_path / "w.safetensors"
    if number == errno.EIO:
        with pytest.raises(CheckpointError):
            openvclip.save_checkpoint({"w": torch.ones(2)}, path)
    else:
        openvclip.save_checkpoint({"w": torch.ones(2)}, path)
        assert load_file(path)["w"].tolist() == [1.0, 1.0]
