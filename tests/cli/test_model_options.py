"""--model, --pretrained and --checkpoint in all forms: the errors say which option to give."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from openvclip.checkpoints import task_vector_file
from tests.cli.test_cli import Captured, failure, run
from tests.examples.tiny_videos import MODEL, WEIGHTS, write_videos

pytest.importorskip("av")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, weights of several kinds, what is no weights, and a video."""
    folder = tmp_path_factory.mktemp("forms")
    write_videos(folder, 1)
    state = {name: value.float() for name, value in load_file(WEIGHTS).items()}
    save_file(state, folder / "clip.safetensors")
    tuned = {n: v + 0.01 if n.startswith("visual.") else v for n, v in state.items()}
    save_file(tuned, folder / "tuned.safetensors")
    image = {n: v for n, v in tuned.items() if n.startswith("visual.")}
    save_file(image, folder / "image.safetensors")
    task_vector_file(
        folder / "clip.safetensors", folder / "tuned.safetensors", folder / "vector.safetensors"
    )
    # The name stays: open_clip registers the configuration, and later tests find it by its content.
    shutil.copy(MODEL, folder / MODEL.name)
    (folder / "odd.json").write_text('{"x": 1}')
    (folder / "junk.pt").write_text("hello")
    (folder / "empty").mkdir()
    return folder


COMMANDS = {
    "predict": ["predict", "0.mp4", "--labels", "a", "b", "--no-cache", "--frames", "2"],
    "evaluate": [
        *("evaluate", "--annotations", "train.csv", "--videos", ".", "--out", "results"),
        *("--classes", "classes.txt", "--frames", "2"),
    ],
    "index": ["index", "0.mp4", "--output", "x.ovx", "--frames", "2"],
}
ORIGINAL = "give --pretrained FILE, the weights of the original CLIP."
WRONG = {
    "--model shapes-clip.json": ORIGINAL,
    "--model shapes-clip.json --checkpoint tuned.safetensors": (
        f"{ORIGINAL} --checkpoint tuned.safetensors holds the fine-tuned weights only. If you have "
        "no other file, give --pretrained tuned.safetensors --expand in place of --checkpoint."
    ),
    "--model shapes-clip.json --checkpoint tuned.safetensor": "(did you mean tuned.safetensors?)",
    "--model shapes-clip.json --pretrained openai": (
        "open_clip has no weights for shapes-clip. Give a file of weights"
    ),
    "--model shapes-clip.json --pretrained clip.safetensor": (
        "There is no file clip.safetensor (did you mean clip.safetensors?)"
    ),
    "--model shapes-clip.json --pretrained clip.safetensors --checkpoint shapes-clip.json": (
        "--checkpoint shapes-clip.json is a JSON file; expected a file of weights. Give the "
        "configuration"
    ),
    "--model shapes-clip.json --pretrained clip.safetensors --checkpoint image.safetensors": (
        "On the command line, give --allow-missing once for each name."
    ),
    "--model shapes-clip.json --pretrained clip.safetensors --checkpoint vector.safetensors": (
        "is a task vector: the change of a model, and no model. Add it to the original model first"
    ),
    "--model shapes-clip.json --pretrained clip.safetensors --checkpoint junk.pt": (
        "is not a whole safetens"
    ),
    "--model shapes-clip.json --pretrained clip.safetensors --checkpoint empty": (
        "Give the file of weights."
    ),
    "--model odd.json --pretrained clip.safetensors": "is no open_clip model configuration",
    "--model n.json --pretrained clip.safetensors": "no such file",
    "--model tuned.safetensors": "give it as --checkpoint (a fine-tuned model) or --pretrained",
    "--model tuned.safetensors --checkpoint tuned.safetensors": "the architecture as --model",
    "--model empty": "this folder has no config.json",
    "--model ViT-B-16-SigLIP": "has no weights openai, which are the default of --pretrained. Give",
    "--model ViT-B-16 --pretrained laion9": "neither a file of weights nor a tag of open_clip for",
    "--model ViT-B16": "did you mean",
    "--checkpoint gone.pt": "There is no file gone.pt",
}


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_error_says_which_option_to_give(
    folder: Path, command: str, words: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    error = failure(capsys, *COMMANDS[command], *words.split())
    assert error.startswith(f"openvclip {command}: error: ")
    assert WRONG[words] in error, error
    assert not (folder / "x.ovx").exists()


def test_what_the_error_advises_gives_the_labels_of_both_files(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    printed = []
    for weights in (
        ["--pretrained", "tuned.safetensors", "--expand"],
        ["--pretrained", "clip.safetensors", "--checkpoint", "tuned.safetensors"],
    ):
        assert run(*COMMANDS["predict"], "--json", "--model", "shapes-clip.json", *weights) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
