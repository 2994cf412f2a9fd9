"""``examples/evaluate.py``: its rows are those of ``openvclip evaluate``, the paper's beside."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from examples import evaluate
from examples.shapes.model import MEAN, STD, WEIGHTS, create_model
from openvclip import VideoCLIP, cli, expand_temporal_attention
from openvclip.checkpoints import Base, load_checkpoint, save_checkpoint
from openvclip.video import Sampling, class_names, protocols
from openvclip.video.protocols import Split
from openvclip.video.transforms import build
from openvclip.weights import weights_hash
from tests.examples.tiny_videos import MODEL, write_videos

NAMES = [name for name in class_names("kinetics400") if "," not in name][:12]


@pytest.fixture(autouse=True)
def few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Kinetics-400, so that their 28 texts are soon encoded."""
    monkeypatch.setattr(evaluate, "class_names", {"kinetics400": NAMES}.__getitem__)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos, and a list that gives them labels of Kinetics-400."""
    folder = tmp_path_factory.mktemp("world")
    write_videos(folder, 6)
    lines = [f"{index}.mp4,{name}" for index, name in enumerate(NAMES[:6])]
    (folder / "k400.csv").write_text("\n".join(lines) + "\n")
    (folder / "k400.txt").write_text("\n".join(NAMES) + "\n")
    state = create_model()[0].state_dict()
    moved = {n: v * 1.02 if n.startswith("visual.transformer") else v for n, v in state.items()}
    save_checkpoint(moved, folder / "tuned.safetensors")
    return folder


def flags(out: Path, *more: str) -> list[str]:
    model = [
        "--model",
        str(MODEL),
        "--pretrained",
        str(WEIGHTS),
        "--device",
        "cpu",
        "--num-workers",
        "0",
    ]
    return [*model, "--out", str(out), *more]


def results(path: Path) -> Any:
    return json.loads(path.read_text())["results"]


@pytest.mark.parametrize("tuned", [False, True])
def test_the_same_as_the_command(
    world: Path, tmp_path: Path, tuned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = ["--checkpoint", str(world / "tuned.safetensors"), "--lam", "0.5"] if tuned else []
    given = ["--kinetics400", str(world / "k400.csv"), str(world)]
    evaluate.main(flags(tmp_path / "example", *given, *checkpoint))
    shown = capsys.readouterr().out
    assert (tmp_path / "example" / "table.md").read_text() in shown
    assert f"paper, {'Open-VCLIP' if tuned else 'CLIP'}" in shown
    listed = ["--annotations", str(world / "k400.csv"), "--classes", str(world / "k400.txt")]
    command = flags(tmp_path / "command", *listed, "--videos", str(world), *checkpoint)
    assert cli.main(["evaluate", *command]) == 0
    (own,) = json.loads((tmp_path / "example" / "results.json").read_text()).values()
    (entry,), (expected,) = own["results"], results(tmp_path / "command" / "results.json")
    assert [entry["top1"], entry["top5"]] == [expected["top1"], expected["top5"]]
    assert entry["lam"] == expected["lam"] == (0.5 if tuned else None)


def test_a_checkpoint_with_a_contract(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as VideoCLIP gives for the same file, and as its folder alone."""
    model, tokenizer = create_model()
    expand_temporal_attention(model, window=2, boundary="mask")
    state = load_checkpoint(world / "tuned.safetensors")
    model.load_state_dict(state)
    frames, pixels = Sampling(4, 1, views=1), build("clip", 32, mean=MEAN, std=STD)
    clip = VideoCLIP(
        model, tokenizer, sampling=frames, transform=pixels, templates=["{}"], pooling="frames"
    )
    base = Base("shapes-clip", WEIGHTS.name, weights_hash(create_model()[0].state_dict()))
    clip.save_pretrained(tmp_path / "run", base=base, config=str(MODEL))
    right = [clip.classify(world / f"{i}.mp4", NAMES).label == NAMES[i] for i in range(6)]
    given = ["--kinetics400", str(world / "k400.csv"), str(world), "--device", "cpu"]
    weights = str(tmp_path / "run" / "open_clip_model.safetensors")
    by_file = [*given, "--num-workers", "0", "--model", str(MODEL), "--checkpoint", weights]
    by_folder = [*given, "--num-workers", "0", "--model", str(tmp_path / "run")]
    for number, words in enumerate((by_file, by_folder)):
        out = tmp_path / str(number)
        evaluate.main([*words, "--out", str(out)])
        (own,) = json.loads((out / "results.json").read_text()).values()
        assert own["results"][0]["top1"]["mean"] == pytest.approx(mean(right))
        assert "paper, Open-VCLIP" in (out / "table.md").read_text()
    with pytest.raises(SystemExit, match="--model ViT-B-32 contradicts the contract"):
        evaluate.main([*by_file, "--out", str(tmp_path / "no"), "--model", "ViT-B-32"])
    with pytest.raises(SystemExit, match=r"shapes-clip\.safetensors"):  # is not in this folder
        evaluate.main([*by_file, "--out", str(tmp_path / "no"), "--lam", "0.5"])


def test_all_protocols_of_a_data_set_with_the_papers_figures(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the few videos that are here, by splits of known accuracy."""
    names = ["star sliding", "heart resting"]

    def few(name: str, *, annotations: str, videos: str) -> list[Split]:
        assert (annotations, videos) == ("lists", str(world))
        number = 3 if name.endswith(("ep3", "600")) else 1
        # Videos 0 to 3 are of the first class, videos 4 and 5 of the second.
        one = Split("", names[:1], [(f"{index}.mp4", 0) for index in range(4)], name)
        two = Split("", names, [(f"{index}.mp4", int(index > 3)) for index in range(2, 6)], name)
        splits = [one, one, two][:number]
        return [split._replace(name=f"{name}-{i}") for i, split in enumerate(splits)]

    monkeypatch.setattr(protocols, "load", few)
    monkeypatch.setattr(evaluate, "published", lambda method, model, column: f"{method} {column}")
    given = [
        part for name in ("ucf101", "kinetics600") for part in (f"--{name}", "lists", str(world))
    ]
    evaluate.main(flags(tmp_path, *given, "--published", "L2"))
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["protocol", "videos", "here", "paper, L2"]
    assert [row[0] for row in rows[2:]] == [
        *("ucf101-ep1", "ucf101-ep2", "ucf101-ep3", "kinetics600", "kinetics600 top-5")
    ]
    measured = json.loads((tmp_path / "results.json").read_text())
    top1 = {
        entry["protocol"]: [split["top1"] for split in entry["splits"]]
        for data_set in measured.values()
        for entry in data_set["results"]
    }
    for name, videos, here, paper in rows[2:]:
        assert paper == f"L2 {name}"
        assert videos == ("12" if name.endswith(("ep3", "600", "top-5")) else "4")
        # With one class every answer is right; with two classes top-5 is always right.
        single = name.endswith(("ep1", "ep2"))
        if single:
            assert here == "100.0"
        elif name.endswith("top-5"):
            assert here == "100.0 ± 0.0"
        else:
            assert here == f"{100 * mean(top1[name]):.1f} ± {100 * stdev(top1[name]):.1f}"
            assert top1[name][:2] == [1.0, 1.0]
    assert top1["ucf101-ep3"][2] == top1["kinetics600"][2] < 1  # a mean over unlike splits


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([], "give a data set: --ucf101"),
        (["--ucf101", "a", "b", "--lam", "0.5"], "--lam 0.5: expected a weight in [0, 1], with"),
        (
            ["--ucf101", "a", "b", "--checkpoint", "c", "--lam", "2"],
            "--lam 2: expected a weight in [0, 1]",
        ),
        (["--ucf101", "a", "b", "--published", "X-CLIP"], "invalid choice: 'X-CLIP'"),
    ],
)
def test_arguments_that_make_no_sense(
    tmp_path: Path, more: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(flags(tmp_path, *more))
    assert text in capsys.readouterr().err


def test_missing_videos_are_an_error_or_left_out(world: Path, tmp_path: Path) -> None:
    lists = tmp_path / "k400.csv"
    lists.write_text((world / "k400.csv").read_text() + f"gone.mp4,{NAMES[7]}\n")
    given = ["--kinetics400", str(lists), str(world)]
    with pytest.raises(SystemExit, match=r"evaluate\.py: error: 1 of 7 videos are not in"):
        evaluate.main(flags(tmp_path / "a", *given))
    evaluate.main(flags(tmp_path / "b", *given, "--allow-missing-videos", "--leave-out-broken"))
    assert "|      6 |" in (tmp_path / "b" / "table.md").read_text()
