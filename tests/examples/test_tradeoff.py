"""Trade-off curves: every point against a slow evaluation of its own, stops, bad input."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import openvclip
from examples import tradeoff
from examples.shapes.clips import ClipSettings, make_clips
from examples.shapes.model import MEAN, STD, WEIGHTS, create_model
from examples.shapes.world import TEMPLATES, class_names
from openvclip.checkpoints import Base, save_checkpoint
from openvclip.models.usage import contract_of
from openvclip.video import Sampling, dataset, read_clip, transforms
from openvclip.weights import weights_hash
from tests.examples.tiny_videos import MODEL
from tests.forked import run_by_path, started
from tests.helpers import tiny_clip

LAMS = (0.0, 0.3, 0.8)


@dataclass(frozen=True)
class World:
    """A few clips of shapes, and two sets of weights beside the original ones."""

    folder: Path
    weights: dict[str, Path]

    def data(self, name: str) -> list[str]:
        split = "seen" if name == "seen_test" else name
        return [
            f"annotations={self.folder / name}.csv",
            f"classes={self.folder / split}.txt",
            f"videos={self.folder}",
        ]

    def arguments(self, out: Path, *more: str) -> list[str]:
        return [
            *(() if "--hf" in more else ("--model", str(MODEL), "--pretrained", str(WEIGHTS))),
            *("--device", "cpu"),
            *("--templates", str(self.folder / "templates.txt"), "--sampler", "uniform"),
            *("--frames", "4", "--views", "2", "--batch-size", "3", "--num-workers", "0"),
            *("--closed-set", *self.data("seen_test"), "label=seen"),
            *("--zero-shot", *self.data("unseen"), "--lam", *map(str, LAMS)),
            *("--out", str(out), *more),
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    make_clips(folder, ClipSettings(train=1, test=8, frames=8), num_workers=1, progress=False)
    for split in ("seen", "unseen"):
        (folder / f"{split}.txt").write_text("\n".join(class_names(split)[:10]) + "\n")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES[:2]) + "\n")
    weights = {}
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        weights[name] = folder / f"{name}.safetensors"
        moved = {
            key: value + 0.015 * torch.randn(value.shape, generator=generator)
            if key.startswith("visual.")
            else value
            for key, value in create_model()[0].state_dict().items()
        }
        save_checkpoint(moved, weights[name])
    return World(folder, weights)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded, in turn."""
    paths = list[str]()
    plain = dataset.read_clip

    def counted(path: Any, *args: Any, **kwargs: Any) -> Tensor:
        paths.append(str(path))
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(dataset, "read_clip", counted)
    return paths


original = functools.cache(create_model)


@functools.cache
@torch.no_grad()
def slow_texts(path: Path) -> Tensor:
    """Text features of the names in a file, template by template."""
    model, tokenizer = original()
    rows = []
    for name in path.read_text().split("\n")[:-1]:
        texts = [tokenizer([form.replace("{}", name)]) for form in TEMPLATES[:2]]
        features = [functional.normalize(model.encode_text(text), dim=-1) for text in texts]
        rows.append(functional.normalize(torch.cat(features).mean(dim=0), dim=-1))
    return torch.stack(rows)


@torch.no_grad()
def slow_accuracies(
    world: World, name: str, tuned: Path | None, lam: float, *, expand: bool, **expansion: Any
) -> tuple[float, float]:
    """Top-1 and top-5, video by video from the equations."""
    model = copy.deepcopy(original()[0])
    texts = slow_texts(world.folder / f"{'seen' if name == 'seen_test' else name}.txt")
    if tuned is not None:
        other, clip = load_file(tuned), model.state_dict()
        model.load_state_dict({n: lam * v.double() + (1 - lam) * other[n] for n, v in clip.items()})
    if expand:
        openvclip.expand_temporal_attention(model, **expansion)
    pixels = transforms.build("released", 32, mean=MEAN, std=STD)
    better = []
    for line in (world.folder / f"{name}.csv").read_text().splitlines():
        path, label = line.rsplit(",", 1)
        clips = read_clip(world.folder / path, num_frames=4, views=2, sampler="uniform")
        logits = torch.zeros(len(texts))
        for view in pixels(clips):
            frames = model.encode_image(view[None])[0] if expand else model.encode_image(view)
            logits += (functional.normalize(frames, dim=-1) @ texts.T).mean(dim=0)
        better.append(int((logits > logits[int(label)]).sum()))
    return sum(n < 1 for n in better) / len(better), sum(n < 5 for n in better) / len(better)


def accuracies(out: Path) -> dict[tuple[str, str, float | None], tuple[float, float]]:
    results = json.loads((out / "results.json").read_text())
    return {
        (line, name, entry["lam"]): (entry["top1"]["mean"], entry["top5"]["mean"])
        for line, row in results.items()
        for name, result in row.items()
        for entry in result["results"]
    }


Points = dict[str, list[tuple[float, float]]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Points]:
    """The points of each curve, by the label of the curve, for each figure that is saved."""
    figures = list[Points]()
    savefig = Figure.savefig

    def recorded(figure: Figure, *args: Any, **kwargs: Any) -> None:
        (axes,) = figure.axes
        points = {}
        for line in axes.lines:
            # matplotlib names the lines without a label, the stars: "_child0" and so on.
            label = "star" if line.get_label().startswith("_") else line.get_label()
            points[label] = [tuple(point) for point in line.get_xydata().tolist()]
        figures.append(points)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", recorded)
    return figures


def expected_points(accuracy: dict[tuple[str, str, float | None], Any], world: World) -> Any:
    """Closed-set and zero-shot accuracy in % of each curve, and of the star of curve "one"."""
    lams: dict[str, tuple[float | None, ...]] = {"CLIP, frame by frame": (None,)}
    lams |= dict.fromkeys(world.weights, LAMS)
    points = {
        line: [
            tuple(pytest.approx(100 * accuracy[line, name, lam][0]) for name in ("seen", "unseen"))
            for lam in of_line
        ]
        for line, of_line in lams.items()
    }
    return {**points, "star": [points["one"][LAMS.index(0.3)]]}


def test_every_point_is_that_of_an_evaluation_on_its_own(
    world: World,
    tmp_path: Path,
    decoded: list[str],
    drawn: list[Points],
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = (f"{name}={path}" for name, path in world.weights.items())
    flags = ["--curve", one, "--frame-curve", two, "--baseline", "--mark", "one=0.3"]
    tradeoff.main(world.arguments(tmp_path, *flags))
    assert len(decoded) == 3 * 2 * 8  # curves and the baseline, sets, videos: not lambdas
    points = accuracies(tmp_path)
    assert len(points) == 2 * (2 * len(LAMS) + 1)
    for (line, name, lam), measured in points.items():
        path, data = world.weights.get(line), "seen_test" if name == "seen" else name
        at = 1.0 if lam is None else lam
        expected = slow_accuracies(world, data, path, at, expand=line == "one")
        assert measured == pytest.approx(expected), (line, name, lam)
    assert len(set(points.values())) > 4  # or equal numbers would say little
    printed = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    cells = [line.split("|")[1:-1] for line in table.splitlines()]
    assert [cell.strip() for cell in cells[0]] == ["curve", "λ", "seen", "unseen"]
    rows = [[cell.strip() for cell in row] for row in cells[2:]]
    assert rows[0][:2] == ["CLIP, frame by frame", ""]
    assert rows[-2] == [
        *("one", "0.3"),
        *(f"{100 * points['one', name, 0.3][0]:.1f}" for name in ("seen", "unseen")),
    ]
    assert (tmp_path / "tradeoff-unseen.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == [expected_points(points, world)]
    assert not list(tmp_path.glob("tradeoff-seen*"))

    decoded.clear()  # the same command again has nothing to do, another curve only its own
    before = (tmp_path / "tradeoff-unseen.png").read_bytes()
    tradeoff.main(world.arguments(tmp_path, *flags))
    assert decoded == []
    assert accuracies(tmp_path) == points
    assert (tmp_path / "tradeoff-unseen.png").read_bytes() == before
    tradeoff.main(world.arguments(tmp_path, *flags, "--curve", two.replace("two", "more", 1)))
    assert len(decoded) == 2 * 8
    text = r"results of other settings:\n  lams: stored \[0\.0, 0\.3"
    with pytest.raises(SystemExit, match=text):
        tradeoff.main(world.arguments(tmp_path, *flags, "--lam", "0.5", "0.3"))


def test_a_stopped_run_goes_on(
    world: World, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = [part for n, path in world.weights.items() for part in ("--curve", f"{n}={path}")]
    plain = dataset.read_clip

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        if len(decoded) == 2 * 8 + 5:  # in the second batch of the second curve
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_clip", failing)
        with pytest.raises(KeyboardInterrupt):
            tradeoff.main(world.arguments(tmp_path, *curves))
    assert {line for line, *_ in accuracies(tmp_path)} == {"one"}
    decoded.clear()
    tradeoff.main(world.arguments(tmp_path, *curves))
    assert len(decoded) == (8 - 3) + 8
    fresh = tmp_path / "fresh"
    tradeoff.main(world.arguments(fresh, *curves))
    assert accuracies(fresh) == accuracies(tmp_path)


# --- contracts ---


def with_contract(world: World, out: Path, **expansion: Any) -> Path:
    """Weights whose contract says window 2 and 3 views, which are no defaults."""
    model, _ = create_model()
    if expansion:
        openvclip.expand_temporal_attention(model, **expansion)
    contract = contract_of(
        model,
        "shapes-clip",
        transforms.build("released", 32, mean=MEAN, std=STD),
        sampling=Sampling(num_frames=4, views=2, sampler="uniform"),
        templates=TEMPLATES[:2],
        base=Base("shapes-clip", WEIGHTS.name, weights_hash(original()[0].state_dict())),
    )
    state = load_file(world.weights["one"])
    save_checkpoint(state, out, metadata={"openvclip": contract.to_json()})
    return out


def test_a_curve_with_a_contract_is_used_as_it_says(world: World, tmp_path: Path) -> None:
    """The other flags are the defaults, which the contract replaces for its curve alone."""
    expansion = {"window": 2, "boundary": "mask", "layers": [-1]}
    path = with_contract(world, tmp_path / "w.safetensors", **expansion)
    arguments = world.arguments(tmp_path / "out", "--curve", f"known={path}")
    removed = ("--templates", "--sampler", "--frames", "--views")
    places = [arguments.index(flag) for flag in removed]
    plain = [w for i, w in enumerate(arguments) if i not in places and i - 1 not in places]
    tradeoff.main(plain)
    for (line, name, lam), measured in accuracies(tmp_path / "out").items():
        assert line == "known"
        assert lam is not None
        data = "seen_test" if name == "seen" else name
        expected = slow_accuracies(world, data, world.weights["one"], lam, expand=True, **expansion)
        assert measured == pytest.approx(expected)
    given = [*plain, "--frames", "4", "--boundary", "mask"]  # which agrees with the contract
    tradeoff.main([*given, "--override"])
    text = "--views 3 contradicts the contract of the model: .*w.safetensors was trained with"
    with pytest.raises(SystemExit, match=text):
        tradeoff.main([*plain, "--views", "3"])
    with pytest.raises(SystemExit, match="without temporal attention, but its contract says"):
        tradeoff.main([("--frame-curve" if w == "--curve" else w) for w in plain])
    other = tmp_path / "other.safetensors"
    save_checkpoint({n: v + 1 for n, v in original()[0].state_dict().items()}, other)
    with pytest.raises(SystemExit, match="The weights of the original CLIP are not those from"):
        tradeoff.main([*plain, "--pretrained", str(other)])
    plain[plain.index(f"known={path}")] = f"one={world.weights['one']}"
    with pytest.raises(SystemExit, match="--override has no effect: no curve has a contract"):
        tradeoff.main([*plain, "--override"])


# --- bad input ---------------------------------------------------------------------------------


def _other_backbone(folder: Path) -> str:
    save_checkpoint(tiny_clip().state_dict(), folder / "other.safetensors")
    return f"other={folder / 'other.safetensors'}"


def _few_classes(world: World, folder: Path) -> list[str]:
    (folder / "few.txt").write_text("star sliding\nheart resting\n")
    return [f"annotations={world.folder}/unseen.csv", f"classes={folder}/few.txt"]


CASES: dict[str, tuple[Callable[[World, Path], list[str]], str]] = {
    "a checkpoint of another backbone": (
        lambda world, folder: ["--curve", _other_backbone(folder)],
        r"other\.safetensors does not fit the model\.(.|\n)*width(.|\n)*16",
    ),
    "no such checkpoint": (
        lambda world, folder: ["--curve", "gone=gone.safetensors"],
        r"gone\.safetensors",
    ),
    "class names that don't fit": (
        lambda world, folder: [
            *("--curve", f"one={world.weights['one']}", "--zero-shot"),
            *(*_few_classes(world, folder), f"videos={world.folder}", "label=few"),
        ],
        r"unseen\.csv, line \d+: class index \d+ .* there are 2 classes",
    ),
    "videos that are missing": (
        lambda world, folder: [
            *("--curve", f"one={world.weights['one']}", "--zero-shot"),
            *(*world.data("unseen")[:2], f"videos={folder}", "label=gone"),
        ],
        r"8 of 8 videos are not in",
    ),
    "no such split": (
        lambda world, folder: [
            *("--curve", f"one={world.weights['one']}", "--zero-shot"),
            *(*world.data("unseen"), "split=2"),
        ],
        r"split=2: .*unseen\.csv gives 1",
    ),
}


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}'])
def test_damaged_results_are_told_before_a_video_is_read(
    world: World, tmp_path: Path, decoded: list[str], text: str
) -> None:
    (tmp_path / "results.json").write_text(text)
    arguments = [
        *world.arguments(tmp_path, "--curve", "a=absent.safetensors"),
        "--out",
        f"{tmp_path}",
    ]
    with pytest.raises(SystemExit, match=r"results.json does not hold .*Move the file away"):
        tradeoff.main(arguments)
    assert (decoded, (tmp_path / "results.json").read_text()) == ([], text)


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_told_before_a_video_is_read(
    name: str, world: World, tmp_path: Path, decoded: list[str]
) -> None:
    more, text = CASES[name]
    with pytest.raises(SystemExit, match=text):
        tradeoff.main(world.arguments(tmp_path, *more(world, tmp_path)))
    assert decoded == []


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--lam", "0.5", "1.2"], "--lam 1.2: expected weights of the original CLIP in [0, 1]"),
        (["--curve", "path.safetensors"], "expected LABEL=FILE"),
        ([], "give --curve LABEL=FILE"),
        (["--curve", "a=b", "--mark", "a=0.55"], "--mark a=0.55: expected the label of a curve"),
        (["--curve", "a=b", "--mark", "c=0.3"], "--mark c=0.3: expected the label of a curve"),
        (["--curve", "a b=c", "--curve", "a-b=d"], "'a b' labels two curves or data sets"),
        (["--curve", "a=b", "--zero-shot", "annotations=x"], "required: --videos"),
        (
            ["--curve", "a=b", "--zero-shot", "annotations=x", "videos=y", "clases=z"],
            "unrecognized arguments: --clases",
        ),
        (
            ["--curve", "a=b", "--zero-shot", "protocol=ucf", "annotations=x", "videos=y"],
            "invalid choice: 'ucf'",
        ),
        (
            ["--curve", "a=b", "--zero-shot", "annotations=d/unseen.csv", "videos=y"],
            "'unseen' labels two curves or data sets",
        ),
    ],
)
def test_arguments_that_make_no_sense(
    world: World, tmp_path: Path, more: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tradeoff.main(world.arguments(tmp_path, *more))
    assert text in capsys.readouterr().err


def test_missing_matplotlib_is_told_at_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"Figures need matplotlib: pip install"):
        tradeoff.main(world.arguments(tmp_path, "--curve", f"one={world.weights['one']}"))
    assert decoded == []


def test_help_of_the_file_started_by_its_path(tmp_path: Path) -> None:
    with started(
        run_by_path, str(tmp_path), "tradeoff", ["--help"], log=tmp_path / "log"
    ) as process:
        process.join(120)
        text = (tmp_path / "log").read_text()
        assert process.exitcode == 0, text
    for flag in ("--curve LABEL=FILE", "--zero-shot NAME=VALUE", "--lam", "--hf", "--views"):
        assert flag in text


def test_a_hugging_face_clip(world: World, tmp_path: Path) -> None:
    """Checkpoints keep its names, which load_checkpoint would turn into open_clip's."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from tests.examples.test_finetune_command import _write_tokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    words = {"vocab_size": 520, "bos_token_id": 518, "eos_token_id": 519}
    config = CLIPConfig(
        text_config={**sizes, **words, "max_position_embeddings": 32},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config)
    model.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    _write_tokenizer(tmp_path / "clip")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(state, tmp_path / "same.safetensors")
    flags = ["--hf", str(tmp_path / "clip"), "--baseline", "--frame-curve"]
    tradeoff.main(world.arguments(tmp_path, *flags, f"same={tmp_path / 'same.safetensors'}"))
    points = accuracies(tmp_path)
    for name in ("seen", "unseen"):  # all points between a model and itself are that model
        assert {points["same", name, lam] for lam in LAMS} == {
            points["CLIP, frame by frame", name, None]
        }
    del state["visual_projection.weight"]
    save_checkpoint(state, tmp_path / "less.safetensors")
    with pytest.raises(SystemExit, match=r"does not fit(.|\n)*missing \(1\): visual_projection"):
        tradeoff.main(world.arguments(tmp_path, *flags, f"less={tmp_path / 'less.safetensors'}"))
