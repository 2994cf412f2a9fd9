"""Load a model for videos from a folder, from the Hugging Face Hub, or by its name in open_clip.

A folder holds the weights, the configuration of the library that defines the model, its tokenizer,
and the contract (``openvclip.json``). :mod:`openvclip.models.saving` writes such folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvclip.checkpoints.atomic import finish_folder
from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.contract_files import CONTRACT_FILE, CONTRACT_KEY, read_contract
from openvclip.checkpoints.contract_sections import Base
from openvclip.checkpoints.folders import advice_for_folder
from openvclip.checkpoints.formats import read_texts
from openvclip.checkpoints.paths import require_path
from openvclip.checkpoints.sharding import shard_names_in
from openvclip.errors import (
    CheckpointError,
    ContractError,
    ModelNameError,
    UsageError,
    did_you_mean,
    listed,
    near_path,
)
from openvclip.models import hub, open_clip_folder, transformers_folder
from openvclip.models import loading as named_models
from openvclip.models.features import usable_device
from openvclip.models.open_clip_config import (
    CONFIG_FILE,
    name_of_config,
    open_clip_config,
)
from openvclip.models.preprocess import (
    image_processor_of,
    released_or_square,
    transform_for,
)
from openvclip.models.tokenizers import tokenizer_of_folder
from openvclip.models.usage import contract_of, expand_as

RUN_CONFIG_FILE = "model_config.json"
"""open_clip's configuration in the folder of a training run.

The folder of a run holds several files of weights. With open_clip's own name for the configuration,
open_clip would load one of them without a choice.
"""
_LOCAL = "local-dir:"
_HUB = (hub.PREFIX, "transformers:")
_SOURCES = "the folder of a model, 'hf-hub:user/name', or the name of a model of open_clip"

STANDARD_WEIGHTS = {
    "open_clip": open_clip_folder.STANDARD_WEIGHTS,
    "transformers": transformers_folder.STANDARD_WEIGHTS,
}
"""The usual names of the files of weights, by library, the first that exists."""


@dataclass(frozen=True)
class StoredModel:
    """A model that was loaded, with what is needed to use it on videos.

    Attributes:
        model: the model in eval mode, expanded as its contract says.
        tokenizer: function from a list of texts to token ids.
        contract: how the model is used. A model without a contract of its own has the released
            settings.
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    contract: Contract


def with_facts(contract: Contract, facts: Mapping[str, Any]) -> Contract:
    """Return a contract with other values of some attributes.

    Raises:
        UsageError: the contract has no such attribute, or the attribute is read from the model.
        ContractError: a value is of another kind.
    """
    fixed = {"library", "expansion", "weights", "versions", "unknown"}
    names = [entry.name for entry in fields(Contract) if entry.name not in fixed]
    for name in facts:
        if name not in names:
            raise UsageError(
                f"{name}={facts[name]!r}: the contract of a model has no {name}"
                f"{did_you_mean(name, names)}. Expected one of {', '.join(names)}."
            )
    return contract.with_(**facts)


def load_stored(
    source: str | os.PathLike[str],
    pretrained: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **hub_options: Any,
) -> StoredModel:
    """Load a model for videos. See :meth:`openvclip.VideoCLIP.from_pretrained`.

    Args:
        source: a folder, a file of weights in a folder, ``"hf-hub:user/name"``, or the name of a
            model of open_clip.
        pretrained: with a name of open_clip: a tag of open_clip, or a file of weights.
        device: the device of the model.
        dtype: the dtype of the weights. Default: float32.
        hub_options: attributes of :class:`openvclip.models.hub.HubSource`.
    """
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise UsageError(
            f"dtype={dtype!r}; expected a floating-point dtype such as torch.bfloat16."
        )
    device = usable_device(device)
    text = require_path(source, "source", _SOURCES)
    if pretrained is not None:
        pretrained = require_path(pretrained, "pretrained", "a tag of open_clip, or a file")
    is_named = text.endswith(".json") or (pretrained is not None and text in _known_names())
    is_stored = text.startswith((*_HUB, _LOCAL)) or (not is_named and os.path.exists(text))
    if is_stored and pretrained is not None:
        raise UsageError(
            f"pretrained={pretrained!r} with {text}: this source has weights of its "
            "own. Leave pretrained out, or give the name of a model of open_clip."
        )
    if text.startswith(_HUB):
        prefix = next(prefix for prefix in _HUB if text.startswith(prefix))
        origin = hub.HubSource(text.removeprefix(prefix), prefix=prefix, **hub_options)
        stored = _load_folder(hub.download(origin, _weights_to_download), name=origin.repo)
    elif is_stored:
        folder = require_path(text.removeprefix(_LOCAL), "source", _SOURCES)
        stored = _load_folder(Path(folder))
    elif _looks_like_path(text):
        raise CheckpointError(
            f"There is no folder {text}{near_path(text)}; expected the folder of a model, "
            "'hf-hub:user/name', or the name of a model of open_clip with pretrained=."
        )
    else:
        stored = _load_named(text, pretrained)
    model = stored.model.to(device=device, dtype=dtype).eval()
    return replace(stored, model=model)


def downloaded_folder(source: str) -> Path | None:
    """Return the folder of a model that may have a contract, or ``None``.

    Args:
        source: a folder; a name on the Hub, which is downloaded; or another name of a model.

    Raises:
        HubError: the repository can't be downloaded.
    """
    for prefix in _HUB:
        if source.startswith(prefix):
            return hub.download(
                hub.HubSource(source.removeprefix(prefix), prefix=prefix), _weights_to_download
            )
    folder = Path(source.removeprefix(_LOCAL))
    return folder if folder.is_dir() else None


def _looks_like_path(text: str) -> bool:
    """Return whether a source is meant as a folder that does not exist."""
    if text.endswith(".json") or not os.path.dirname(text):
        return False
    return os.path.isabs(text) or text.startswith((".", "~")) or os.path.isdir(text.split("/")[0])


def _load_named(name: str, pretrained: str | os.PathLike[str] | None) -> StoredModel:
    """Load a model by its name in open_clip. A file of weights may have a contract."""
    loaded = named_models.load_model(name, pretrained)
    is_file = pretrained is not None and os.path.isfile(pretrained)
    contract = read_contract(pretrained) if is_file and pretrained is not None else None
    if contract is None:
        base = Base(loaded.name, None if pretrained is None else Path(pretrained).name)
        contract = contract_of(loaded.model, loaded.name, loaded.transform, base=base)
    expand_as(loaded.model, contract)
    return StoredModel(loaded.model, loaded.tokenizer, contract)


def _known_names() -> list[str]:
    import open_clip

    names: list[str] = open_clip.list_models()
    return names


def _load_folder(path: Path, name: str | None = None) -> StoredModel:
    """Load the model of a folder, or of a file of weights in a folder."""
    if not path.exists():
        raise CheckpointError(
            f"There is no folder {path}{near_path(path)}; expected the folder of a model."
        )
    folder = path if path.is_dir() else path.parent
    _finish(folder)
    contract = read_contract(path)
    weights = path if path.is_file() else weights_of(folder, contract)
    contract = _agreed(contract, weights)
    library = _library(folder, contract)
    load = _load_transformers if library == "transformers" else _load_open_clip
    stored = load(folder, weights, contract, name or folder.resolve().name)
    if contract is None and name is not None:  # a model of the Hub, perhaps the start of a training
        stored = replace(stored, contract=stored.contract.with_(base=Base(name)))
    expand_as(stored.model, stored.contract)
    return stored


def _load_open_clip(
    folder: Path, weights: Path, contract: Contract | None, name: str
) -> StoredModel:
    config, preprocess = _open_clip_config(folder, contract)
    model = open_clip_folder.load_model(config, preprocess, weights, folder)
    tokenizer = open_clip_folder.load_tokenizer(config, folder)
    if contract is None:
        contract = contract_of(model, name_of_config(config, name), transform_for(model))
    return StoredModel(model, tokenizer, contract)


def _load_transformers(
    folder: Path, weights: Path, contract: Contract | None, name: str
) -> StoredModel:
    model = transformers_folder.load_model(folder, weights)
    tokenizer = tokenizer_of_folder(model, str(folder))
    if contract is None:
        pixels = released_or_square(model, image_processor_of(str(folder)))
        contract = contract_of(model, name, pixels)
    return StoredModel(model, tokenizer, contract)


def _finish(folder: Path) -> None:
    try:
        finish_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} holds a model that was not saved to its end, and its last files can't be "
            f"moved ({error}). Give write access to the folder, or save the model again."
        ) from error


def weights_of(folder: Path, contract: Contract | None) -> Path:
    """Return the file that stands for the weights of a folder; see :func:`choose_weights`.

    Args:
        folder: the folder of a model.
        contract: the contract of the folder.

    Raises:
        CheckpointError: there is none, or several and no contract names one.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    chosen = choose_weights(names, contract, str(folder))
    if chosen is None:
        advice = advice_for_folder(folder)
        raise CheckpointError(
            f"{folder} holds no weights; expected the folder of a model, as "
            f"VideoCLIP.save_pretrained or a training run writes it. {advice}".rstrip()
        )
    return folder / chosen


def choose_weights(names: Collection[str], contract: Contract | None, folder: str) -> str | None:
    """Return the file that stands for the weights among the files of a folder, or ``None``.

    The file that the contract names comes first, then the names that open_clip and transformers
    have for weights, then the only file of weights.

    Args:
        names: the names of the files.
        contract: the contract of the folder.
        folder: the folder, for errors.

    Raises:
        CheckpointError: the file that the contract names is missing; or there are several files
            of weights, and nothing names one.
    """
    if contract is not None and contract.weights is not None:
        if contract.weights not in names:
            raise CheckpointError(
                f"{folder} has no file {contract.weights}, which its {CONTRACT_FILE} names as the "
                "weights. Copy or download the folder again."
            )
        return contract.weights
    preferred = [
        name
        for library, standard in STANDARD_WEIGHTS.items()
        for name in standard
        if contract is None or contract.library == library
    ]
    for name in preferred:
        if name in names:
            return name
    whole = [name for name in names if _is_weights(name)]
    if len(whole) > 1:
        raise CheckpointError(
            f"{folder} holds {len(whole)} files of weights ({listed(whole, 10)}), and no "
            f"{CONTRACT_FILE} that names one of them. Give the path of one file."
        )
    return whole[0] if whole else None


def _agreed(contract: Contract | None, weights: Path) -> Contract | None:
    """Return the contract of a folder, after a comparison with the header of the weights.

    Raises:
        ContractError: both say different things about the use of the model.
    """
    text = read_texts(weights).get(CONTRACT_KEY)
    if text is None:
        return contract
    stored = Contract.from_json(text, str(weights))
    if contract is None:
        return stored
    difference = contract.difference(stored)
    if difference is None:
        return contract
    name, value, other = difference
    beside = weights.with_name(CONTRACT_FILE)
    raise ContractError(
        f"{beside} has {name} = {value!r}, but the header of {weights.name} has {other!r}. If "
        f"{weights.name} was replaced, remove {CONTRACT_FILE}: the header is enough. To use other "
        "settings, load the model, change them there and save the model again; don't edit the file."
    )


def _library(folder: Path, contract: Contract | None) -> str:
    """Return the library that builds the model of a folder."""
    has_config = (folder / transformers_folder.CONFIG_FILE).is_file()
    if contract is not None:
        if contract.library == "transformers" and not has_config:
            raise ContractError(
                f"{folder / CONTRACT_FILE} is the contract of a model of transformers, but the "
                "folder holds no config.json. Copy the whole folder again."
            )
        return contract.library
    if any((folder / name).is_file() for name in (CONFIG_FILE, RUN_CONFIG_FILE)):
        return "open_clip"
    if has_config:
        return "transformers"
    raise CheckpointError(
        f"{folder} says nothing about its model: it has no {CONTRACT_FILE}, no {CONFIG_FILE} and "
        "no config.json. Give the name of the open_clip model and the file: "
        "VideoCLIP.from_pretrained('ViT-B-16', pretrained='weights.safetensors')."
    )


def _open_clip_config(
    folder: Path, contract: Contract | None
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    for name in (CONFIG_FILE, RUN_CONFIG_FILE):
        if (folder / name).is_file():
            return open_clip_folder.read_folder_config(folder, name)
    assert contract is not None
    if contract.model not in _known_names():
        raise ModelNameError(
            f"{folder} holds no {CONFIG_FILE}, and open_clip has no model {contract.model!r}. Copy "
            f"{CONFIG_FILE} or {RUN_CONFIG_FILE} into the folder."
        )
    values = {"mean": list(contract.pixels.mean), "std": list(contract.pixels.std)}
    return open_clip_config(contract.model), values


def _weights_to_download(folder: Path, names: list[str]) -> list[str]:
    """Return the files of weights of a model on the Hub; ``folder`` holds its small files."""
    chosen = choose_weights(names, read_contract(folder), "the repository")
    if chosen is None:
        raise CheckpointError(
            f"The repository holds no file of weights that is known. Its files are "
            f"{listed(names, 10)}. Expected the repository of a model of open_clip or transformers."
        )
    return [chosen, *sorted(shard_names_in(folder / chosen))]


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".pt", ".pth", ".bin", ".ckpt"))
