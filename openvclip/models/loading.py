"""Load a model of open_clip or transformers with its tokenizer and transform, for videos."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.checkpoints.adapter_files import is_adapter, load_adapter
from openvclip.checkpoints.api import load_checkpoint
from openvclip.checkpoints.file_kinds import kind_of_file
from openvclip.errors import (
    MissingDependencyError,
    ModelNameError,
    NonFiniteWeightsError,
    listed,
    near_path,
)
from openvclip.models import hub
from openvclip.models.building import building
from openvclip.models.model_names import unknown_model, unknown_weights
from openvclip.models.open_clip_config import remember_config
from openvclip.models.preprocess import transform_for
from openvclip.models.tokenizers import Tokenizer
from openvclip.towers.families import require_frames
from openvclip.towers.temporal import expand_temporal_attention
from openvclip.towers.view import Boundary
from openvclip.video.transforms import Transform
from openvclip.weights.interpolation import interpolate_into
from openvclip.weights.names import named_parameters, named_state
from openvclip.weights.numerics import non_finite_names

_SCHEMAS = ("local-dir:", "hf-hub:")  # of open_clip
_TRANSFORMERS = "transformers:"


@dataclass(frozen=True)
class LoadedModel:
    """A model with everything that an evaluation or a prediction needs.

    Attributes:
        name: the name of the model in tables.
        model: the model in eval mode, with the weights of the original CLIP.
        tokenizer: a function from a list of texts to token ids.
        transform: a transform from 8-bit frames to the input of the image tower.
        tuned: state dict of the fine-tuned model, or ``None``.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    transform: Transform
    tuned: dict[str, Tensor] | None = None

    def interpolate(self, lam: float | None) -> None:
        """Give the model the weights between those of the original CLIP and ``tuned``.

        Call this once: afterwards the model has no longer the weights of the original CLIP. Without
        ``tuned``, nothing changes.

        Args:
            lam: interpolation weight of the original CLIP. ``None``: 0, the fine-tuned model.
        """
        if self.tuned is not None:
            original = {name: value.clone() for name, value in named_state(self.model).items()}
            interpolate_into(self.model, original, self.tuned, lam or 0.0)


def load_model(
    name: str,
    pretrained: str | os.PathLike[str] | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    expand: bool | None = None,
    window: int = 1,
    boundary: Boundary = "zero",
    transform: str = "released",
    device: str | torch.device = "cpu",
    allow_missing: str | Iterable[str] = (),
    allow_unexpected: str | Iterable[str] = (),
) -> LoadedModel:
    """Build a CLIP model, load the original CLIP into it, and read a fine-tuned model.

    Args:
        name: a model of open_clip, such as ``"ViT-B-16-quickgelu"``; a JSON file with an open_clip
            model configuration; or a model that has weights. ``"local-dir:..."`` and
            ``"hf-hub:..."`` are loaded with open_clip. A folder that ``save_pretrained`` of
            transformers wrote, and ``"transformers:openai/clip-vit-base-patch32"``, a name on the
            Hugging Face Hub, are loaded with transformers.
        pretrained: the weights of the original CLIP: a tag of open_clip, such as ``"openai"``, or a
            file for :func:`openvclip.load_checkpoint`. ``None`` if the model has weights. Default:
            ``None``. A file does not store the mean and standard deviation of the pixels, so they
            are those of the first tag of the model (of ViT-L-14, ``laion2b_s32b_b82k`` has others:
            give the tag).
        checkpoint: a file of fine-tuned weights for :func:`openvclip.load_checkpoint`, or a folder
            of peft with a LoRA fine-tune of the original CLIP.
        expand: whether frames attend to neighbouring frames. ``False`` applies CLIP frame by frame.
            Default: ``True`` with a ``checkpoint``, ``False`` without a checkpoint, because the
            original CLIP was not trained with temporal attention.
        window: see :func:`openvclip.expand_temporal_attention`.
        boundary: see :func:`openvclip.expand_temporal_attention`.
        transform: ``"released"``, ``"clip"`` or ``"train"``; see
            :func:`openvclip.video.transforms.build`.
        device: the device of the model and of the fine-tuned weights.
        allow_missing: names of weights that ``checkpoint`` may lack; see
            :func:`openvclip.load_checkpoint`. Missing weights keep the values of the original CLIP.
        allow_unexpected: names of weights in ``checkpoint`` to ignore; see
            :func:`openvclip.load_checkpoint`.

    Raises:
        ModelNameError: ``name`` is not a model of open_clip or transformers; or ``pretrained`` is
            neither a file nor a tag of open_clip for this model; or the weights can't be
            downloaded; or the tokenizer can't be made.
        CheckpointError, StateMismatchError: a file can't be read, or does not fit the model.
        NonFiniteWeightsError: a weight is NaN or infinite. The error names the file.
        MissingDependencyError: the model needs transformers, which is not installed or too old.
        UnsupportedModelError: the image tower can't be expanded, or the model is no CLIP.
    """
    if checkpoint is not None:
        _require_weights(checkpoint)  # before the original CLIP is downloaded
    model, tokenizer, input_transform, known_name = _load_original(name, pretrained, transform)
    if expand or (expand is None and checkpoint is not None):
        expand_temporal_attention(model, window=window, boundary=boundary)
    tuned = None
    if checkpoint is not None:
        tuned = fine_tuned(
            model, checkpoint, allow_missing=allow_missing, allow_unexpected=allow_unexpected
        )
        tuned = {n: v.to(device) for n, v in tuned.items()}
    return LoadedModel(
        name=Path(known_name).name,
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        transform=input_transform,
        tuned=tuned,
    )


def _load_original(
    name: str, pretrained: str | os.PathLike[str] | None, transform: str
) -> tuple[Any, Tokenizer, Transform, str]:
    """Return the original CLIP, its tokenizer, its transform, and its name or folder."""
    of_transformers = transformers_name(name)
    if of_transformers is not None:
        try:
            from openvclip.models.hugging_face import load
        except ImportError as error:
            raise MissingDependencyError(
                f"{name} is loaded with transformers: pip install 'transformers>=5.6' ({error})."
            ) from error
        if pretrained is not None:
            raise ModelNameError(
                f"pretrained is {os.fspath(pretrained)!r}, but {name} has weights already. Leave "
                "pretrained out. For fine-tuned weights give checkpoint."
            )
        model, tokenizer, input_transform = load(of_transformers, transform)
        require_finite_weights(model, of_transformers)
        return model, tokenizer, input_transform, of_transformers
    known_name = _registered_name(name)
    model = _build(known_name, pretrained)
    require_frames(model)
    return model, _tokenizer(known_name), transform_for(model, transform), known_name


def fine_tuned(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    *,
    allow_missing: str | Iterable[str] = (),
    allow_unexpected: str | Iterable[str] = (),
) -> dict[str, Tensor]:
    """Return the state dict of a fine-tuned model. The weights of ``model`` do not change.

    Args:
        model: a model with the weights of the original CLIP, expanded or not.
        checkpoint: a file of fine-tuned weights for :func:`openvclip.load_checkpoint`, or a folder
            of peft with a LoRA fine-tune of ``model``.
        allow_missing: names of weights that the file may lack; see
            :func:`openvclip.load_checkpoint`. Missing weights keep the values of ``model``.
        allow_unexpected: names of weights in the file to ignore; see
            :func:`openvclip.load_checkpoint`.

    Raises:
        CheckpointError, StateMismatchError: the file can't be read, or does not fit the model.
        NonFiniteWeightsError: a weight is NaN or infinite.
    """
    if is_adapter(checkpoint):
        return _merged(model, checkpoint)
    original = {n: v.detach().clone() for n, v in named_state(model).items()}
    load_checkpoint(
        checkpoint, model, allow_missing=allow_missing, allow_unexpected=allow_unexpected
    )
    tuned = {n: v.detach().clone() for n, v in named_state(model).items()}
    model.load_state_dict(original)
    return tuned


def _merged(model: nn.Module, checkpoint: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict of a LoRA fine-tune of the model."""
    adapter = load_adapter(checkpoint)
    merged = adapter.merged(named_state(model))
    broken = non_finite_names({name: merged[name] for name in adapter.names})
    if broken:
        raise NonFiniteWeightsError(
            f"{checkpoint} holds NaN or infinity in {len(broken)} entries ({listed(broken)}). Use "
            "an earlier checkpoint of the run."
        )
    return {name: value.detach().clone() for name, value in merged.items()}


def _require_weights(checkpoint: str | os.PathLike[str]) -> None:
    """Raise an error if a fine-tuned model is no file of weights and no adapter."""
    if not is_adapter(checkpoint):
        kind_of_file(Path(checkpoint))


def brings_weights(name: str) -> bool:
    """Return whether a model of this name is loaded together with weights."""
    return name.startswith(_SCHEMAS) or transformers_name(name) is not None


def transformers_name(name: str) -> str | None:
    """Return the folder or the name on the Hub if a model is loaded with transformers, or ``None``.

    Args:
        name: see :func:`load_model`. A folder is one of transformers if its ``config.json`` has a
            ``model_type``.
    """
    if name.startswith(_TRANSFORMERS):
        return name.removeprefix(_TRANSFORMERS)
    if os.path.isfile(os.path.join(name, "open_clip_config.json")):
        return None  # config.json is the configuration of a text tower of transformers
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return name if isinstance(config, dict) and "model_type" in config else None


def name_of_transformers(name: str) -> str:
    """Return the name under which :func:`load_model` loads a model with transformers.

    Args:
        name: a folder that ``save_pretrained`` of transformers wrote, or a name on the Hub.
    """
    return name if transformers_name(name) is not None else f"{_TRANSFORMERS}{name}"


def _registered_name(name: str) -> str:
    """Return the name under which open_clip knows the model."""
    import open_clip

    if brings_weights(name):
        return name
    if Path(name).suffix == ".json":
        return _register(Path(name), name)
    if os.path.isdir(name):
        raise ModelNameError(
            f"{name}: this folder has no config.json with a model_type, so it is no model of "
            f"transformers. If open_clip wrote the folder, give 'local-dir:{name}'."
        )
    if name not in open_clip.list_models():
        raise unknown_model(name)
    return name


def _register(path: Path, name: str) -> str:
    """Register a model configuration with open_clip and return the name of the model."""
    import open_clip

    if not path.is_file():
        raise ModelNameError(
            f"{name}: no such file{near_path(path)}; expected an open_clip model configuration."
        )
    try:
        open_clip.add_model_config(path)
    except ValueError as error:
        raise ModelNameError(
            f"{name}: is not JSON ({error}); expected an open_clip model configuration."
        ) from error
    if path.stem not in open_clip.list_models():
        raise ModelNameError(
            f"{name}: is no open_clip model configuration; expected the entries embed_dim, "
            "vision_cfg and text_cfg."
        )
    return path.stem


def _build(name: str, pretrained: str | os.PathLike[str] | None) -> Any:
    """Build the model with the weights of the original CLIP."""
    import open_clip

    if brings_weights(name):
        model = _with_weights(name)
        require_finite_weights(model, name)
        remember_config(model, open_clip.get_model_config(name))
        return model
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag_list = listed(tags, 10) or "(open_clip has none)"
    if pretrained is None:
        raise ModelNameError(
            f"pretrained is None: {name} has no weights yet. Give a file of weights, or a tag of "
            f"open_clip: {tag_list}."
        )
    tag_or_file = os.fspath(pretrained)
    if tag_or_file in tags:
        return _download(name, tag_or_file)
    if Path(tag_or_file).exists():
        kind_of_file(Path(tag_or_file))  # raises before the model is built
    else:
        raise unknown_weights(tag_or_file, name, tags)
    # A file of weights does not store the mean and standard deviation of the pixels, so they are
    # those of the first tag. The tags of ViT-L-14 differ: laion2b_s32b_b82k has its own.
    config = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    preprocess = {key: config[key] for key in ("mean", "std") if key in config}
    with building():
        model = open_clip.create_model(
            name, load_weights=False, pretrained_text=False, force_preprocess_cfg=preprocess
        )
    load_checkpoint(tag_or_file, model)
    return model


def _with_weights(name: str) -> Any:
    """Build a model that open_clip loads together with its weights."""
    import open_clip

    of_hub = name.startswith(hub.PREFIX)
    repository = name.removeprefix(hub.PREFIX).partition("@")[0]
    if of_hub:
        hub.require_connection(repository)
    try:
        return open_clip.create_model(name)
    except (RuntimeError, OSError, ValueError) as error:
        hint = f" If transformers wrote the repository, give 'transformers:{repository}'."
        raise ModelNameError(
            f"open_clip can't load {name}: {str(error).rstrip('.')}.{hint if of_hub else ''}"
        ) from error


def _download(name: str, tag: str) -> Any:
    import open_clip

    repository = str(open_clip.get_pretrained_cfg(name, tag).get("hf_hub", ""))
    hub.require_connection("/".join(repository.split("/")[:2]))
    try:
        model = open_clip.create_model(name, pretrained=tag)
    except (RuntimeError, OSError) as error:
        raise ModelNameError(
            f"The weights {tag!r} of {name} can't be downloaded: {str(error).rstrip('.')}. Without "
            "a network connection, give a file of weights instead of a tag."
        ) from error
    require_finite_weights(model, tag)
    return model


def require_finite_weights(model: nn.Module, source: str) -> None:
    """Check that no parameter is NaN or infinite. Buffers may hold the -inf of attention masks."""
    names = non_finite_names(named_parameters(model))
    if names:
        raise NonFiniteWeightsError(
            f"The weights of {source} hold NaN or infinity in {len(names)} entries "
            f"({listed(names)}), so the model would compute NaN. Download or copy them again, or "
            "give another file."
        )


def _tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a model.

    Raises:
        ModelNameError: a package or a file of the tokenizer is missing.
    """
    import open_clip

    try:
        tokenizer: Tokenizer = open_clip.get_tokenizer(name)
    except (ImportError, OSError, ValueError) as error:
        raise ModelNameError(
            f"The tokenizer of {name} can't be made: {str(error).rstrip('.')}. Install the "
            "package that it needs, correct the configuration, or choose another model."
        ) from error
    return tokenizer
