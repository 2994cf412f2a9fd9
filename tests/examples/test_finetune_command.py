"""The trainer's command line: what it reads, what it leaves, what it says of bad input."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from examples import finetune
from examples.finetune import Recipe
from examples.shapes.model import WEIGHTS, create_model
from openvclip.checkpoints import load_checkpoint
from openvclip.errors import AnnotationError, UsageError, VideoError
from openvclip.processes import Processes
from openvclip.training import shards
from openvclip.training.batches import VideoBatches, class_warnings
from openvclip.training.shards import ShardBatches, class_indices, find_shards, read_index
from openvclip.video import Sampling, VideoDataset, transforms
from tests.examples.forked import started
from tests.examples.tiny_videos import CLASSES, command, write_shards, write_videos
from tests.helpers import REPO


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_videos(folder, 9)
    write_shards(folder, 9, 4)
    return folder


def _pattern(folder: Path) -> str:
    return str(folder / "part-{000..003}.tar")


def test_a_run_leaves_weights_numbers_and_a_card(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "unseen.txt").write_text("Heart_Resting\nlion roaring\n")
    validated = ["--val-annotations", str(world / "train.csv"), "--val-videos", str(world)]
    other = ["--zero-shot-classes", str(world / "unseen.txt"), "--lam", "0.25"]
    finetune.main(command(world, "run", *validated, *other))
    text, out = capsys.readouterr().out, world / "run"
    assert "4 videos a step (one device, 2 at a time, 2 times added up)" in text
    assert "1 of 3 classes have no videos: cross turning." in text
    assert "1 of 2 zero-shot classes are trained on" in text
    assert "Heart_Resting" in text
    assert "final.safetensors" in text
    clip = create_model(WEIGHTS)[0].state_dict()
    average, final = (load_checkpoint(out / f"{n}.safetensors") for n in ("averaged", "final"))
    for name, value in final.items():
        torch.testing.assert_close(value, 0.25 * clip[name] + 0.75 * average[name])
    assert any(not torch.equal(average[name], clip[name]) for name in clip)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    measured = [line for line in lines if "val_top1" in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    assert list((out / "tensorboard").iterdir())
    card = (out / "README.md").read_text()
    assert "λ = 0.25 weighs the original" in card
    assert f"| top1, last weights | {100 * measured[-1]['val_top1']:.1f} % |" in card
    for part in ("| videos | 9 |", "| iwr weight | 0.5 |", "| torch |", "averaged.safetensors"):
        assert part in card


def test_vifi_trains_the_text_tower_on_frames_alone(world: Path) -> None:
    finetune.main(command(world, "vifi", "--method", "vifi", "--epochs", "2"))
    clip = create_model(WEIGHTS)[0].state_dict()
    last = load_checkpoint(world / "vifi" / "finetuned.safetensors")
    assert not torch.equal(last["text_projection"], clip["text_projection"])
    assert torch.equal(last["token_embedding.weight"], clip["token_embedding.weight"])
    assert not (world / "vifi" / "averaged.safetensors").exists()


def test_frame_by_frame_leaves_the_attention_as_it_is(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: torch.nn.Module) -> None:
        raise AssertionError("expanded")

    monkeypatch.setattr("openvclip.expand_temporal_attention", refuse)
    arguments = command(world, "frames", "--method", "finetune", "--epochs", "1")
    with pytest.raises(AssertionError, match="expanded"):
        finetune.main(arguments)
    finetune.main([*arguments, "--frame-by-frame"])
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        finetune.main(arguments)
    assert "frame_by_frame: there True, now False" in capsys.readouterr().err


def test_a_hugging_face_clip_keeps_its_names(world: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    words = {"vocab_size": 520, "bos_token_id": 518, "eos_token_id": 519}
    config = CLIPConfig(
        text_config={**sizes, **words, "max_position_embeddings": 32},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model, folder = CLIPModel(config), world / "hugging-face"
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    _write_tokenizer(folder)
    assert CLIPTokenizer.from_pretrained(folder)("star").input_ids[-1] == 519
    finetune.main(command(world, "hf", "--hf", str(folder), "--checkpointing", "--epochs", "2"))
    final = load_checkpoint_as_it_is(world / "hf" / "final.safetensors")
    again = CLIPModel.from_pretrained(folder)
    again.load_state_dict(final)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, final[n])}
    assert changed
    assert all(n.startswith(("vision_model", "visual_proj", "logit_scale")) for n in changed)


def load_checkpoint_as_it_is(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _write_tokenizer(folder: Path) -> None:
    """A vocabulary of single bytes, as CLIP's begins."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer  # noqa: F401

    letters = [chr(33 + i) for i in range(259)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def test_help_of_the_file_started_by_its_path(tmp_path: Path) -> None:
    with started(_start_by_path, str(tmp_path), ["--help"], log=tmp_path / "log") as process:
        process.join(120)
        text = (tmp_path / "log").read_text()
        assert process.exitcode == 0, text
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in text
    for group in ("model:", "recipe:", "devices and speed:", "output; the same command goes on"):
        assert f"\n{group}" in text


def _start_by_path(folder: str, arguments: list[str]) -> None:
    """``python .../examples/finetune.py`` in a folder from where ``examples`` is not found."""
    os.chdir(folder)
    script = REPO / "examples" / "finetune.py"
    sys.path[:] = [str(script.parent), *(one for one in sys.path if one not in ("", str(REPO)))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        del sys.modules[name]
    assert importlib.util.find_spec("examples") is None
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--out o", "give --annotations (with --videos), or --shards"),
        ("--out o --annotations a", "--annotations needs --videos"),
        ("--out o --shards s", "--shards needs --classes"),
        ("--out o --shards s --classes c --val-annotations v", "needs --val-videos"),
        ("--out o --annotations a --videos r --num-workers -1", "expected at least 0"),
        ("--out o --annotations a --videos r --every 0", "expected at least 1"),
    ],
)
def test_options_that_do_not_fit(
    arguments: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        finetune.parse_arguments(arguments.split())
    assert text in capsys.readouterr().err


def test_bad_input_ends_with_one_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "numbered.csv").write_text("0.mp4,0\n")
    arguments = command(world, "bad", "--annotations", str(world / "numbered.csv"))
    place = arguments.index("--classes")
    with pytest.raises(SystemExit) as ended:
        finetune.main(arguments[:place] + arguments[place + 2 :])
    assert ended.value.code == 1
    assert "numbers its classes: give their names with --classes" in capsys.readouterr().err


def test_class_warnings() -> None:
    names = ["Baby Crawling", "archery", "yoga"]
    assert class_warnings([0, 2, 0], names) == ["1 of 3 classes have no videos: archery."]
    (text,) = class_warnings([0, 1, 2], names, ["baby_crawling", "juggling", "Yoga"])
    assert text.startswith("2 of 3 zero-shot classes are trained on")
    assert text.endswith("baby_crawling, Yoga.")
    assert class_warnings([0, 1, 2], names, ["juggling"]) == []


# --- the order of files ------------------------------------------------------------------------


def _files(
    processes: Processes, micro_batch: int, epoch: int = 0, first: int = 0
) -> list[list[int]]:
    dataset = VideoDataset([(f"{i}.mp4", i) for i in range(50)], transform=None)
    found = VideoBatches(
        dataset, batch_size=12, micro_batch=micro_batch, processes=processes, seed=4
    )
    found.set_epoch(epoch, first)
    assert found.steps == 4
    assert found.accumulate == -(-12 // processes.world_size // micro_batch)
    return list(found._order)


def test_a_step_sees_the_same_files_however_it_is_shared() -> None:
    alone = _files(Processes(), 12)
    assert len({index for batch in alone for index in batch}) == 48
    for world_size, micro in ((1, 5), (2, 6), (3, 2), (4, 2)):
        parts = [_files(Processes(rank, world_size), micro) for rank in range(world_size)]
        per_step = -(-12 // world_size // micro)
        for step, batch in enumerate(alone):
            own = slice(step * per_step, (step + 1) * per_step)
            seen = [index for part in parts for one in part[own] for index in one]
            assert sorted(seen) == sorted(batch)
    assert _files(Processes(), 12, first=3) == alone[3:]
    assert _files(Processes(), 12, epoch=1) != alone


# --- shards ------------------------------------------------------------------------------------


def _batches(
    pattern: str,
    *,
    num_workers: int = 0,
    processes: Processes | None = None,
    first: int = 0,
    epoch: int = 0,
) -> list[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    sizes = {shard: len(labels) for shard, labels in read_index(find_shards(pattern), None).items()}
    found = ShardBatches(
        sizes,
        CLASSES,
        batch_size=4,
        micro_batch=2,
        transform=transforms.build("train", 32),
        sampling=Sampling(num_frames=2, sampling_rate=3, sampler="dense"),
        num_workers=num_workers,
        processes=processes,
    )
    found.set_epoch(epoch, first)
    return list(found)


def test_shards_in_one_order_for_any_number_of_workers(world: Path) -> None:
    expected = _batches(_pattern(world))
    names = [name for *_, batch in expected for name in batch]
    assert len(names) == 8
    for name, label in zip(names, torch.cat([label for _, label, _ in expected]), strict=True):
        assert int(label) == int(name.rsplit("/", 1)[1]) % 2
    for workers in (1, 2):
        for first in (0, 1):
            given = _batches(_pattern(world), num_workers=workers, first=first)
            assert [batch[2] for batch in given] == [batch[2] for batch in expected[2 * first :]]
            for one, other in zip(given, expected[2 * first :], strict=True):
                assert torch.equal(one[0], other[0])
    other = [batch[2] for batch in _batches(_pattern(world), epoch=1)]
    assert other != [batch[2] for batch in expected]
    parts = [_batches(_pattern(world), processes=Processes(rank, 2)) for rank in range(2)]
    shards_of = [{n.rsplit("/", 1)[0] for *_, b in part for n in b} for part in parts]
    assert not shards_of[0] & shards_of[1]


def test_a_broken_video_in_a_shard_is_replaced_by_the_next(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(5):
        (tmp_path / f"{index}.mp4").write_bytes((world / f"{index}.mp4").read_bytes())
    pattern = write_shards(tmp_path, 5, 1)
    first, broken, third, fourth = (name for *_, names in _batches(pattern) for name in names)
    (tmp_path / f"{broken.rsplit('/', 1)[1]}.mp4").write_bytes(b"no video")
    found = _batches(write_shards(tmp_path, 5, 1))
    assert [name for *_, names in found for name in names] == [first, third, third, fourth]
    assert f"{broken}: " in caplog.text
    for index in range(5):
        (tmp_path / f"{index}.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"part-000\.tar/"):
        _batches(write_shards(tmp_path, 5, 1))


def test_an_index_stands_for_the_shards(world: Path, tmp_path: Path) -> None:
    index, told = tmp_path / "index.json", list[str]()
    shards.main([_pattern(world), "--out", str(index)], told.append)
    assert told == [f"4 shards with 9 videos in {index}."]
    found = find_shards(_pattern(world))
    assert read_index(found, index) == read_index(found, None)
    labels = [
        label for own in class_indices(read_index(found, index), CLASSES).values() for label in own
    ]
    assert sorted(labels) == [0] * 5 + [1] * 4
    remote = ["https://example.org/a-000.tar"]
    with pytest.raises(AnnotationError, match="need --shard-index FILE"):
        read_index(remote, None)
    with pytest.raises(AnnotationError, match=r"lacks 1 of 1 shards \(https://example"):
        read_index(remote, index)
    index.write_text("[1]")
    with pytest.raises(AnnotationError, match="is no index of shards"):
        read_index(found, index)


def test_shards_that_do_not_fit(world: Path, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"means 6 files, of which 2 don't exist .*004\.tar"):
        find_shards(str(world / "part-{000..005}.tar"))
    with pytest.raises(AnnotationError, match="more than once"):
        find_shards(str(world / "part-{000,000}.tar"))
    (tmp_path / "x.tar").write_bytes(b"no tar file")
    with pytest.raises(AnnotationError, match="can't be read as a shard"):
        read_index([str(tmp_path / "x.tar")], None)
    with pytest.raises(AnnotationError, match="unknown class 'star sliding'"):
        class_indices(read_index(find_shards(_pattern(world)), None), ["another"])
    with pytest.raises(UsageError, match=r"make 4 streams a process; choose 1, 2, 4 workers"):
        _batches(_pattern(world), num_workers=3)
    with pytest.raises(UsageError, match="too few for 5 processes"):
        _batches(_pattern(world), processes=Processes(0, 5))
