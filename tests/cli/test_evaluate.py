"""``openvclip evaluate``: accuracy, stopping and continuing, several processes, errors."""

from __future__ import annotations

import json
import os
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.shapes.model import create_model
from examples.shapes.world import class_names as world_names
from openvclip import cli
from openvclip.checkpoints import load_checkpoint
from openvclip.cli import evaluate
from openvclip.cli.main import build_parser
from openvclip.evaluation import records
from openvclip.evaluation.records import Records
from openvclip.video import class_names, read_clip, transforms
from openvclip.video.protocols import Split, class_name, load
from tests.evaluation.test_runner import counted, slow_logits
from tests.forked import started, together
from tests.helpers import SHARED, same_bits
from tests.world import World

Captured = pytest.CaptureFixture[str]


def run(arguments: list[str]) -> None:
    """The command in a process of its own."""
    raise SystemExit(cli.main(arguments))


def run_killed_in_the_third_record(arguments: list[str]) -> None:
    """The process kills itself with half of its third record on the disk."""
    add, left = Records.add, 2

    def torn(self: Records, record: records.Record) -> None:
        nonlocal left
        if not left:
            block = records._packed(record)
            self._file.write(block[: len(block) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        add(self, record)

    Records.add = torn  # type: ignore[method-assign]
    run(arguments)


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def features(folder: Path) -> dict[int, torch.Tensor]:
    settings = json.loads((folder / "settings.json").read_text())
    return {key: record.values for key, record in Records(folder, settings).by_key.items()}


def assert_same_features(a: Path, b: Path) -> None:
    first, second = features(a), features(b)
    assert sorted(first) == sorted(second) == [0, 1, 2, 3]
    assert all(same_bits(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in this process that was not stopped."""
    out = tmp_path_factory.mktemp("finished") / "out"
    flags = ["--checkpoint", str(world.tuned), "--lam", "0", "0.5", "--per-class", "--confusion"]
    assert cli.main([*world.evaluate_flags(out), *flags]) == 0
    return out


def flags(world: World, out: Path) -> list[str]:
    return [*world.evaluate_flags(out), "--checkpoint", str(world.tuned), "--lam", "0", "0.5"]


def test_the_shapes_world_equals_a_slow_evaluation(world: World, finished: Path) -> None:
    split = Split("seen_test", world_names("seen"), world.samples)
    content = results(finished)
    expected = slow_logits(world, split, load_checkpoint(world.tuned))
    (entry,) = content["results"][0]["splits"]
    assert content["results"][0]["lam"] == 0.0
    assert entry["top1"] == pytest.approx(counted(expected, split, 1))
    assert entry["top5"] == pytest.approx(counted(expected, split, 5))
    assert entry["clips"] == len(world.samples)
    assert sum(map(sum, entry["confusion"])) == len(world.samples)
    assert set(entry["per_class"]) == set(split.class_names)
    assert content["timing"]["clips"] == len(world.samples)


def test_what_is_printed_can_be_pasted(world: World, finished: Path, capsys: Captured) -> None:
    assert cli.main([*flags(world, finished), "--per-class"]) == 0
    text = capsys.readouterr().out
    table = (finished / "table.md").read_text()
    assert text.startswith("seen_test.csv: 1 split, 10 videos\n")
    assert table in text
    assert table.splitlines()[0].split("|")[1:-1] == [
        " model       ",
        "   λ ",
        " top-1 ",
        " top-5 ",
    ]
    assert "nothing was left to encode" in text
    assert cli.main([*flags(world, finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results(finished)


def test_a_killed_run_goes_on_where_it_stopped(
    world: World, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    log = tmp_path / "log"
    with started(run_killed_in_the_third_record, flags(world, out), log=log) as killed:
        killed.join(120)
    assert killed.exitcode == -signal.SIGKILL, log.read_text()
    assert sorted(features(out)) == [0, 1]  # the half of the third record is ignored
    assert not (out / "results.json").exists()
    assert cli.main(flags(world, out)) == 0
    assert results(out)["timing"]["clips"] == 4  # of 10: the first two batches were encoded before
    assert_same_features(out, finished)
    assert [e["top1"] for e in results(out)["results"]] == [
        e["top1"] for e in results(finished)["results"]
    ]


def test_two_processes_equal_one_bitwise(world: World, finished: Path, tmp_path: Path) -> None:
    """Both processes were killed with one of two batches written, and half of the next record."""
    out = tmp_path / "out"
    settings = json.loads((finished / "settings.json").read_text())
    records_of_run = Records(finished, settings).by_key
    for rank in range(2):
        with Records(out, settings, rank) as records:
            records.add(records_of_run[rank])
        (path,) = out.glob(f"*-000{rank}.records")
        path.write_bytes(path.read_bytes() * 2)
        with path.open("rb+") as file:
            file.truncate(path.stat().st_size * 3 // 4)
    with together(run, flags(world, out), logs=tmp_path) as processes:
        for process in processes:
            process.join(120)
    printed = "".join((tmp_path / f"{rank}.log").read_text() for rank in range(2))
    assert [process.exitcode for process in processes] == [0, 0], printed
    assert_same_features(out, finished)
    assert len(list(out.glob("*.records"))) == 2 + 2
    assert printed.count("| shapes-clip |") == 2  # one table, with a row for each lambda
    assert results(out)["timing"]["clips"] == 4  # of 10: batches 2 and 3
    for entry, alone in zip(results(out)["results"], results(finished)["results"], strict=True):
        assert (entry["top1"], entry["top5"]) == (alone["top1"], alone["top5"])


def failure(capsys: Captured, arguments: list[str]) -> str:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("openvclip evaluate: error: ")
    return printed.err


def test_the_texts_of_the_original_have_a_folder_of_their_own(world: World) -> None:
    # Report 36: results with other text features are other results.
    def folder(*more: str) -> Path:
        arguments = [*flags(world, Path("out")), "--checkpoint", str(world.tuned), *more]
        return evaluate._default_folder(build_parser().parse_args(arguments))

    assert folder() == folder("--text", "own") != folder("--text", "original")


def test_other_settings_in_the_same_folder(world: World, finished: Path, capsys: Captured) -> None:
    text = failure(capsys, [*flags(world, finished), "--frames", "4", "--boundary", "mask"])
    assert "num_frames: stored 8, requested 4" in text
    assert 'expand: stored "1 zero", requested "1 mask"' in text
    assert "give another folder" in text.lower()


def test_bad_input_is_told_before_anything_is_encoded(
    world: World, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    good = world.evaluate_flags(out)

    def changed(flag: str, value: Path | str) -> list[str]:
        arguments = list(good)
        arguments[arguments.index(flag) + 1] = str(value)
        return arguments

    (tmp_path / "short.csv").write_text("a.mp4,0\nb.mp4\n")
    (tmp_path / "other.csv").write_text("a.mp4,0\n\nb.mp4,flying\n")
    (tmp_path / "gone.csv").write_text("".join(f"{i}.mp4,{i}\n" for i in range(7)))
    first = Path(world.samples[0][0])
    renamed = first.with_name(first.name.upper()).with_suffix(first.suffix)
    (tmp_path / "case.csv").write_text(f"{renamed},0\n")
    (tmp_path / "twice.txt").write_text("run\nswim\nrun\n")
    (tmp_path / "gap.txt").write_text("run\n\nswim\n\n")
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04 cut off")
    small = tmp_path / "small.pt"
    torch.save({"logit_scale": torch.ones(()), "visual.proj": torch.ones(2, 2)}, small)
    calls = {
        "short.csv, line 2: 'b.mp4' has too few fields": changed(
            "--annotations", tmp_path / "short.csv"
        ),
        "other.csv, line 3: unknown class 'flying'": changed(
            "--annotations", tmp_path / "other.csv"
        ),
        "7 of 7 videos are not in": changed("--annotations", tmp_path / "gone.csv"),
        # Report 33: a folder whose name differs in case from the official one.
        f"did you mean {world.folder / world.samples[0][0]}?)": changed(
            "--annotations", tmp_path / "case.csv"
        ),
        "0.mp4, 1.mp4, 2.mp4, ...": changed("--annotations", tmp_path / "gone.csv"),
        "twice.txt, line 3: 'run' is on line 1 already": changed(
            "--classes", tmp_path / "twice.txt"
        ),
        "gap.txt, line 2: is blank": changed("--classes", tmp_path / "gap.txt"),
        "did you mean ViT-B-32": changed("--model", "ViT-B32"),
        "absent.json: no such file": changed("--model", "absent.json"),
        "'openia' is neither a file of weights": changed("--pretrained", "openia"),
        "There is no file gone.pth": [*changed("--pretrained", "gone"), "--checkpoint", "gone.pth"],
        "weights.pth": [*good, "--checkpoint", str(tmp_path / "weights.pth")],
        "does not fit the model": [*good, "--checkpoint", str(small)],
        "visual.proj: expected [96, 64], given [2, 2]": [*good, "--checkpoint", str(small)],
        "give --checkpoint too": [*good, "--lam", "0.5"],
        "--batch-size 0: expected at least 1": changed("--batch-size", "0"),
        "--device moon can't be used": [*good, "--device", "moon"],
        "views=0": changed("--views", "0"),
        "--protocol ucf101-ep1 hmdb51-ep1: expected protocols of one data set": [
            *good[: good.index("--classes")],
            *("--protocol", "ucf101-ep1", "hmdb51-ep1"),
        ],
    }
    for reason, arguments in calls.items():
        assert reason in failure(capsys, arguments), reason
    assert not list(tmp_path.rglob("*.records"))


@pytest.mark.parametrize(
    ("protocols", "videos"),
    [(["ucf101-ep1"], 13320), (["ucf101-ep1", "ucf101-ep3"], 13320), (["hmdb51-ep3"], 4243)],
)
def test_videos_of_a_protocol_are_looked_for_first(
    protocols: list[str], videos: int, world: World, capsys: Captured
) -> None:
    """The counts are from the official lists. The three lists of HMDB-51 (EP3) share videos."""
    data = SHARED / "data"
    if not data.is_dir():
        pytest.skip("the shared folder with the official lists is not here")
    flags = ["--annotations", str(data), "--videos", str(world.folder), "--model", "not-looked-at"]
    error = failure(capsys, ["evaluate", "--protocol", *protocols, *flags])
    assert f"{videos} of {videos} videos are not in {world.folder}" in error


def test_two_protocols_in_one_pass(world: World, tmp_path: Path, capsys: Captured) -> None:
    """Class names of UCF-101 with clips of the shapes world; slow evaluations give the numbers."""
    folders = ["ApplyEyeMakeup", "BalanceBeam", "Biking", "Bowling", "CliffDiving", "Drumming"]
    folders += ["Fencing", "GolfSwing", "HorseRiding", "Kayaking", "PlayingCello", "YoYo"]
    videos, lists = tmp_path / "videos", tmp_path / "lists"
    lists.mkdir()
    paths = [f"{folder}/v_{folder}_g01_c01.avi" for folder in folders]
    for i, path in enumerate(paths):
        (videos / path).parent.mkdir(parents=True)
        (videos / path).symlink_to(world.folder / world.samples[i % 10][0])
    for number in (1, 2, 3):
        tested = paths[number::3]
        (lists / f"testlist{number:02d}.txt").write_text("\n".join(tested) + "\n")
        trained = [
            f"{path} {1 + class_names('ucf101').index(class_name('ucf101', path.split('/')[0]))}"
            for path in paths
            if path not in tested
        ]
        (lists / f"trainlist{number:02d}.txt").write_text("\n".join(trained) + "\n")
    names = ["ucf101-ep1", "ucf101-ep3"]
    arguments = world.evaluate_flags(tmp_path / "out")
    place = arguments.index("--classes")
    del arguments[place : place + 2]
    arguments[arguments.index("--annotations") + 1] = str(lists)
    arguments[arguments.index("--videos") + 1] = str(videos)
    assert cli.main([*arguments, "--protocol", *names, "--expand", "--allow-incomplete"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ucf101-ep1, ucf101-ep3: 13 splits, 12 videos\n")
    content = results(tmp_path / "out")
    assert content["timing"]["clips"] == 12
    assert [(entry["protocol"], len(entry["splits"])) for entry in content["results"]] == [
        ("ucf101-ep1", 10),
        ("ucf101-ep3", 3),
    ]
    moved = replace(world, folder=videos)
    for protocol, entry in zip(names, content["results"], strict=True):
        splits = load(protocol, annotations=lists, allow_incomplete=True)
        logits = [slow_logits(moved, split, None) for split in splits]
        for k in (1, 5):
            tops = [counted(*entry, k) for entry in zip(logits, splits, strict=True)]
            mean, std = statistics.mean(tops), statistics.stdev(tops)
            assert entry[f"top{k}"]["mean"] == pytest.approx(mean)
            assert entry[f"top{k}"]["std"] == pytest.approx(std)
            (row,) = [line for line in printed.splitlines() if f" {protocol} |" in line]
            assert f" {100 * mean:.1f} ± {100 * std:.1f} " in row


def test_plain_clip_frame_by_frame(world: World, tmp_path: Path) -> None:
    assert cli.main([*world.evaluate_flags(tmp_path), "--no-expand"]) == 0
    model, _ = create_model()
    (values, *_) = features(tmp_path).values()
    with torch.no_grad():
        views = read_clip(world.folder / world.samples[0][0], sampler="uniform", views=2)
        frames = model.encode_image(transforms.build("released", 32)(views).flatten(0, 1))
    expected = torch.nn.functional.normalize(frames, dim=-1).view(2, 8, -1).mean(1).sum(0)
    torch.testing.assert_close(values[0, 0], expected)


@torch.no_grad()
def test_three_crops_of_each_view_count_as_views(world: World, tmp_path: Path) -> None:
    crops = ["--crops", "3", "--short-side", "40"]
    assert cli.main([*world.evaluate_flags(tmp_path / "out"), *crops]) == 0
    stored = torch.cat([value for _, value in sorted(features(tmp_path / "out").items())])
    model, _ = create_model()
    uncropped = transforms.build("released", 40)  # square frames are not cropped
    for row, (path, _) in zip(stored[:, 0], world.samples, strict=True):
        expected = torch.zeros_like(row)
        for view in read_clip(world.folder / path, sampler="uniform", views=2):
            for left in (0, 4, 8):
                frames = model.encode_image(uncropped(view)[..., 4:36, left : left + 32])
                expected += (frames / frames.norm(dim=-1, keepdim=True)).mean(dim=0)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_unreadable_videos_are_counted_on_the_screen(
    world: World, tmp_path: Path, capsys: Captured
) -> None:
    listed = (world.folder / "seen_test.csv").read_text() + "gone.mp4,0\n"
    (tmp_path / "list.csv").write_text(listed)
    arguments = world.evaluate_flags(tmp_path / "out")
    arguments[arguments.index("--annotations") + 1] = str(tmp_path / "list.csv")
    assert cli.main([*arguments, "--allow-missing-videos"]) == 0
    assert "1 video that can't be read, counted as wrong:" in capsys.readouterr().err
    assert results(tmp_path / "out")["results"][0]["splits"][0]["clips"] == 11
    assert cli.main([*arguments, "--allow-missing-videos", "--leave-out-broken"]) == 0
    assert "1 video that can't be read, not counted:" in capsys.readouterr().err
    assert results(tmp_path / "out")["results"][0]["splits"][0]["clips"] == 10


def test_the_folder_without_out_is_one_for_each_setting(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = world.evaluate_flags(tmp_path)
    place = arguments.index("--out")
    del arguments[place : place + 2]
    for extra in ([], ["--views", "1"], ["--json"]):
        assert cli.main([*arguments, *extra]) == 0
    folders = sorted((tmp_path / "openvclip-results").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("seen_test-") for folder in folders)
