"""The commands at standard streams of every kind: encodings, closed pipes, no terminal."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from openvclip import cli
from openvclip.commands import progress
from openvclip.commands.streams import CLOSED_PIPE, command, standard_streams
from openvclip.video import VideoCheck
from tests.world import World

ENCODINGS = ["utf-8", "cp1252", "ascii", "latin-1", "cp932", "koi8-r", "utf-16"]
LETTERS = ("lambda", "+-", "x", "->", "\\xd7", "\\xe9", "\\U0001f3ac")
TEXT = "λ = 0.5, 83.4 ± 1.2, 3 × 8 → é ходьба 打篮球 🎬 \udcff"


class Output(io.TextIOWrapper):
    """A standard stream with an encoding, as Python opens it."""

    def __init__(self, encoding: str, errors: str = "strict") -> None:
        self.memory = io.BytesIO()
        super().__init__(self.memory, encoding=encoding, errors=errors, write_through=True)

    @property
    def text(self) -> str:
        return self.memory.getvalue().decode(self.encoding)


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Output]:
    def replaced(encoding: str) -> Output:
        stream = Output(encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    return replaced


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_character_is_written_in_every_encoding(
    encoding: str, output: Callable[[str], Output]
) -> None:
    """Report 20 (tabulate#327): UnicodeEncodeError for λ where the output is not UTF-8."""
    stream = output(encoding)
    with standard_streams():
        print(TEXT)
    words = stream.text.split()
    for word, written in zip(TEXT.split(), words, strict=True):
        kept = word.encode(encoding, "ignore").decode(encoding)
        assert written == word if kept == word else "\\u" in written or written in LETTERS
    assert words[0] in ("λ", "lambda")
    assert words[-1] == "\\udcff"
    assert stream.errors == "strict", "the handler is the stream's own again"


def test_commands_in_an_encoding_of_few_letters(
    world: World, tmp_path: Path, output: Callable[[str], Output]
) -> None:
    encoding = "cp1252"
    video = tmp_path / "клип λ.mp4"
    video.symlink_to(world.folder / world.samples[0][0])
    call = ["predict", str(video), "--labels", "打篮球", "± × →", *world.model_flags]
    stream = output(encoding)
    assert cli.main([*call, "--views", "1"]) == 0
    assert "lambda.mp4" in stream.text
    assert "\\u6253\\u7bee\\u7403" in stream.text
    stream = output(encoding)
    assert cli.main([*call, "--views", "1", "--json"]) == 0
    (entry,) = json.loads(stream.text)
    assert entry["path"] == str(video)
    assert {label["label"] for label in entry["labels"]} == {"打篮球", "± × →"}
    stream = output(encoding)
    flags = world.evaluate_flags(tmp_path / "out λ")
    (tmp_path / "one.csv").write_text((world.folder / "seen_test.csv").read_text().split("\n")[0])
    flags[flags.index("--annotations") + 1] = str(tmp_path / "one.csv")
    assert cli.main([*flags, "--checkpoint", str(world.tuned), "--lam", "0.5"]) == 0
    assert "| lambda |" in " ".join(stream.text.split()).replace("  ", " ")
    assert "λ" in (tmp_path / "out λ" / "table.md").read_text(encoding="utf-8")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"visual.w": torch.ones(3)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


CALLS: dict[str, Callable[[Path, Path], list[str]]] = {
    "help": lambda weights, out: ["--help"],
    "help of a subcommand": lambda weights, out: ["evaluate", "--help"],
    "inspect": lambda weights, out: ["inspect", str(weights)],
    "interpolate": lambda weights, out: [
        *("interpolate", str(weights), str(weights), "--lam", "0.5"),
        *("-o", str(out / "i.safetensors")),
    ],
    "average": lambda weights, out: ["average", str(weights), "-o", str(out / "a.safetensors")],
    "an error": lambda weights, out: ["inspect", str(out / "absent")],
    "wrong use": lambda weights, out: ["inspect"],
}


@pytest.fixture
def closed_pipe() -> Iterator[io.TextIOWrapper]:
    reading, writing = os.pipe()
    os.close(reading)
    stream = open(writing, "w", encoding="utf-8")  # noqa: SIM115
    yield stream
    stream.close()


@pytest.mark.parametrize("name", list(CALLS))
def test_a_closed_pipe_ends_a_command_quietly(
    name: str,
    weights: Path,
    tmp_path: Path,
    closed_pipe: io.TextIOWrapper,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Report 21 (B2#1071): ``openvclip predict ... | head -1`` gave a traceback."""
    on_error = name in ("an error", "wrong use")
    monkeypatch.setattr(sys, "stderr" if on_error else "stdout", closed_pipe)
    assert cli.main(CALLS[name](weights, tmp_path)) == CLOSED_PIPE
    monkeypatch.undo()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    closed_pipe.write("what is left is dropped")
    closed_pipe.flush()


def test_a_closed_pipe_ends_predict_and_evaluate(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = str(world.folder / world.samples[0][0])
    call = ["predict", video, video, "--labels", "a", "b", "--views", "1", *world.model_flags]
    flags = [*world.evaluate_flags(tmp_path / "out"), "--json"]
    (tmp_path / "one.csv").write_text((world.folder / "seen_test.csv").read_text().split("\n")[0])
    flags[flags.index("--annotations") + 1] = str(tmp_path / "one.csv")
    checks = ["check-videos", video, "-o", str(tmp_path / "checked.csv")]
    check = VideoCheck(video, "bad", "it is damaged")
    monkeypatch.setattr("openvclip.video.check_videos", lambda *_, **__: (c for c in [check]))
    for arguments in (call, flags, checks):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert cli.main(arguments) == CLOSED_PIPE
    assert (tmp_path / "out" / "results.json").is_file(), "results are written before the text"


def test_errors_that_have_nothing_to_do_with_the_streams_stay() -> None:
    with pytest.raises(BrokenPipeError), standard_streams():
        raise BrokenPipeError("of a worker process")
    with pytest.raises(FileNotFoundError), standard_streams():
        open("/does/not/exist")  # noqa: SIM115


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    error = Output("utf-8")
    with open("/dev/full", "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", error)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["inspect", str(weights)])
    assert stopped.value.code == 2
    assert error.text == "error: the output can't be written (No space left on device).\n"


def test_the_main_of_an_example_ends_quietly(closed_pipe: io.TextIOWrapper) -> None:
    @command
    def main(arguments: list[str] | None = None) -> None:
        print("λ")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", closed_pipe)
        with pytest.raises(SystemExit) as stopped:
            main([])
    assert stopped.value.code == CLOSED_PIPE


def test_commands_without_streams(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``openvclip ... >&- 2>&-``, a Windows program without a console, and a service."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["inspect", str(weights)]) == 0
    assert cli.main(["inspect", "absent"]) == 2
    assert sys.stdout is None


@pytest.mark.parametrize("columns", ["0", "1", "20", "-5", "wide", ""])
@pytest.mark.parametrize("name", ["predict", "evaluate", "interpolate"])
def test_help_at_every_width(
    columns: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.delenv("TERM", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_progress_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Report 49: no progress where the output is piped. A short command still writes nothing."""
    with progress.progress_lines():
        assert list(progress.progress_bar(range(3), desc="encode")) == [0, 1, 2]
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "INTERVAL", 1e-9)
        with progress.progress_bar(total=4, initial=1, desc="encode λ") as bar:
            for _ in range(3):
                bar.update()
                bar.write("a result")
        printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["encode λ: 2 of 4", "encode λ: 3 of 4"]
    assert all(" passed, about 0:00 left" in line for line in lines)
    assert printed.out == "a result\n" * 3
    list(progress.progress_bar(range(3), desc="in a library"))
    assert capsys.readouterr().err == "", "only commands write lines"
