"""The trainer's command line: what it reads, what it leaves, what it says of bad input."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch

from examples import finetune
from examples.finetune import Recipe
from examples.shapes.model import WEIGHTS, create_model
from openvclip.checkpoints import load_checkpoint
from openvclip.cli import main as cli
from tests.examples.tiny_videos import command, write_shards, write_videos
from tests.forked import run_by_path, started


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
    assert "4 videos a step (one device, 2 at a time, 2 accumulation steps)" in text
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
    assert "| frame by frame | False |" in card
    assert "λ = 0.25 weighs the original" in card
    assert f"| top1, last weights | {100 * measured[-1]['val_top1']:.1f} % |" in card
    for part in ("| videos | 9 |", "| iwr weight | 0.5 |", "| torch |", "averaged.safetensors"):
        assert part in card


def test_vifi_trains_the_text_tower_on_frames_alone(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.main(command(world, "vifi", "--method", "vifi", "--epochs", "2"))
    # Report 37: the card said "frame by frame: False", and the run ended without a command.
    card, said = (world / "vifi" / "README.md").read_text(), capsys.readouterr().out
    assert "| frame by frame | True |" in card
    (line,) = (line for line in said.splitlines() if "openvclip predict VIDEO" in line)
    assert line.strip() in card
    words = shlex.split(line.replace("VIDEO", str(world / "0.mp4"), 1))
    cli([*words[1:], "--device", "cpu"])
    assert "star sliding" in capsys.readouterr().out
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
    assert "frame_by_frame: stored True, now False" in capsys.readouterr().err


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


@pytest.mark.filterwarnings("ignore::openvclip.errors.LabelWarning")
def test_a_folder_of_transformers_is_a_model(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained with ViFi-CLIP, and tried with the command in its model card."""
    from tests.tiny_transformers import make, save_folder

    save_folder("AltCLIPModel", world / "alt")
    words = command(world, "alt-run", "--model", str(world / "alt"), "--method", "vifi")
    place = words.index("--pretrained")
    finetune.main(words[:place] + words[place + 2 :])
    tuned = load_checkpoint(world / "alt-run" / "final.safetensors", make("AltCLIPModel"))
    original = make("AltCLIPModel").state_dict()
    changed = {n.split(".")[0] for n, v in tuned.items() if not torch.equal(v, original[n])}
    assert changed > {"vision_model", "text_model", "text_projection"}
    card = (world / "alt-run" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("openvclip predict")]
    video = str(next(world.rglob("*.mp4")))
    assert "--pretrained" not in line
    words = shlex.split(line.replace("VIDEO", shlex.quote(video)))
    assert cli([*words[1:], "--top", "1"]) == 0
    assert "%" in capsys.readouterr().out


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
    with started(
        run_by_path, str(tmp_path), "finetune", ["--help"], log=tmp_path / "log"
    ) as process:
        process.join(120)
        text = (tmp_path / "log").read_text()
        assert process.exitcode == 0, text
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in text
    for group in ("model:", "recipe:", "devices and speed:", "output; the same command resumes"):
        assert f"\n{group}" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--out o", "give --annotations (with --videos), or --shards"),
        ("--out o --annotations a", "--annotations needs --videos"),
        ("--out o --shards s", "--shards needs --classes"),
        ("--out o --shards s --classes c --val-annotations v", "needs --val-videos"),
        ("--out o --annotations a --videos r --num-workers -1", "expected at least 0"),
        ("--out o --annotations a --videos r --every 0", "expected at least 1"),
        ("--out o --annotations a --videos r --share 0", "above 0 and at most 1"),
        ("--out o --annotations a --videos r --share 1.5", "above 0 and at most 1"),
        ("--out o --annotations a --videos r --share 0.5 --method swa", "--share"),
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
    assert "class indices and no class names; give the names" in capsys.readouterr().err
