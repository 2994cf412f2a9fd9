"""``examples/finetune.py --objective contrastive``: from captions to a model for the search."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples import finetune
from openvclip.checkpoints import load_checkpoint
from openvclip.errors import AnnotationError, VideoNotFoundError
from openvclip.evaluation import retrieval_metrics
from openvclip.models import VideoCLIP
from openvclip.training.captions import CaptionedVideos, find_captioned
from openvclip.training.pairs import PairEncoder
from openvclip.video import Sampling, VideoDataset, read_clip
from tests.examples.test_finetune_resume import terminated_at
from tests.examples.tiny_videos import model_flags, write_videos
from tests.helpers import REPO, assert_same_state

CAPTIONS = {
    "0": ["a red star that is sliding", 'a "star", sliding', "one star"],
    "1": ["a heart is resting"],
    "2": ["a cross turns, and turns"],
    "3": ["the heart rests", "a green heart"],
    "4": ["a star climbs"],
    "5": ["a heart is resting"],  # of two videos
    "6": ["a ring"],
    "7": ["a tree", "a tree bounces"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos with captions, and one without."""
    folder = tmp_path_factory.mktemp("world")
    write_videos(folder, 9)
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        for name, texts in CAPTIONS.items():
            writer.writerows([f"{name}.mp4", text] for text in texts)
    return folder


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    """Arguments of a run of 4 steps in 2 epochs: 2 videos at a time, 4 in a step."""
    return [
        *(*model_flags(), "--device", "cpu", "--objective", "contrastive"),
        *("--annotations", str(folder / "captions.csv"), "--videos", str(folder)),
        *("--out", str(folder / out), "--num-workers", "0", "--epochs", "2"),
        *("--warmup-epochs", "1", "--batch-size", "4", "--per-device-batch", "2"),
        *("--frames", "3", "--sampling-rate", "3", "--lr", "1e-3", "--log-every", "1"),
        *more,
    ]


def lines_of(out: Path, having: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "lr", "alpha", "val_text_to_video_R1", "val_video_to_text_R1")
    return [{k: line[k] for k in names if k in line} for line in lines if having in line]


@pytest.fixture(scope="module")
def finished(world: Path) -> tuple[Path, str]:
    """The folder and the output of a run with validation."""
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: said.append("\n".join(map(str, words))))
        finetune.main(arguments(world, "run", "--val-annotations", str(world / "captions.csv")))
    return world / "run", "\n".join(said)


def test_the_folder_of_a_run_is_a_model_for_sentences(
    world: Path, finished: tuple[Path, str]
) -> None:
    out, said = finished
    contract = json.loads((out / "openvclip.json").read_text())
    assert contract["templates"] == ["{}"]
    assert contract["pooling"] == "unit_frames"
    assert contract["lam"] == 0.5
    assert not (out / "classes.txt").exists()
    card = (out / "README.md").read_text()
    for text in ("| objective | contrastive |", "| captions | 12 |", "| videos | 8 |"):
        assert text in card
    assert f"openvclip index FOLDER -o library.ovx --model {out}" in said
    assert "openvclip search library.ovx TEXT" in card
    assert "predict" not in said
    clip = VideoCLIP.from_pretrained(out, device="cpu")
    learner = PairEncoder(clip.model, clip.tokenizer)
    videos = [clip.encode_video(world / f"{name}.mp4") for name in CAPTIONS]
    texts = learner(None, learner.tokens(CAPTIONS["0"]))[1].detach()
    cosines = texts @ videos[0].flatten() / videos[0].norm()
    expected = clip.encode_text(CAPTIONS["0"]) @ videos[0].flatten() / videos[0].norm()
    assert cosines.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_recall_on_validation_pairs_is_logged_and_on_the_card(
    world: Path, finished: tuple[Path, str]
) -> None:
    out, _ = finished
    measured = lines_of(out, "val_text_to_video_R1")
    assert [line["step"] for line in measured] == [2, 4]
    card = (out / "README.md").read_text()
    clip = VideoCLIP.from_pretrained(out, device="cpu")
    counts = [len(texts) for texts in CAPTIONS.values()]
    learner = PairEncoder(clip.model, clip.tokenizer)
    encoded = []
    for name in CAPTIONS:
        sampling = Sampling(num_frames=3, sampling_rate=3, sampler="released")
        path = world / f"{name}.mp4"
        pixels = read_clip(path, **vars(sampling), transform=clip.transform)[0]
        encoded.append(learner(pixels[None], None)[0][0].detach())
    captions = [text for texts in CAPTIONS.values() for text in texts]
    texts = learner(None, learner.tokens(captions))[1].detach()
    metrics = retrieval_metrics(texts @ torch.stack(encoded).T, counts)
    for direction, values in metrics.items():
        name = f"{direction} R1".replace("_", " ")
        assert f"| {name}, final weights | {values['R1']:.1f} % |" in card


def test_stopped_and_gone_on_with_is_the_run_that_never_stopped(
    world: Path, finished: tuple[Path, str]
) -> None:
    out, _ = finished
    more = ["--val-annotations", str(world / "captions.csv")]
    with terminated_at(3), pytest.raises(SystemExit):
        finetune.main(arguments(world, "again", *more, "--num-workers", "1"))
    finetune.main(arguments(world, "again", *more))
    for name in ("finetuned", "averaged", "final"):
        one, other = (load_checkpoint(world / r / f"{name}.safetensors") for r in ("run", "again"))
        assert_same_state(one, other)
    assert lines_of(out, "step") == lines_of(world / "again", "step")


def test_each_video_has_one_caption_in_an_epoch_from_the_seed_and_the_epoch(world: Path) -> None:
    paths, captions, _ = find_captioned(world / "captions.csv", world)
    assert captions == list(CAPTIONS.values())

    def drawn(seed: int, epoch: int, order: Callable[[range], object] = list) -> dict[str, str]:
        samples = [(path, i) for i, path in enumerate(paths)]
        one = Sampling(num_frames=1, sampler="uniform")
        files = VideoDataset(samples, world, transform=None, sampling=one, seed=seed)
        videos = CaptionedVideos(files, captions)
        videos.set_epoch(epoch)
        items = [videos[i] for i in order(range(len(videos)))]  # type: ignore[attr-defined]
        return {Path(path).stem: caption for _, caption, path in items}

    epochs = [drawn(0, epoch) for epoch in range(8)]
    assert all(caption in CAPTIONS[name] for epoch in epochs for name, caption in epoch.items())
    assert {epoch["0"] for epoch in epochs} == set(CAPTIONS["0"])  # all captions have their turn
    assert drawn(0, 5, lambda indices: reversed(indices)) == epochs[5]
    assert [drawn(1, epoch)["0"] for epoch in range(8)] != [epoch["0"] for epoch in epochs]


def test_captions_without_videos_are_counted_and_named(world: Path, tmp_path: Path) -> None:
    table = "video_id,sentence,more\n0,a star,x\nlost,a lion,y\nlost,a cat,z\n7,a tree,\n"
    (tmp_path / "c.csv").write_text(table)
    found = find_captioned(tmp_path / "c.csv", world)
    assert found.paths == ["0.mp4", "7.mp4"]
    (warning,) = found.warnings
    assert warning.startswith("1 of 3 videos, with 2 of 4 captions, are not in ")
    assert warning.endswith("are left out: lost.")
    (tmp_path / "train.csv").write_text("video_id\n7\nbare\n")
    chosen = find_captioned(tmp_path / "c.csv", world, tmp_path / "train.csv")
    assert (chosen.paths, chosen.captions) == (["7.mp4"], [["a tree"]])
    assert chosen.warnings[0].startswith("1 of 2 videos of ")
    (tmp_path / "train.csv").write_text("nothing\n")
    with pytest.raises(AnnotationError, match="none of its 1 videos has captions"):
        find_captioned(tmp_path / "c.csv", world, tmp_path / "train.csv")
    (tmp_path / "c.csv").write_text("lost.mp4,a lion\n")
    with pytest.raises(VideoNotFoundError, match="None of the 1 videos of"):
        find_captioned(tmp_path / "c.csv", world)
    (tmp_path / "c.csv").write_text("0.mp4,a lion\n0.mp4\n")
    with pytest.raises(AnnotationError, match=r"c\.csv, line 2: '0\.mp4' lacks"):
        find_captioned(tmp_path / "c.csv", world)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--classes", "c.txt"), "--classes has no effect with --objective contrastive"),
        (("--template", "a {}."), "--template has no effect with --objective contrastive"),
        (("--zero-shot-classes", "c.txt"), "--zero-shot-classes has no effect"),
        (("--shards", "{0..1}.tar"), "--objective contrastive reads captions and not --shards"),
        (("--method", "vita"), "--method vita learns prompts for class names"),
        (("--batch-size", "1"), "--batch-size 1: --objective contrastive compares"),
        (("--batch-size", "8", "--share", "0.1"), "--share 0.1 of --batch-size 8 is one video"),
        (("--averages-per-epoch", "0"), "--averages-per-epoch: 0: expected at least 1"),
        (("--val-list", "v.txt"), "--val-list has no effect without --val-annotations"),
        (("--objective", "classification", "--train-list", "v.txt"), "--train-list has no effect"),
    ],
)
def test_what_does_not_go_with_captions_is_refused(
    world: Path, more: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(world, "never", *more)
    if "--shards" in more:
        place = words.index("--annotations")
        del words[place : place + 4]
    with pytest.raises(SystemExit):
        finetune.parse_arguments(words)
    assert text in " ".join(capsys.readouterr().err.split())


def test_the_commands_of_the_page_are_understood() -> None:
    page = (REPO / "docs" / "fine-tune-retrieval.md").read_text(encoding="utf-8")
    block = page.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    commands = [shlex.split(line) for line in block.splitlines() if line.strip()]
    assert len(commands) == 2
    for words in commands:
        start = words.index("examples/finetune.py") + 1
        assert finetune.parse_arguments(words[start:]).objective == "contrastive"


def test_one_video_is_too_few(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.csv").write_text("0.mp4,a star\n")
    with pytest.raises(SystemExit):
        finetune.main(arguments(world, "one", "--annotations", str(tmp_path / "one.csv")))
    assert "needs at least 2" in capsys.readouterr().err
