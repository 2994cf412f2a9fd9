"""``openvclip evaluate --protocol msrvtt-1ka``: results, files, going on, models, errors."""

from __future__ import annotations

import csv
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import openvclip
from examples.shapes.model import create_model
from examples.shapes.world import class_names
from openvclip import cli
from openvclip.checkpoints import load_checkpoint
from openvclip.cli.main import build_parser
from openvclip.cli.options.retrieval import NAMES, is_retrieval
from openvclip.evaluation import (
    Mixture,
    RetrievalEvaluation,
    RunOptions,
    evaluate_retrieval,
    retrieval_json,
    retrieval_table,
)
from openvclip.models import transform_for
from openvclip.models.usage import contract_of
from openvclip.video import retrieval
from tests.helpers import REPO
from tests.world import World

Captured = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Films:
    """The videos of the shapes world with captions, in the files of MSR-VTT."""

    world: World
    folder: Path

    def words(self, out: Path, *more: str, videos: Path | None = None) -> list[str]:
        data = ["--annotations", str(self.folder), "--videos", str(videos or self.world.folder)]
        run = ["--out", str(out), "--batch-size", "4", "--num-workers", "0", "--allow-incomplete"]
        return ["evaluate", "--protocol", "msrvtt-1ka", *data, *run, "--no-cache", *more]

    def of_shapes(self, out: Path, *more: str) -> list[str]:
        model = self.world.model_flags
        del model[model.index("--templates") :]
        return self.words(out, *model, *more)

    def by_python(
        self, model: Any, tokenizer: Any, mixture: Mixture | None = None
    ) -> RetrievalEvaluation:
        data = retrieval.load(
            "msrvtt-1ka", annotations=self.folder, videos=self.world.folder, allow_incomplete=True
        )
        run = RunOptions(batch_size=4, num_workers=0)
        return evaluate_retrieval(
            model, tokenizer, data, self.world.folder, mixture=mixture, run=run
        )


@pytest.fixture(scope="module")
def films(world: World, tmp_path_factory: pytest.TempPathFactory) -> Films:
    folder = tmp_path_factory.mktemp("msrvtt")
    names = class_names("seen")
    with (folder / "MSRVTT_JSFUSION_test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "vid_key", "video_id", "sentence"])
        for i, (path, index) in enumerate(world.samples):
            writer.writerow([f"ret{i}", f"msr{i}", path, f"a video of a {names[index]}, {i}"])
    return Films(world, folder)


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def values(result: RetrievalEvaluation) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = retrieval_json(result, dual_softmax=True)["results"]
    return entries


def test_a_sweep_over_lambda(films: Films, tmp_path: Path, capsys: Captured) -> None:
    out, tuned = tmp_path / "out", films.world.tuned
    words = films.of_shapes(out, "--checkpoint", str(tuned), "--lam", "0", "0.5", "--dual-softmax")
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    model, tokenizer = create_model()
    openvclip.expand_temporal_attention(model)
    expected = films.by_python(model, tokenizer, Mixture(load_checkpoint(tuned), (0.0, 0.5)))
    assert results(out)["results"] == values(expected)
    settings = results(out)["settings"]
    assert (settings["sampler"], settings["num_frames"], settings["words"]) == ("seconds", 12, 32)
    assert settings["transform"]["name"] == "clip"
    assert printed.startswith("msrvtt-1ka: 10 videos, 10 captions\nat most 12 frames of a video")
    for file, dual in (("table.md", False), ("table-dual-softmax.md", True)):
        text = (out / file).read_text()
        assert text.startswith(retrieval_table(expected, "shapes-clip", dual_softmax=dual))
        assert "at most 12 frames of a video, one for each second" in text
        assert ("not comparable" in text) == dual
        assert text in printed
    assert "10 clips in" in printed

    # Without the option, no number of the dual softmax is written or printed.
    assert cli.main([*words[:-1], "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == results(out)
    assert content["timing"]["clips"] == 0, "the features are those of the first run"
    assert all("dual_softmax" not in entry for entry in content["results"])


def test_a_stopped_run_goes_on(films: Films, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(films.of_shapes(out)) == 0
    whole = results(out)["results"]
    (records,) = out.glob("*.records")
    records.write_bytes(records.read_bytes()[: records.stat().st_size // 2])
    (out / "results.json").unlink()
    assert cli.main(films.of_shapes(out)) == 0
    assert results(out)["timing"]["clips"] == 6  # of 10: the first of three batches was whole
    assert results(out)["results"] == whole


def test_a_model_with_a_contract(films: Films, tmp_path: Path) -> None:
    """The contract says how the frames attend to each other; the protocol, which frames."""
    model, tokenizer = create_model()
    openvclip.expand_temporal_attention(model, window=2, boundary="mask")
    folder = tmp_path / "model"
    contract = contract_of(model, "shapes-clip", transform_for(model))
    openvclip.VideoCLIP(model, tokenizer, contract=contract).save_pretrained(folder)
    assert cli.main(films.words(tmp_path / "out", "--model", str(folder))) == 0
    expected = values(films.by_python(model, tokenizer))
    for entry in expected:
        del entry["dual_softmax"]
    assert results(tmp_path / "out")["results"] == expected
    assert results(tmp_path / "out")["settings"]["expand"] == "2 mask"
    frames = ["--model", str(folder), "--frames", "3", "--transform", "released"]
    assert cli.main(films.words(tmp_path / "other", *frames)) == 0
    settings = results(tmp_path / "other")["settings"]
    assert (settings["num_frames"], settings["transform"]["name"]) == (3, "released")


def test_a_model_of_transformers(films: Films, tmp_path: Path) -> None:
    from tests.tiny_transformers import PIXELS, make_tokenizer, save_folder

    folder = tmp_path / "model"
    folder.mkdir()
    model = save_folder("CLIPModel", folder)
    words = films.words(tmp_path / "out", "--model", str(folder))
    assert cli.main(words) == 0
    expected = values(films.by_python(model, make_tokenizer()))
    assert results(tmp_path / "out")["results"][0]["text_to_video"] == expected[0]["text_to_video"]
    assert results(tmp_path / "out")["settings"]["transform"]["size"] == PIXELS


def test_captions_of_ones_own(films: Films, tmp_path: Path, capsys: Captured) -> None:
    lines = [f"{path};a video of {i}" for i, (path, _) in enumerate(films.world.samples)]
    lines += [lines[0] + " again"]
    (tmp_path / "mine.csv").write_text("\n".join(["path;text", *lines]))
    words = films.of_shapes(tmp_path / "out")
    words.remove("--allow-incomplete")
    words[words.index("--annotations") + 1] = str(tmp_path / "mine.csv")
    words[words.index("msrvtt-1ka")] = "captions"
    assert cli.main(words) == 0
    assert "mine: 10 videos, 11 captions\n" in capsys.readouterr().out
    (entry,) = results(tmp_path / "out")["results"]
    assert (entry["protocol"], entry["videos"], entry["texts"]) == ("mine", 10, 11)


def failure(capsys: Captured, words: list[str]) -> str:
    assert cli.main(words) == 2
    text = capsys.readouterr().err
    assert text.startswith("openvclip evaluate: error: ")
    return text


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("--views 2", "--views has no effect with a retrieval protocol, which takes one frame"),
        ("--sampler uniform", "--sampler has no effect"),
        ("--crops 3", "--crops has no effect with a retrieval protocol, which takes the centre"),
        ("--templates t.txt", "which encodes captions as they are"),
        ("--per-class", "--per-class has no effect with a retrieval protocol, which has no class"),
        ("--classes c.txt", "--classes has no effect"),
        ("--protocol msvd lsmdc", "msvd lsmdc: expected one retrieval protocol"),
        ("--protocol msvd", "no official lists of msvd"),
        ("--batch-size 0", "--batch-size 0: expected at least 1"),
        ("--frames 0", "num_frames=0"),
        ("--lam 0.5", "give --checkpoint too"),
    ],
)
def test_options_that_do_not_fit(
    more: str, reason: str, films: Films, tmp_path: Path, capsys: Captured
) -> None:
    assert reason in failure(capsys, films.of_shapes(tmp_path / "out", *more.split()))
    assert not (tmp_path / "out").exists()


def test_the_dual_softmax_is_of_retrieval(world: World, tmp_path: Path, capsys: Captured) -> None:
    text = failure(capsys, [*world.evaluate_flags(tmp_path / "out"), "--dual-softmax"])
    assert "--dual-softmax has no effect without a retrieval protocol" in text


def test_missing_videos(films: Films, tmp_path: Path, capsys: Captured) -> None:
    some, out = tmp_path / "some", tmp_path / "out"
    for path, _ in films.world.samples[3:]:
        (some / path).parent.mkdir(parents=True, exist_ok=True)
        (some / path).symlink_to(films.world.folder / path)
    words = films.of_shapes(out)
    words[words.index("--videos") + 1] = str(some)
    text = failure(capsys, words)
    assert f"3 of 10 videos, with 3 of 10 captions, are not in {some}: " in text
    assert all(path in text for path, _ in films.world.samples[:3])
    assert not out.exists()
    assert cli.main([*words, "--allow-missing-videos"]) == 0
    assert "3 videos that can't be read, with the worst ranks:" in capsys.readouterr().err
    (entry,) = results(out)["results"]
    assert (entry["videos"], entry["texts"], entry["left_out"]) == (10, 10, 0)
    assert cli.main([*words, "--allow-missing-videos", "--leave-out-broken"]) == 0
    assert "3 videos that can't be read, left out with their" in capsys.readouterr().err
    (entry,) = results(out)["results"]
    assert (entry["videos"], entry["texts"], entry["left_out"]) == (7, 7, 3)
    assert len(results(out)["unreadable"]) == 3


def test_the_commands_of_the_page_are_commands() -> None:
    page = (REPO / "docs" / "retrieval.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    commands = "".join(blocks).replace("\\\n", " ").splitlines()
    assert len(commands) == 4
    for command in commands:
        options = build_parser().parse_args(shlex.split(command)[1:])
        assert is_retrieval(options)
    for name in NAMES:
        assert f"| `{name}` |" in page
