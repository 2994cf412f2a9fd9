"""The folder of a model of open_clip: configuration, weights and tokenizer.

open_clip loads such a folder with ``local-dir:FOLDER``, and from the Hub with ``hf-hub:user/name``.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openvclip.checkpoints.api import load_checkpoint
from openvclip.checkpoints.contract_sections import Pixels
from openvclip.errors import ModelNameError, UsageError
from openvclip.models.open_clip_config import (
    CONFIG_FILE,
    Config,
    build,
    config_of,
    read_config,
    remember_config,
)
from openvclip.models.tokenizers import same_tokens

WEIGHTS_STEM = "open_clip_model"
"""The beginning of the names of the files of weights."""
STANDARD_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_model.safetensors.index.json",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
"""The files of weights that open_clip loads, the first that exists; and the index of shards."""
TEXT_CONFIG = "config.json"
"""The configuration of a text tower of transformers, beside open_clip's configuration."""

_TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")


def load_model(
    config: Mapping[str, Any], preprocess: Mapping[str, Any], weights: Path, folder: Path
) -> Any:
    """Return the open_clip model of a configuration with its weights.

    Args:
        config: the configuration of the model.
        preprocess: the preprocessing of its images.
        weights: the file of weights.
        folder: the folder of the model, which may hold the configuration of its text tower.

    Raises:
        ModelNameError: open_clip can't build the model.
        CheckpointError, UnsafeCheckpointError, StateMismatchError, NonFiniteWeightsError: see
            :func:`openvclip.load_checkpoint`.
    """
    local = copy.deepcopy(dict(config))
    if "hf_model_name" in local["text_cfg"] and (folder / TEXT_CONFIG).is_file():
        local["text_cfg"]["hf_model_name"] = str(folder)  # no request to the Hub is needed
    model = build(local, preprocess)
    load_checkpoint(weights, model)
    remember_config(model, config)
    return model


def read_folder_config(folder: Path, name: str) -> tuple[Config, dict[str, Any]]:
    """Return the configuration of a model and the preprocessing of its images.

    Args:
        folder: the folder of the model.
        name: name of the file of the configuration.

    Raises:
        ModelNameError: the file is no configuration.
    """
    path = folder / name
    config = read_config(str(path))
    content = json.loads(path.read_text(encoding="utf-8"))
    preprocess = content.get("preprocess_cfg", {})
    return config, preprocess if isinstance(preprocess, dict) else {}


def load_tokenizer(config: Mapping[str, Any], folder: Path) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer of the open_clip model in a folder.

    Args:
        config: the configuration of the model.
        folder: the folder, with the files of the tokenizer if it is one of transformers.

    Raises:
        ModelNameError: the tokenizer can't be made.
    """
    try:
        if not config["text_cfg"].get("hf_tokenizer_name"):
            return copy.copy(_tokenizer_without_files(json.dumps(config["text_cfg"])))
        with _beside_config(config, folder) as place:
            return _open_clip_tokenizer(place)
    except (ImportError, OSError, ValueError) as error:
        raise ModelNameError(
            f"The tokenizer of {folder} can't be made: {str(error).rstrip('.')}. Copy the files of "
            "the tokenizer into the folder, or install the package that it needs."
        ) from error


@lru_cache(maxsize=8)
def _tokenizer_without_files(text_config: str) -> Callable[[list[str]], Tensor]:
    """Return a tokenizer that needs no files of a model. open_clip takes 0.5 s to make one."""
    with _beside_config({"text_cfg": json.loads(text_config)}) as place:
        return _open_clip_tokenizer(place)


def _open_clip_tokenizer(folder: Path) -> Callable[[list[str]], Tensor]:
    import open_clip

    tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(f"local-dir:{folder}")
    return tokenizer


@contextmanager
def _beside_config(config: Mapping[str, Any], folder: Path | None = None) -> Iterator[Path]:
    """Yield a folder with this configuration, and with the files of the tokenizer in ``folder``.

    open_clip reads the configuration and the tokenizer from one folder.
    """
    with tempfile.TemporaryDirectory() as place:
        for file in folder.iterdir() if folder else ():
            if file.suffix in _TOKENIZER_FILES and file.is_file() and file.name != CONFIG_FILE:
                shutil.copyfile(file, Path(place, file.name))
        content = json.dumps({"model_cfg": dict(config)})
        Path(place, CONFIG_FILE).write_text(content, encoding="utf-8")
        yield Path(place)


def write_config(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    pixels: Pixels,
    *,
    file: str = CONFIG_FILE,
    name: str | None = None,
    config: str | Mapping[str, Any] | None = None,
    repo: str | None = None,
) -> Config:
    """Write the configuration and the tokenizer of a model of open_clip.

    Args:
        model: the model, expanded or not.
        tokenizer: its tokenizer.
        folder: an existing folder.
        pixels: the pixels of a frame that the model is given.
        file: name of the file of the configuration.
        name: name of the model in open_clip, if it is known.
        config: the configuration, its file, or a name in open_clip. Default: it is searched.
        repo: the repository on the Hub that the folder is for. open_clip then finds the tokenizer
            and the configuration of a text tower of transformers in this repository.

    Returns:
        The configuration of the model.

    Raises:
        UsageError: the configuration is not known, or ``tokenizer`` can't be saved.
    """
    found = config_of(model, name, config)
    written = copy.deepcopy(found)
    text = written["text_cfg"]
    if "hf_model_name" in text:
        clip: Any = model
        clip.text.config.save_pretrained(folder)
        text["hf_model_name"] = repo or text["hf_model_name"]
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "save_pretrained"):
        inner.save_pretrained(folder)
        text["hf_tokenizer_name"] = repo or text.get("hf_tokenizer_name") or _name_of(inner)
        if type(tokenizer).__name__ == "SigLipTokenizer":
            text["tokenizer_kwargs"] = {"clean": "canonicalize"}
    content = {"model_cfg": written, "preprocess_cfg": _preprocess(model, pixels)}
    (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _require_same_tokens(tokenizer, written, folder)
    return found


def _name_of(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "tokenizer"


def _preprocess(model: nn.Module, pixels: Pixels) -> dict[str, Any]:
    present = getattr(getattr(model, "visual", None), "preprocess_cfg", None) or {}
    kept = {name: present[name] for name in ("interpolation", "resize_mode") if name in present}
    return {"mean": list(pixels.mean), "std": list(pixels.std), **kept}


def _require_same_tokens(tokenizer: Any, config: Mapping[str, Any], folder: Path) -> None:
    """Raise an error if open_clip would make other tokens in the folder than ``tokenizer``."""
    try:
        same = same_tokens(load_tokenizer(config, folder), tokenizer)
    except ModelNameError as error:
        raise UsageError(f"The tokenizer of the model can't be saved: {error}") from error
    if not same:
        raise UsageError(
            f"tokenizer is a {type(tokenizer).__name__}, which can't be saved: open_clip makes "
            "other tokens for this model. Create the VideoCLIP with the tokenizer that "
            "open_clip.get_tokenizer(name) returns, or with an open_clip.tokenizer.HFTokenizer."
        )
