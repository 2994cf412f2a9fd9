"""Each option of each command is read, or it is refused where it has no effect (report 41)."""

from __future__ import annotations

import argparse
import ast
import functools
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from examples.shapes.clips import ClipSettings
from openvclip import cli
from openvclip.cli.main import build_parser
from openvclip.commands.parsing import Parser, unused_option
from openvclip.errors import OpenVCLIPError, UsageError
from openvclip.evaluation import RetrievalEvaluation, RetrievalScore, retrieval_metrics
from openvclip.evaluation.accuracy import score
from openvclip.evaluation.results import ProtocolEvaluation, SplitScore
from openvclip.evaluation.timing import Timing
from openvclip.models.loading import LoadedModel
from openvclip.models.prediction import Prediction
from openvclip.models.timeline import Timeline
from openvclip.training.options import parse_arguments
from openvclip.training.recipe import Recipe, Run
from openvclip.video import VideoCheck, transforms
from openvclip.video.retrieval import RetrievalSet
from tests.helpers import REPO, snapshot, tiny_clip, tiny_tokenizer

# Functions that check options. What they read is not used by them.
CHECKS = {
    "require_effects",
    "_require_effects",
    "unused_frame_options",
    "unused_weight_options",
    "_is_expanded",
    "_require_consistent",
    "_check",
}


class Recorded(argparse.Namespace):
    """Options that note which of them the command reads."""

    reads: set[str]

    def __getattribute__(self, name: str) -> Any:
        if name[:1] != "_" and name != "reads":
            frame = sys._getframe(1)
            if frame.f_code.co_name == "_check" and frame.f_globals["__name__"].endswith("videos"):
                self.reads.add(name)  # the body of check-videos
            elif frame.f_code.co_name not in CHECKS:
                self.reads.add(name)
        return super().__getattribute__(name)


@functools.cache
def whole_parser() -> Parser:
    parser = build_parser()
    assert isinstance(parser, Parser)
    return parser


def subparser(command: str) -> Parser:
    (commands,) = (a for a in whole_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parser: Parser = commands.choices[command]
    parser.complete()
    return parser


def words_of(action: argparse.Action, folder: Path) -> list[str]:
    """An option with a value that is not its default."""
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return [flag]
    if action.choices:
        (*_, value) = (c for c in map(str, action.choices) if c != str(action.default))
        return [flag, value]
    named = {"--device": "cpu", "--max-shard-size": "1GB", "--templates": str(folder / "t.txt")}
    named |= {"--classes": str(folder / "names.txt"), "--checkpoint": str(folder / "w.safetensors")}
    value = {int: "16", float: "0.5"}.get(action.type or str, "w*")  # type: ignore[call-overload]
    return [flag, named.get(flag, str(value))]


def run_recorded(words: list[str]) -> tuple[set[str], str]:
    """Run a command; return the options that it read, and the text of its error."""
    options = whole_parser().parse_args(words)
    recorded = Recorded(**vars(options))
    recorded.reads = set()
    try:
        recorded.run(recorded)
    except OpenVCLIPError as error:
        return recorded.reads, str(error)
    return recorded.reads, ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "v.mp4").touch()
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "t.txt").write_text("a {}.\n")
    (tmp_path / "list.csv").write_text("v.mp4,a\n")
    for name in ("w", "x"):
        save_file({"visual.w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    return tmp_path


@functools.cache
def models() -> tuple[Any, dict[str, Any]]:
    """A model, whose weights the commands change, and the weights of another."""
    return tiny_clip(), snapshot(tiny_clip(1))


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small models in place of loading, and no decoding of videos."""

    def load_model(name: str, pretrained: object, **options: Any) -> LoadedModel:
        model, state = models()
        tuned = None if options["checkpoint"] is None else state
        return LoadedModel(name, model, tiny_tokenizer, transforms.build("released", 8), tuned)

    def predict(classifier: Any, video: str, **_: Any) -> Prediction:
        names = classifier.class_names
        return Prediction(video, names, torch.ones(len(names)) / len(names))

    def predict_timeline(classifier: Any, video: str, **_: Any) -> Timeline:
        times = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        return Timeline(video, classifier.class_names, times, torch.tensor([[0.5, 0.5]]))

    def evaluate_protocol(*_: object, out: Path, **__: object) -> ProtocolEvaluation:
        out.mkdir(exist_ok=True)
        split = SplitScore("s", ["a", "b"], score(torch.eye(2), torch.tensor([0, 1])))
        return ProtocolEvaluation({None: [split]}, [], Timing())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openvclip.models.loading.load_model", load_model)
    monkeypatch.setattr("openvclip.models.folders.downloaded_folder", lambda source: None)
    monkeypatch.setattr("openvclip.models.prediction.predict", predict)
    monkeypatch.setattr("openvclip.models.timeline.predict_timeline", predict_timeline)
    monkeypatch.setattr(Timeline, "figure", lambda *_, **__: None)
    monkeypatch.setattr("openvclip.evaluation.evaluate_protocol", evaluate_protocol)

    def evaluate_retrieval(*_: object, out: Path, **__: object) -> RetrievalEvaluation:
        out.mkdir(exist_ok=True)
        metrics = retrieval_metrics(torch.eye(2))
        return RetrievalEvaluation(
            "s",
            {None: RetrievalScore(metrics, metrics, 2, 2, 0, torch.eye(2))},
            [],
            Timing(),
        )

    def load_captions(name: str, *, allow_incomplete: bool, **_: object) -> RetrievalSet:
        return RetrievalSet(name, ["v.mp4"], [["a"]])

    monkeypatch.setattr("openvclip.evaluation.evaluate_retrieval", evaluate_retrieval)
    monkeypatch.setattr("openvclip.video.retrieval.load", load_captions)
    monkeypatch.setattr(
        "openvclip.video.retrieval.from_captions",
        lambda *_, **__: RetrievalSet("own", ["v.mp4"], [["a"]]),
    )
    checks = [VideoCheck("v.mp4", "ok")]
    monkeypatch.setattr("openvclip.video.check_videos", lambda *_, **__: (c for c in checks))
    monkeypatch.setattr("openvclip.evaluation.require_videos", lambda *_: None)
    split = [("v.mp4", 0)]
    monkeypatch.setattr(
        "openvclip.video.protocols.load",
        lambda name, **_: [cli_split(name, split)],
    )


def cli_split(name: str, samples: list[tuple[str, int]]) -> Any:
    from openvclip.video.protocols import Split

    return Split(name, ["a", "b"], samples)


FRAME_BY_FRAME = {"window", "boundary"}
OF_THE_FILE = {"allow_missing", "allow_unexpected", "text"}
NOT_OF_RETRIEVAL = {
    *("views", "sampler", "sampling_rate", "crops", "short_side", "templates"),
    *("classes", "per_class", "confusion"),
}
OVER_TIME = {"views", "sampler", "backend", "background", "reject"}
PREDICT = "predict v.mp4 --labels a b"
LIST = "evaluate --videos . --out out --annotations list.csv"
TUNED = "--checkpoint w.safetensors"

# A command line, and the options that have no effect there. All other options are read.
WITHOUT_CONTRACT = {"override"}  # tests/cli/test_contract.py has models with a contract
MODES: dict[str, set[str]] = {
    PREDICT: {"lam", "seconds", "step", "out"} | FRAME_BY_FRAME | OF_THE_FILE,
    f"{PREDICT} --expand": {"lam", "seconds", "step", "out"} | OF_THE_FILE,
    f"{PREDICT} {TUNED}": {"seconds", "step", "out"},
    f"{PREDICT} {TUNED} --no-expand --sampler uniform": {
        *("seconds", "step", "out", "sampling_rate", "timeline"),
        *FRAME_BY_FRAME,
    },
    f"{PREDICT} {TUNED} --model hf-hub:a/b": {"seconds", "step", "out", "pretrained"},
    f"{PREDICT} {TUNED} --timeline": OVER_TIME,
    f"{PREDICT} {TUNED} --timeline --seconds 1": {*OVER_TIME, "sampling_rate"},
    LIST: {"lam", "allow_incomplete", "dual_softmax"} | FRAME_BY_FRAME | OF_THE_FILE,
    f"{LIST} {TUNED} --sampler uniform": {"allow_incomplete", "sampling_rate", "dual_softmax"},
    f"{LIST} {TUNED} --protocol ucf101-ep1": {"classes", "dual_softmax"},
    f"{LIST} {TUNED} --protocol lsmdc": NOT_OF_RETRIEVAL,
    f"{LIST} {TUNED} --protocol captions": {*NOT_OF_RETRIEVAL, "allow_incomplete"},
    "inspect w.safetensors": set(),
    "convert w.safetensors -o c.safetensors --allow-missing *": set(),
    "interpolate w.safetensors x.safetensors --lam 0.5 -o i.safetensors": {"max_shard_size"},
    "interpolate w.safetensors x.safetensors --lam 0.5 -o i.safetensors.index.json": set(),
    "average w.safetensors x.safetensors -o a.safetensors": {"max_shard_size"},
    "check-videos v.mp4 -o c.csv": {"videos"},
    "check-videos list.csv -o c.csv": set(),
}


@pytest.mark.parametrize("mode", list(MODES))
def test_each_option_is_read_or_refused(
    mode: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Report 41: ``predict --timeline`` ignored ``--views``, ``--sampler`` and ``--backend``."""
    words = mode.split()
    base = whole_parser().parse_args(words).given
    refused = {}
    for action in subparser(words[0])._actions:
        if action.dest in base | {"help", "labels_file", "dataset", "protocol"}:
            continue  # the others have a command line of their own
        for file in (*folder.glob("c.*"), *folder.glob("[ia].s*"), *folder.glob("[ia]-*")):
            file.unlink()
        if action.dest == "overwrite":
            (folder / "c.csv").touch()
        reads, error = run_recorded([*words, *words_of(action, folder)])
        named = "--" + action.dest.replace("_", "-") in error or action.dest in error
        if named:
            refused[action.dest] = error
        else:
            assert action.dest in reads, f"{action.dest} is not read: {error}"
    runs_a_model = words[0] in ("predict", "evaluate")
    assert set(refused) == MODES[mode] | (WITHOUT_CONTRACT if runs_a_model else set()), refused
    assert all(text.count("\n") == 0 for text in refused.values())


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("predict v.mp4 --labels-file names.txt", "labels_file"),
        ("predict v.mp4 --labels-file names.txt --top 1 --timeline", "top"),
        (f"{LIST} {TUNED} --protocol ucf101-ep1 --allow-incomplete", "allow_incomplete"),
    ],
)
def test_options_of_other_command_lines(words: str, read: str, folder: Path) -> None:
    reads, error = run_recorded(words.split())
    assert error == ""
    assert read in reads


def test_what_is_given_is_what_the_command_line_names() -> None:
    words = ["predict", "a", "--labels", "b", "--views=3", "--no-expand", "--out", "x"]
    assert build_parser().parse_args(words).given == {
        *("command", "videos", "labels", "views", "expand", "out"),
    }
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--list", action="append", default=[])
    parser.add_argument("--number", type=int, default="7")
    parser.set_defaults(number=8)
    assert parser.parse_args([]).given == frozenset()
    parsed = parser.parse_args(["--list", "a", "--list", "b"])
    assert (parsed.list, parsed.number, parsed.given) == (["a", "b"], 8, {"list"})
    assert parser.parse_args(["--number", "8"]).given == {"number"}, "also with the default"
    assert unused_option({"number"}, {"number": "here"}).startswith("--number has no effect here.")
    assert unused_option({"number"}, {"number": "", "list": "here"}) == ""


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("predct v.mp4", "did you mean predict?"),
        ("predict v.mp4 --lables a b", "did you mean --labels?"),
        ("predict v.mp4 --labels a --timline", "did you mean --timeline?"),
        (f"{LIST} --protocol UCF101_EP1", "did you mean ucf101-ep1?"),
        ("interpolate a b --lamda 0.5 -o c", "did you mean --lam?"),
        ("predict v.mp4 --labels a --boundary msk", "did you mean mask?"),
    ],
)
def test_close_flags_and_choices(words: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words.split())
    assert stopped.value.code == 2
    assert hint in capsys.readouterr().err


# --- the example scripts -------------------------------------------------------------------------

SCRIPTS = [
    *("accuracy", "evaluate", "finetune", "finetune_image_clip", "lists", "merge_two_finetunes"),
    *("open_vclip", "sweep_and_plot", "tradeoff", "loops/accelerate_loop", "loops/lightning_loop"),
    *("shapes/run", "shapes/clips", "shapes/pretrain", "shapes/trials/command"),
]
# Where the options of the scripts are read, besides the script itself.
READERS = [
    *("cli/options/models.py", "cli/options/data.py", "cli/options/contract.py"),
    *("training/options.py", "training/option_groups.py", "training/shared_options.py"),
]


def attributes(file: Path) -> Iterator[str]:
    """The names that a source reads as attributes, strings and fields of a settings class."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_option_of_a_script_is_read(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    def stop(parser: Parser, *_: object) -> None:
        raise StoppedError(parser)

    monkeypatch.setattr(Parser, "parse_args", stop)
    module = runpy.run_path(str(REPO / "examples" / f"{script}.py"))
    with pytest.raises(StoppedError) as caught:
        module.get("parse_arguments", module["main"])([])
    (parser,) = caught.value.args
    read = set(attributes(REPO / "examples" / f"{script}.py"))
    with_contract = ("evaluate", "merge_two_finetunes", "sweep_and_plot", "tradeoff")
    if script in ("accuracy", "finetune", *with_contract):
        read |= {name for file in READERS for name in attributes(REPO / "openvclip" / file)}
    if script == "finetune":
        read |= {*Recipe.__dataclass_fields__, *Run.__dataclass_fields__}
    if script == "shapes/clips":
        read |= {*ClipSettings.__dataclass_fields__}
    options = {action.dest for action in parser._actions} - {"help"}
    assert options <= read, options - read


FILES = "--annotations a --videos b --out c"


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (f"{FILES} --hf x --pretrained openai", "pretrained"),
        (f"{FILES} --hf x --model y", "model"),
        (f"{FILES} --model hf-hub:a/b --pretrained openai", "pretrained"),
        (f"{FILES} --shard-index i", "shard-index"),
        ("--shards s --classes c --out o --videos v", "videos"),
        (f"{FILES} --val-videos v", "val-videos"),
        (f"{FILES} --sampler uniform --sampling-rate 4", "sampling-rate"),
        (f"{FILES} --preset vifi-zero-shot --target-fps 25", "target-fps"),
        (f"{FILES} --steps 10 --epochs 3", "epochs"),
        (f"{FILES} --warmup-epochs 0 --warmup-start-lr 1e-6", "warmup-start-lr"),
        (f"{FILES} --method finetune --alpha-max 0.5", "alpha-max"),
        (f"{FILES} --method swa --every 2", "every"),
        (f"{FILES} --method iwr --average-after 2", "average-after"),
        (f"{FILES} --l2-weight 0.1", "l2-weight"),
        (f"{FILES} --method vifi --text-tower", "text-tower"),
        (f"{FILES} --text-prompts 4", "text-prompts"),
        (f"{FILES} --method vita --text-depth 2", "text-depth"),
        (f"{FILES} --method vita --lam 0.5", "lam"),
        (f"{FILES} --method bridge --start-from f --class-prompts", "class-prompts"),
        (f"{FILES} --method vifi --frame-by-frame", "frame-by-frame"),
    ],
)
def test_options_of_the_trainer_that_have_no_effect(
    words: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments("", words.split())
    assert stopped.value.code == 2
    assert f"--{flag} has no effect" in capsys.readouterr().err
    without = words.split()
    start = without.index(f"--{flag}")
    del without[start : start + 2]
    assert flag.replace("-", "_") not in parse_arguments("", without).given


@pytest.mark.parametrize(
    ("script", "words", "text"),
    [
        ("lists", "protocol ucf101-ep1 --annotations a --out o --shots 8", "--shots has no effect"),
        ("lists", "protocol ucf101-ep1 --annotations a --out o --seed 2", "--seed has no effect"),
        ("accuracy", "--annotations a --videos b --average probabilities --views 1", "--average"),
        (
            "accuracy",
            "--annotations a --videos b --sampler uniform --sampling-rate 2",
            "--sampling",
        ),
        ("accuracy", "--annotations a --videos b --model hf-hub:a/b --pretrained x", "--pretr"),
        (
            "evaluate",
            "--ucf101 a b --out o --model hf-hub:a/b --pretrained x",
            "--pretrained has no",
        ),
        ("evaluate", "--ucf101 a b --out o --text original", "--text has no effect without"),
        ("shapes/run", "--full --only iwr", "--only"),
        ("shapes/trials/command", "--list --cells 2", "--cells has no effect"),
        (
            "sweep_and_plot",
            "--checkpoint c --closed-set a --zero-shot b --videos v --star 0.33",
            "--star",
        ),
        (
            "finetune_image_clip",
            "--images i --validation v --out o --hf h --model m",
            "--model has",
        ),
    ],
)
def test_options_of_other_scripts_that_have_no_effect(
    script: str, words: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = runpy.run_path(str(REPO / "examples" / f"{script}.py"))
    with pytest.raises((SystemExit, UsageError)) as stopped:
        module["main"](words.split())
    assert text in capsys.readouterr().err + str(stopped.value)
