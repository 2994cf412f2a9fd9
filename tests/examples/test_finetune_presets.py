"""Presets of the trainer: the published numbers, a run of each, its evaluation, its lists."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import accuracy, finetune
from examples.shapes.model import WEIGHTS, create_model
from openvclip import prompting
from openvclip.checkpoints import load_checkpoint, save_checkpoint
from openvclip.evaluation import score
from openvclip.training.options import recipe_of, run_of
from openvclip.training.presets import PRESETS
from openvclip.training.recipe import PROMPT_METHODS, Recipe, Run
from openvclip.video import Sampling, VideoDataset, read_clip, transforms
from tests.examples.test_finetune_resume import terminated_at
from tests.examples.tiny_videos import CLASSES, model_flags, write_videos
from tests.helpers import FACTS, SHARED, assert_same_state

SPLITS = SHARED / "data"
ONE_EPOCH = dict.fromkeys(PRESETS, ("--epochs", "1", "--warmup-epochs", "0"))
ONE_EPOCH["vita"] = ("--steps", "2")
ONE_EPOCH["open-vclip"] = ("--epochs", "2", "--warmup-epochs", "1", "--average-after", "1")
ONE_EPOCH["froster"] = ONE_EPOCH["open-vclip"]
TINY_PROMPTS = ("--vision-depth", "2", "--text-depth", "2", "--vision-prompts", "2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_videos(folder, 9)
    save_checkpoint(create_model(WEIGHTS)[0].state_dict(), folder / "start.safetensors")
    for name, kept in (("base", (0, 1)), ("novel", (1, 2))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = [(f"{i}.mp4", CLASSES[kept[i % 2]]) for i in range(4)]
            csv.writer(file).writerows(rows)
    return folder


def _tiny(folder: Path, preset: str, *more: str) -> list[str]:
    """A preset at tiny size, with all else as it sets it."""
    start = ("--start-from", str(folder / "start.safetensors"), *TINY_PROMPTS)
    bridge = start if preset.startswith("bridge") else ()
    data = ("--annotations", str(folder / "train.csv"), "--videos", str(folder))
    return [
        *("--preset", preset, *model_flags(), *data, "--out", str(folder / preset)),
        *("--classes", str(folder / "classes.txt"), "--frames", "3"),
        *(("--sampling-rate", "3") if preset in ("open-vclip", "froster", "vita") else ()),
        *("--batch-size", "4", "--per-device-batch", "4", "--num-workers", "0", "--device", "cpu"),
        *(("--short-side", "36") if preset.startswith(("vifi", "bridge")) else ()),
        *(("--text-prompts", "1") if preset.startswith(("bridge", "vita")) else ()),
        *(*ONE_EPOCH[preset], *bridge, *more),
    ]


def _rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def _settings(preset: str, *more: str) -> tuple[Recipe, Run, Any]:
    where = ["--annotations", "a", "--videos", "b", "--out", "c", "--start-from", "d"]
    args = finetune.parse_arguments([*where, "--preset", preset, *more])
    return recipe_of(args), run_of(args, 1, torch.device("cpu")), args


@pytest.fixture(scope="module")
def facts() -> Any:
    return json.loads((FACTS / "facts.json").read_text())


def test_defaults_are_the_first_preset() -> None:
    assert _settings("open-vclip")[0] == Recipe()
    args = finetune.parse_arguments(["--annotations", "a", "--videos", "b", "--out", "c"])
    assert args.preset == "open-vclip"


@pytest.mark.parametrize(
    ("preset", "part"),
    [
        ("vifi-zero-shot", "zero_shot"),
        ("vifi-supervised", "fully_supervised"),
        ("vifi-few-shot", "few_shot"),
        ("vifi-base-to-novel", "base_to_novel"),
    ],
)
def test_presets_of_vifi_clip_are_the_facts(preset: str, part: str, facts: Any) -> None:
    recipe, run, args = _settings(preset)
    own = facts["vifi_clip"][part]
    assert (recipe.epochs, recipe.lr) == (own["epochs"], own["lr"])
    assert recipe.batch_size == own.get("batch", facts["vifi_clip"]["few_shot"]["batch"])
    said = facts["vifi_clip"]["optimizer"]
    assert said == "AdamW betas (0.9,0.98), weight decay 0.001, 5 warm-up epochs"
    assert (run.betas, recipe.weight_decay, recipe.warmup_epochs) == ((0.9, 0.98), 0.001, 5)
    assert facts["vifi_clip"]["sampling"] == "uniform segments, centre of each"
    assert facts["vifi_clip"]["resize"] == "short side 256, crop 224"
    assert (args.sampler, args.short_side) == ("uniform", 256)
    frames = 16 if part == "fully_supervised" else facts["vifi_clip"]["frames"]
    assert args.frames == frames
    assert args.template == facts["vifi_clip"]["prompt"].replace("{c}", "{}")
    assert (recipe.method, recipe.lam) == ("vifi", 0.0)
    assert recipe.end_lr == pytest.approx(recipe.lr / 100)
    assert run.steps is None


def test_multi_view_testing_is_the_facts(facts: Any) -> None:
    assert facts["vifi_clip"]["fully_supervised"]["eval_views"] == "16 frames, 4x3 views"
    tested = ["--checkpoint", "w", "--annotations", "l", "--videos", "r"]
    args = accuracy.parse_arguments(["--preset", "vifi-supervised", *tested])
    assert (args.frames, args.views, args.crops, args.sampler) == (16, 4, 3, "uniform")
    assert args.short_side is None
    args = accuracy.parse_arguments(["--preset", "vifi-few-shot", *tested])
    assert (args.frames, args.views, args.crops, args.short_side) == (32, 1, 1, 256)
    assert facts["vita_clip"]["views"] == "3x1, softmax mean"
    args = accuracy.parse_arguments(["--preset", "vita", "--prompts", "p", *tested])
    assert (args.frames, args.views, args.crops) == (facts["vita_clip"]["frames"], 3, 1)
    assert args.average == "probabilities"


def test_presets_of_bridge_and_prompt_are_the_facts(facts: Any) -> None:
    said = facts["vifi_clip"]["bridge_and_prompt"]
    for preset, text, part, numbers in (
        (
            "bridge-base-to-novel",
            "base-to-novel 16+16 prompts depth 9/9 lr 4e-2",
            "base_to_novel",
            (16, 16, 9, 9, 4e-2),
        ),
        ("bridge-few-shot", "few-shot 10+10 prompts depth 12/12 lr 8e-3", "few_shot", (10,) * 2),
    ):
        assert text in said
        recipe, run, args = _settings(preset)
        found = (args.vision_prompts, args.text_prompts, args.vision_depth, args.text_depth)
        expected = numbers if len(numbers) == 5 else (10, 10, 12, 12, 8e-3)
        assert (*found, recipe.lr) == expected
        assert recipe.epochs == facts["vifi_clip"][part]["epochs"]
        assert (run.betas, recipe.weight_decay, recipe.warmup_epochs) == ((0.9, 0.98), 0.001, 5)


def test_the_preset_of_froster_is_its_paper() -> None:
    recipe, run, _ = _settings("froster")
    assert (recipe.text_tower, recipe.distill, recipe.lam) == (True, 2.0, 0.0)
    assert (recipe.uses_swa, recipe.uses_iwr) == (True, False)
    assert range(recipe.average_after + 1, recipe.epochs + 1) == range(2, 23)
    same = {"method": "openvclip", "text_tower": False, "distill": 0.0, "lam": 0.5}
    assert dataclasses.replace(recipe, **same) == Recipe()  # all else is Open-VCLIP's
    assert run == _settings("open-vclip")[1]
    with_iwr = _settings("froster", "--method", "openvclip")[0]
    assert (with_iwr.uses_iwr, with_iwr.distill) == (True, 2.0)


def test_the_preset_of_vita_clip_is_the_facts(facts: Any) -> None:
    recipe, run, args = _settings("vita")
    said = facts["vita_clip"]
    assert said["optimizer"] == "AdamW lr 4e-4, weight decay 0.05, cosine, 30k steps, batch 256"
    assert (recipe.lr, recipe.weight_decay, run.steps) == (4e-4, 0.05, 30_000)
    assert (recipe.batch_size, recipe.warmup_epochs, recipe.end_lr) == (256, 0, 0.0)
    assert (args.frames, args.sampling_rate) == (said["frames"], said["sampling_rate"])
    assert said["text_prompts"] == "8 class-specific learned vectors"
    assert said["global_prompts"].startswith("8 per layer")
    assert (args.text_prompts, args.vision_prompts, args.class_prompts) == (8, 8, True)


def test_a_flag_has_the_last_word_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for where in ([], ["--no-class-prompts", "--betas", "0.9", "0.95"]):
        recipe, run, args = _settings("vita", "--lr", "1e-5", *where)
        assert recipe.lr == 1e-5
        assert recipe.weight_decay == 0.05
        assert args.class_prompts != bool(where)
        assert run.betas == ((0.9, 0.95) if where else (0.9, 0.999))
    data = ["--annotations", "a", "--videos", "b", "--out", "c"]
    args = finetune.parse_arguments(["--epochs", "3", *data, "--preset=vifi-few-shot"])
    assert (args.epochs, args.lr) == (3, 2e-6)
    for text, wrong in (
        ("invalid choice: 'vifi'", ["--preset", "vifi"]),
        ("unrecognized arguments: --pres", ["--pres", "vita"]),
        ("--method bridge needs --start-from", ["--preset", "bridge-few-shot"]),
        ("--fsdp can't be used with --method vita", ["--preset", "vita", "--fsdp"]),
        ("--distill 2 can't be used with --fsdp", ["--preset", "froster", "--fsdp"]),
        ("--distill 2 can't be used with --method vita", ["--preset", "vita", "--distill", "2"]),
        ("contrastive: leave one", ["--text-energy", "1", "--objective", "contrastive"]),
        ("--distill -1: expected a number of at least 0", ["--distill", "-1"]),
        ("--text-energy has no effect with", ["--text-energy", "1", "--method", "vifi-text"]),
    ):
        with pytest.raises(SystemExit):
            finetune.parse_arguments([*data, *wrong])
        assert text in capsys.readouterr().err


def test_help_tells_what_each_preset_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.parse_arguments(["--preset", "vifi-zero-shot", "--help"])
    text = capsys.readouterr().out
    told = text[text.index("presets and the flags that they set") :]
    typed = told[told.index("vita:") :].split("\n")[1].split()
    assert _settings("open-vclip", *typed)[:2] == _settings("vita")[:2]
    assert all(f"\n  {name}: " in told for name in PRESETS)
    assert "learning rate after the warm-up (default: 8e-06)" in " ".join(text.split())


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_trains_and_leaves_what_it_is_for(preset: str, world: Path) -> None:
    arguments = _tiny(world, preset)
    finetune.main(arguments)
    out, args = world / preset, finetune.parse_arguments(arguments)
    card = (out / "README.md").read_text()
    clip = create_model(WEIGHTS)[0]
    if args.method not in PROMPT_METHODS:
        final = load_checkpoint(out / "final.safetensors", clip)
        if preset != "open-vclip":
            assert "λ = 0 weighs the original" in card
            assert_same_state(final, load_checkpoint(out / "finetuned.safetensors"))
        return
    assert {path.name for path in out.glob("*.safetensors")} == {"prompts.safetensors"}
    backbone = {name: value.clone() for name, value in clip.state_dict().items()}
    prompting.load(clip, out / "prompts.safetensors")
    learned = prompting.state_dict(clip)
    assert backbone.keys() | learned.keys() == clip.state_dict().keys()
    assert (out / "prompts.safetensors").stat().st_size < 4 * sum(
        value.numel() for value in learned.values()
    ) + 8000
    assert card.startswith("# Prompts for shapes-clip, learned on videos")
    start = "its original weights" if preset == "vita" else f"the weights of `{args.start_from}`"
    assert start in card
    assert "| text prompts | 1 |" in card


def test_prompts_go_on_after_a_stop_bitwise(world: Path) -> None:
    whole = _tiny(world, "vita", "--steps", "5", "--save-every", "1")
    finetune.main([*whole, "--out", str(world / "whole")])
    stopped = [*whole, "--out", str(world / "stopped")]
    with terminated_at(3), pytest.raises(SystemExit):  # in the second of epochs of 2 steps
        finetune.main(stopped)
    assert not (world / "stopped" / "prompts.safetensors").exists()
    finetune.main(stopped)
    a, b = (load_checkpoint(world / name / "prompts.safetensors") for name in ("whole", "stopped"))
    assert_same_state(a, b)
    lines = (world / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5


# --- evaluation --------------------------------------------------------------------------------


def _slow(world: Path, name: str, model: Any, tokenizer: Any) -> tuple[torch.Tensor, float]:
    """Each view of 4 x 3 by itself: its frames, its crop, its probabilities; their sum, top-1."""
    rows = _rows(world / f"{name}.csv")
    names = sorted({label for _, label in rows})
    text = model.encode_text(tokenizer([f"a photo of a {one}." for one in names]))
    text = text / text.norm(dim=-1, keepdim=True)
    right, sums = list[bool](), list[torch.Tensor]()
    for file, label in rows:
        views = read_clip(world / file, num_frames=3, views=4, sampler="uniform")
        total = torch.zeros(len(names))
        for view in views:
            for crop in _crops_by_hand(view):
                feature = torch.stack([model.encode_image(f[None])[0] for f in crop]).mean(0)
                logits = model.logit_scale.exp() * text @ (feature / feature.norm())
                total += logits.softmax(-1)
        right.append(int(total.argmax()) == names.index(label))
        sums.append(total)
    return torch.stack(sums), sum(right) / len(right)


def _crops_by_hand(view: torch.Tensor) -> list[torch.Tensor]:
    # The videos are square: with a short side of 40 the crops of 32 lie side by side.
    whole = transforms.build("released", 40)(view)
    return [whole[..., 4:36, left : left + 32] for left in (0, 4, 8)]


@torch.no_grad()
def test_four_by_three_views_of_base_and_novel_equal_a_slow_evaluation(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = list[torch.Tensor]()
    monkeypatch.setattr(
        "openvclip.evaluation.accuracy.score",
        lambda logits, labels: scored.append(logits) or score(logits, labels),
    )
    model, tokenizer = create_model(WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        value.add_(0.05 * torch.randn(value.shape, generator=generator))
    save_checkpoint(model.state_dict(), world / "tuned.safetensors")
    found = world / "accuracy.json"
    accuracy.main(
        [
            *("--preset", "vifi-supervised", *model_flags(), "--frames", "3", "--num-workers", "0"),
            *("--checkpoint", str(world / "tuned.safetensors"), "--average", "probabilities"),
            *(
                "--annotations",
                str(world / "base.csv"),
                str(world / "novel.csv"),
                "--videos",
                str(world),
            ),
            *("--short-side", "40", "--harmonic-mean", "--output", str(found), "--device", "cpu"),
        ]
    )
    results = json.loads(found.read_text())
    slow = {name: _slow(world, name, model.eval(), tokenizer) for name in ("base", "novel")}
    for logits, (expected, _) in zip(scored, slow.values(), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len({*torch.cat(scored).flatten().tolist()}) == 16
    a, b = (top1 for _, top1 in slow.values())
    assert [results[name]["top1"] for name in slow] == [a, b]
    mean = 2 * a * b / (a + b) if a + b else 0.0
    assert results["harmonic mean"]["top1"] == pytest.approx(mean)
    assert f"| harmonic mean | {100 * mean:.1f}" in " ".join(capsys.readouterr().out.split())


def test_prompts_are_tested_on_other_classes(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.main([*_tiny(world, "bridge-base-to-novel"), "--out", str(world / "shared")])
    shared = ["--videos", str(world), "--num-workers", "0", "--device", "cpu", *model_flags()]
    common = [*shared, "--preset", "bridge-base-to-novel", "--frames", "3", "--short-side", "36"]
    prompts = ["--prompts", str(world / "shared" / "prompts.safetensors")]
    accuracy.main([*common, *prompts, "--annotations", str(world / "novel.csv")])
    assert "novel" in capsys.readouterr().out
    for text, wrong in (
        ("needs --prompts", ["--annotations", "a"]),
        ("needs several lists", ["--annotations", "a", *prompts, "--harmonic-mean"]),
    ):
        with pytest.raises(SystemExit):
            accuracy.parse_arguments([*common, *wrong])
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        accuracy.main([*common, *prompts, "--annotations", str(world / "train.csv")])
    assert "has class indices" in capsys.readouterr().err


def _test_vita(world: Path, prompts: Path, *more: str) -> None:
    accuracy.main(
        [
            *("--preset", "vita", *model_flags(), "--prompts", str(prompts), "--frames", "3"),
            *(
                "--annotations",
                str(world / "others.csv"),
                "--videos",
                str(world),
                "--num-workers",
                "0",
            ),
            *("--device", "cpu", *more),
        ]
    )


def test_vita_clip_is_zero_shot_after_training(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shared prompts go with any names; those of classes leave the names alone for others."""
    (world / "others.csv").write_text("0.mp4,wolf\n1.mp4,lamb\n")
    for kind in ("--no-class-prompts", "--class-prompts"):
        finetune.main([*_tiny(world, "vita", kind), "--out", str(world / kind)])
    _test_vita(world, world / "--no-class-prompts" / "prompts.safetensors")
    assert "others" in capsys.readouterr().out
    own = world / "--class-prompts" / "prompts.safetensors"
    with pytest.raises(SystemExit):
        _test_vita(world, own)
    assert "class-specific" in capsys.readouterr().err
    _test_vita(world, own, "--template", "{}")
    assert "others" in capsys.readouterr().out


def test_crops_are_views_of_a_data_set(world: Path) -> None:
    transform = transforms.build("released", 24, crops=3)
    for views in (1, 2):
        dataset = VideoDataset(
            [("0.mp4", 0), ("gone.mp4", 0)],
            world,
            transform=transform,
            sampling=Sampling(num_frames=3, views=views, sampler="uniform"),
            details=True,
        )
        shown, black = dataset[0], dataset[1]
        assert shown[0].shape == black[0].shape == (3 * views, 3, 3, 24, 24)
        clips = read_clip(world / "0.mp4", num_frames=3, views=views, sampler="uniform")
        for number, clip in enumerate(clips):
            assert torch.equal(shown[0][3 * number : 3 * number + 3], transform(clip))
