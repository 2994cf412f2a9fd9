"""``openvclip calibrate`` stores what ``VideoCLIP.calibrate`` chooses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import openvclip
from examples.shapes.model import MEAN, STD, create_model
from examples.shapes.world import TEMPLATES, class_names
from openvclip import cli
from openvclip.checkpoints import read_contract
from openvclip.video import Sampling
from openvclip.video.transforms import build
from tests.helpers import REPO, assert_same_state
from tests.world import World

CONFIG = REPO / "examples" / "shapes" / "shapes-clip.json"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    openvclip.VideoCLIP(
        *create_model(),
        sampling=Sampling(num_frames=2, views=1, sampler="uniform"),
        transform=build("clip", 32, mean=MEAN, std=STD),
        templates=TEMPLATES[:1],
    ).save_pretrained(folder, config=str(CONFIG))
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def write_list(world: World, path: Path) -> tuple[list[str], list[str]]:
    """A list with the class names; returns the paths and the names."""
    names = class_names("seen")
    rows = [(file, names[index]) for file, index in world.samples]
    path.write_text("".join(f"{file},{name}\n" for file, name in rows))
    return [str(world.folder / file) for file, _ in rows], [name for _, name in rows]


def test_a_labelled_list_gives_what_python_gives(
    model: Path, world: World, tmp_path: Path, capsys: Captured
) -> None:
    paths, names = write_list(world, tmp_path / "list.csv")
    labels = sorted(set(names))[1:]  # the videos of one class are none of the labels
    targets = [name if name in labels else None for name in names]
    clip = openvclip.VideoCLIP.from_pretrained(model)
    weights = model / "open_clip_model.safetensors"
    before = openvclip.load_checkpoint(weights)
    expected = clip.calibrate(paths, labels, targets, keep=0.6)
    words = [str(model), str(world.folder), "--annotations", str(tmp_path / "list.csv")]
    words += ["--labels", *labels, "--keep", "0.6", "--device", "cpu"]
    assert cli.main(["calibrate", *words]) == 0
    shown = capsys.readouterr().out
    again = openvclip.VideoCLIP.from_pretrained(model)
    for stored in (again.confidence, read_contract(weights).confidence):  # type: ignore[union-attr]
        assert stored is not None
        assert stored.temperature == pytest.approx(expected.temperature, rel=1e-4)
        assert stored.threshold == pytest.approx(expected.threshold, rel=1e-4)
        assert (stored.score, stored.keep, stored.clips) == ("cosine", 0.6, expected.clips)
    assert_same_state(openvclip.load_checkpoint(weights), before)
    outside = targets.count(None)
    assert f"{len(paths) - outside} of the labels, {outside} of none of the labels" in shown
    answers = again.classify(paths, labels)
    kept = [not a.rejected for a, t in zip(answers, targets, strict=True) if t is not None]
    assert f"kept         {sum(kept) / len(kept):.1%} of" in shown
    lost = [a.rejected for a, t in zip(answers, targets, strict=True) if t is None]
    assert f"rejected     {sum(lost) / len(lost):.1%} of" in shown


def test_class_folders_and_no_labels_at_all(
    model: Path, world: World, tmp_path: Path, capsys: Captured
) -> None:
    for file, index in world.samples[:6]:
        folder = tmp_path / "videos" / class_names("seen")[index]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(world.folder / file, folder)
    videos = str(tmp_path / "videos")
    base = ["calibrate", str(model), videos, "--keep", "0.5", "--device", "cpu"]
    broken = folder / "broken.mp4"
    broken.write_bytes(b"no video")
    assert cli.main(["calibrate", str(model), str(broken), "--labels", "a", "b"]) == 2
    assert f"None of the 1 videos can be read: {broken}" in capsys.readouterr().err
    assert read_contract(model).confidence is None  # type: ignore[union-attr]
    assert cli.main([*base, "--class-folders"]) == 0
    shown = capsys.readouterr()
    assert "videos       6 of the labels" in shown.out
    assert "temperature" in shown.out
    assert f"1 video that can't be read, left out:\n  {broken}" in shown.err
    broken.unlink()
    by_folder = read_contract(model)
    assert cli.main([*base, "--labels", "a star", "a tree"]) == 0
    assert "6 without known labels" in capsys.readouterr().out
    contract = read_contract(model)
    assert contract is not None and by_folder is not None  # noqa: PT018
    assert contract.confidence is not None
    assert (contract.confidence.temperature, contract.confidence.clips) == (1.0, 6)
    assert contract.difference(by_folder) is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["{model}", "{videos}"], "The labels are not known"),
        (["{model}/openvclip.json", "{videos}", "--labels", "a", "b"], "is no folder"),
        (["{model}", "{videos}", "--labels", "a", "b", "--keep", "2"], "keep=2.0"),
        (["{model}", "{videos}", "--labels", "a", "b", "--class-folders"], "No video has one of"),
        (["{model}", "{videos}/none", "--labels", "a", "b"], "no such file"),
        (["{model}", "{videos}", "{videos}", "--annotations", "{list}"], "videos of one folder"),
    ],
)
def test_what_does_not_fit_is_told_before_the_model_is_loaded(
    saved: Path,
    world: World,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    text: str,
) -> None:
    write_list(world, tmp_path / "list.csv")
    monkeypatch.setattr(
        openvclip.VideoCLIP, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    places = {"model": saved, "videos": world.folder, "list": tmp_path / "list.csv"}
    assert cli.main(["calibrate", *(word.format(**places) for word in words)]) == 2
    assert text in capsys.readouterr().err
