"""The open_clip configuration of a model: find it, prove that it is right, and build from it.

A model of open_clip does not store its configuration. A configuration is right for a model if the
model that open_clip builds from it has the same modules, settings, names and shapes.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openvclip.errors import ModelNameError, UsageError, did_you_mean, listed, near_path
from openvclip.models.building import building

CONFIG_FILE = "open_clip_config.json"
"""The name of the file in which open_clip stores the configuration of a model."""

Config = dict[str, Any]
_PLAIN = (int, float, str, bool, tuple, type(None))
# Attributes that do not belong to the configuration: modes, the preprocessing, the place of a file.
_NOT_CONFIGURED = {
    "training",
    "grad_checkpointing",
    "image_mean",
    "image_std",
    "output_dict",
    "name_or_path",
    "_openvclip_config",
}


def remember_config(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Store the configuration that a model was built from, so that :func:`config_of` finds it."""
    model.__dict__["_openvclip_config"] = copy.deepcopy(dict(config))


def config_of(
    model: nn.Module, name: str | None = None, given: str | Mapping[str, Any] | None = None
) -> Config:
    """Return the open_clip configuration of a model.

    Args:
        model: a model of open_clip, expanded or not.
        name: name of the model in open_clip, if it is known. Default: the models of open_clip are
            searched.
        given: the configuration, a JSON file that holds the configuration, or the name of a model
            of open_clip. Default: the configuration is searched.

    Raises:
        UsageError: ``given`` builds another model; or no model of open_clip is like ``model``.
        ModelNameError: ``given`` is neither a file nor a model of open_clip.
    """
    if given is not None:
        config = read_config(given) if isinstance(given, str) else dict(given)
        difference = first_difference(model, config)
        if difference:
            raise UsageError(
                f"The given open_clip configuration builds another model: {difference}. Give "
                "config= with the configuration that the model was created from."
            )
        return config
    for config in _candidates(model, name):
        if not first_difference(model, config):
            return config
    what = first_difference(model, open_clip_config(name)) if _is_known(name) else ""
    reason = f" It is not {name} of open_clip: {what}." if what else ""
    raise UsageError(
        f"The open_clip configuration of this {type(model).__name__} is not known, so open_clip "
        f"could not load the folder.{reason} Give config= with the dictionary, the JSON file or "
        "the name in open_clip that the model was created from."
    )


def read_config(source: str) -> Config:
    """Return the configuration of a model of open_clip, or of a JSON file.

    Args:
        source: a name, a JSON file as :func:`openvclip.models.load_model` takes it, or an
            ``open_clip_config.json``.

    Raises:
        ModelNameError: there is no such model or file, or the file is no configuration.
    """
    if not source.endswith(".json"):
        if not _is_known(source):
            import open_clip

            raise ModelNameError(
                f"open_clip has no model {source!r}{did_you_mean(source, open_clip.list_models())}."
                " Expected a name of open_clip.list_models(), or a JSON file."
            )
        return open_clip_config(source)
    path = Path(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelNameError(f"{source}: can't be read ({error}){near_path(path)}.") from error
    except ValueError as error:
        raise ModelNameError(
            f"{source}: is not JSON ({error}); expected an open_clip model configuration. Copy or "
            "download it again."
        ) from error
    config = content.get("model_cfg", content) if isinstance(content, dict) else None
    parts = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(config, dict) or any(part not in config for part in parts):
        raise ModelNameError(
            f"{source}: is no open_clip model configuration; expected the entries embed_dim, "
            "vision_cfg and text_cfg."
        )
    return config


def open_clip_config(name: str | None) -> Config:
    """Return a copy of the configuration of a model of open_clip."""
    import open_clip

    config: Config = open_clip.get_model_config(name)
    return config


def name_of_config(config: Mapping[str, Any], name: str) -> str:
    """Return the name of the model of open_clip that has a configuration.

    Args:
        config: the configuration.
        name: the name to prefer, and to return if open_clip has no such model.
    """
    import open_clip

    known = open_clip.list_models()
    names = [name, *known] if name in known else known
    return next((other for other in names if open_clip_config(other) == config), name)


def build(
    config: Mapping[str, Any], preprocess: Mapping[str, Any] | None = None, device: str = "cpu"
) -> Any:
    """Return an open_clip model without trained weights.

    Args:
        config: the configuration of the model.
        preprocess: the preprocessing of its images, as in ``open_clip_config.json``.
        device: the device. On ``"meta"`` the model has shapes and no values.

    Raises:
        ModelNameError: open_clip can't build the model.
    """
    import open_clip

    content = {"model_cfg": dict(config), "preprocess_cfg": dict(preprocess or {})}
    with tempfile.TemporaryDirectory() as folder, building():
        Path(folder, CONFIG_FILE).write_text(json.dumps(content), encoding="utf-8")
        try:
            with torch.device(device):
                model = open_clip.create_model(
                    f"local-dir:{folder}",
                    load_weights=False,
                    pretrained_text=False,
                    pretrained_image=False,
                    device=device,
                )
        except Exception as error:  # a wrong configuration raises errors of many kinds
            reason = str(error).strip() or type(error).__name__
            raise ModelNameError(
                f"open_clip can't build the model of this configuration: {reason.rstrip('.')}."
            ) from error
    remember_config(model, config)
    return model


def first_difference(model: nn.Module, config: Mapping[str, Any]) -> str:
    """Return the first difference between a model and the model of a configuration, in words.

    The text is empty if both have the same modules, settings, names and shapes. The values of the
    weights are not compared.
    """
    try:
        with _own_text_config(model, config) as own:
            other = build(own, device="meta")
    except ModelNameError as error:
        return str(error).rstrip(".")
    shapes, wanted = _shapes(model), _shapes(other)
    if shapes.keys() != wanted.keys():
        names = sorted(shapes.keys() ^ wanted.keys())
        return f"only one of them has {listed(names)}"
    for name, shape in shapes.items():
        if shape != wanted[name]:
            return f"{name} has the shape {shape} in the model and {wanted[name]} in the other"
    modules, others = dict(model.named_modules()), dict(other.named_modules())
    if modules.keys() != others.keys():
        return f"only one of them has the module {listed(sorted(modules.keys() ^ others.keys()))}"
    for name, module in modules.items():
        difference = _difference(module, others[name])
        if difference:
            return f"{difference} in {name or 'the model'}"
    return ""


@contextmanager
def _own_text_config(model: Any, config: Mapping[str, Any]) -> Iterator[Config]:
    """Yield a configuration whose text tower of transformers needs no request to the Hub."""
    own = copy.deepcopy(dict(config))
    text_config = getattr(getattr(model, "text", None), "config", None)
    if "hf_model_name" not in own.get("text_cfg", {}) or text_config is None:
        yield own
        return
    with tempfile.TemporaryDirectory() as folder:
        text_config.save_pretrained(folder)
        own["text_cfg"]["hf_model_name"] = folder
        yield own


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    state = model.state_dict(keep_vars=True)
    return {n: list(v.shape) for n, v in state.items() if isinstance(v, torch.Tensor)}


def _difference(module: nn.Module, other: nn.Module) -> str:
    kind, wanted = _plain_class(module), _plain_class(other)
    if kind is not wanted:
        return f"{kind.__name__} is not {wanted.__name__}"
    settings, others = _settings(module), _settings(other)
    for name in sorted(settings.keys() & others.keys()):
        if settings[name] != others[name]:
            return f"{name} is {settings[name]!r} and not {others[name]!r}"
    return ""


def _plain_class(module: nn.Module) -> type:
    """Return the class of a module, without the changes of an expansion or of ``fully_shard``."""
    kinds, changed = type(module).__mro__, ("openvclip.", "torch.distributed.")
    return next((k for k in kinds if not k.__module__.startswith(changed)), kinds[0])


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, texts and tuples among the attributes of a module."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and name not in _NOT_CONFIGURED
    }


def _is_known(name: str | None) -> bool:
    import open_clip

    return name in open_clip.list_models()


def _candidates(model: nn.Module, name: str | None) -> Iterator[Config]:
    """Yield the configurations that can be those of a model, the likeliest first."""
    import open_clip

    remembered = vars(model).get("_openvclip_config")
    if remembered is not None:
        yield copy.deepcopy(remembered)
    if _is_known(name):
        yield open_clip_config(name)
    for other in open_clip.list_models():
        config = open_clip_config(other)
        if other != name and _may_be(model, config):
            yield config


def _may_be(model: Any, config: Config) -> bool:
    """Return whether a configuration has the sizes of a model, as far as they are read at once."""
    visual, text = model.visual, getattr(model, "text", model)
    vision_config, text_config = config["vision_cfg"], config["text_cfg"]
    size = getattr(visual, "image_size", None)
    size = size[0] if isinstance(size, (tuple, list)) else size
    if size != vision_config.get("image_size", 224):
        return False
    if hasattr(visual, "trunk") != ("timm_model_name" in vision_config):
        return False
    if ("hf_model_name" in text_config) != hasattr(getattr(text, "transformer", None), "config"):
        return False
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is not None and len(blocks) != vision_config.get("layers", 12):
        return False
    blocks = getattr(getattr(text, "transformer", None), "resblocks", None)
    return blocks is None or len(blocks) == text_config.get("layers", 12)
