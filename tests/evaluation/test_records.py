"""Records on the disk: complete records are read, damaged ones are not, settings must agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openvclip.errors import RecordsError
from openvclip.evaluation.records import Record, Records
from tests.helpers import same_bits


def written(folder: Path, *keys: int, rank: int = 0) -> list[Record]:
    new = [Record(key, torch.full((2, 1, 3), key + 0.1), {1: "torn"}) for key in keys]
    with Records(folder, {"a": 1}, rank) as records:
        for record in new:
            records.add(record)
    return new


@pytest.mark.parametrize("folder", [True, False])
def test_what_is_added_is_found(tmp_path: Path, folder: bool) -> None:
    values = torch.tensor([[[1.5, -0.0, float("nan"), 3e-41]]])
    with Records(tmp_path / "new" / "out" if folder else None, {}) as records:
        records.add(Record(7, values, {0: "größer"}))
        records.reload()
        (record,) = records.by_key.values()
    assert (record.key, record.errors) == (7, {0: "größer"})
    assert same_bits(record.values, values)


@given(st.integers(0, 10_000))
def test_a_file_cut_anywhere_gives_its_whole_records(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    written(folder, 0, 1, 2)
    (path,) = folder.glob("*.records")
    block = path.read_bytes()
    size = len(block) // 3  # all three records have this size
    cut %= len(block) + 1
    path.write_bytes(block[:cut])
    assert list(Records(folder, {"a": 1}).by_key) == list(range(cut // size))


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_record_is_not_read(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    expected = written(folder, 0, 1)
    (path,) = folder.glob("*.records")
    block = bytearray(path.read_bytes())
    place %= len(block)
    block[place] ^= flip
    path.write_bytes(block)
    by_key = Records(folder, {"a": 1}).by_key
    assert list(by_key) == ([] if place < len(block) // 2 else [0])
    assert all(same_bits(record.values, expected[key].values) for key, record in by_key.items())


def test_records_after_a_torn_one_are_found_and_the_newest_counts(tmp_path: Path) -> None:
    written(tmp_path, 0, 1)
    (path,) = tmp_path.glob("*.records")
    path.write_bytes(path.read_bytes()[:-1])  # killed while writing record 1
    with Records(tmp_path, {"a": 1}) as records:
        assert list(records.by_key) == [0]
        records.add(Record(1, torch.ones(1)))
        records.add(Record(0, torch.zeros(1)))
    by_key = Records(tmp_path, {"a": 1}).by_key
    assert by_key[1].values.tolist() == [1.0]
    assert (by_key[0].values.tolist(), by_key[0].errors) == ([0.0], {})


def test_processes_find_each_others_records(tmp_path: Path) -> None:
    both = [Records(tmp_path, {"a": 1}, rank) for rank in range(2)]
    for rank, records in enumerate(both):
        with records:
            records.add(Record(rank, torch.ones(1)))
    for records in both:
        records.reload()
        assert sorted(records.by_key) == [0, 1]


def test_other_settings_are_an_error_that_shows_them(tmp_path: Path) -> None:
    Records(tmp_path, {"lam": [0.5], "views": 3, "old": (1, 2)})
    Records(tmp_path, {"views": 3, "lam": [0.5], "old": [1, 2]})
    with pytest.raises(RecordsError) as caught:
        Records(tmp_path, {"lam": [0.5, 1.0], "views": 3, "new": None, "amp": "bf16"})
    assert str(caught.value).splitlines()[1:-1] == [
        "  lam: stored [0.5], requested [0.5, 1.0]",
        '  amp: stored null, requested "bf16"',
        "  old: stored [1, 2], requested null",
    ]


def test_a_folder_that_cant_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordsError, match=r"can't be written to .*Not a directory"):
        Records(tmp_path / "file" / "out", {})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(RecordsError, match=r"settings\.json is not JSON"):
        Records(tmp_path, {})


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with Records(tmp_path, {}) as records:
        records._file = full.open("wb", buffering=0)
        with pytest.raises(RecordsError, match="No space left"):
            records.add(Record(0, torch.ones(1)))
