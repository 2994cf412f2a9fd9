"""Write a model for videos into a folder that open_clip or transformers loads, and upload it.

:mod:`openvclip.models.folders` loads such folders.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from openvclip.checkpoints.atomic import atomic_folder, write_errors
from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.contract_files import CONTRACT_FILE, CONTRACT_KEY
from openvclip.checkpoints.model_files import save_model_file
from openvclip.checkpoints.paths import require_path
from openvclip.checkpoints.sharding import shard_names_in
from openvclip.checkpoints.texts import add_texts
from openvclip.errors import CheckpointError, UsageError, listed
from openvclip.models import hub, model_card, open_clip_folder, transformers_folder
from openvclip.models.finite import require_values
from openvclip.models.folders import RUN_CONFIG_FILE, STANDARD_WEIGHTS, StoredModel
from openvclip.models.open_clip_config import CONFIG_FILE, name_of_config
from openvclip.models.tokenizers import as_tokenizer
from openvclip.models.usage import expansion_section, library_of, public_name
from openvclip.models.versions import package_versions
from openvclip.weights.adapters import factor_names
from openvclip.weights.names import named_state, unwrap
from openvclip.weights.shards import is_sharded

CARD_FILE = "README.md"
"""The name of the file of the model card."""

_WEIGHTS_OR_INDEX = (".safetensors", ".bin", ".pth", ".index.json")
# Written for one model, and left over if another model replaces it.
_OWN_CONFIGS = {CONFIG_FILE, transformers_folder.CONFIG_FILE, transformers_folder.PIXELS_FILE}


@dataclass(frozen=True)
class SaveOptions:
    """How a model is written.

    Attributes:
        config: the open_clip configuration of the model: a dictionary, a JSON file, or a name in
            open_clip. Default: the configuration that it was loaded with, or the configuration of
            the model of open_clip that is like it.
        max_shard_size: bytes of the entries of a shard. Default: one file.
        title: name of the model in its card. Default: the name of the folder or the repository.
    """

    config: str | Mapping[str, Any] | None = None
    max_shard_size: int | None = None
    title: str | None = None

    def require_valid(self) -> None:
        """Raise :class:`UsageError` if a value is of another kind."""
        if not isinstance(self.config, (str, os.PathLike, Mapping, type(None))):
            raise UsageError(
                f"config={self.config!r}: expected a dictionary, a JSON file, or a name in "
                "open_clip."
            )
        title = "" if self.title is None else self.title
        if not isinstance(title, str) or title.encode(errors="ignore").decode() != title:
            raise UsageError(f"title={self.title!r}: expected a text.")


_USUAL = SaveOptions()


def save_stored(
    stored: StoredModel, folder: str | os.PathLike[str], options: SaveOptions = _USUAL
) -> None:
    """Write a model into a folder, atomically. See :meth:`openvclip.VideoCLIP.save_pretrained`.

    Raises:
        UsageError: the model has prompts, adapters or sharded weights; or its configuration is not
            known; or its tokenizer can't be saved.
        CheckpointError: the folder can't be written.
    """
    path = _folder(folder)
    options.require_valid()
    if path.is_file():
        raise CheckpointError(f"{path} is a file; expected the path of a folder.")
    with write_errors(path), atomic_folder(path, lambda new: _outdated(path, new)) as temporary:
        contract = _write_model(stored, temporary, options)
        if _may_write_card(path / CARD_FILE):
            card = model_card.card_of(contract, options.title or path.resolve().name, ".")
            (temporary / CARD_FILE).write_text(card, encoding="utf-8")


def push_stored(
    stored: StoredModel, repo: str, options: SaveOptions = _USUAL, **hub_options: Any
) -> str:
    """Write a model to a repository on the Hub. See :meth:`openvclip.VideoCLIP.push_to_hub`.

    Args:
        stored: the model.
        repo: the repository, such as ``"user/name"``.
        options: how the model is written.
        hub_options: the options of :func:`openvclip.models.hub.upload`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        UsageError: see :func:`save_stored`.
        HubError: there is no token, access is denied, or the Hub can't be reached.
    """
    hub.require_token(repo, hub_options.get("token"))
    options.require_valid()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        contract = _write_model(stored, folder, options, repo=repo)
        title = options.title or repo.rpartition("/")[2]
        card = model_card.card_of(contract, title, f"{hub.PREFIX}{repo}")
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        return hub.upload(folder, repo, keeps=_is_foreign_card, **hub_options)


def describe_folder(
    stored: StoredModel,
    folder: str | os.PathLike[str],
    weights: str,
    config: str | Mapping[str, Any] | None = None,
) -> None:
    """Write the contract, the configuration and the tokenizer beside files of weights, atomically.

    A training run has several files of weights in its folder. Afterwards
    ``VideoCLIP.from_pretrained(folder)`` loads the file ``weights``.

    Args:
        stored: the model.
        folder: the folder of the weights.
        weights: the name of the file of weights to use.
        config: see :class:`SaveOptions`.

    Raises:
        UsageError: the configuration is not known, or the tokenizer can't be saved.
        CheckpointError: the folder can't be written.
    """
    path = _folder(folder)
    weights = require_path(weights, "weights", "the name of a file of weights")
    options = SaveOptions(config)
    options.require_valid()
    with write_errors(path), atomic_folder(path) as temporary:
        stored = _prepared(stored)
        name = _write_config(stored, temporary, options, config_file=RUN_CONFIG_FILE)
        text = stored.contract.with_(weights=weights, model=name).to_json()
        (temporary / CONTRACT_FILE).write_text(f"{text}\n", encoding="utf-8")


def _write_model(
    stored: StoredModel, folder: Path, options: SaveOptions, repo: str | None = None
) -> Contract:
    """Write the files of a model but its card, and return the contract."""
    stored = _prepared(stored)
    model, library = stored.model, stored.contract.library
    _require_storable(model)
    contract = stored.contract.with_(model=_write_config(stored, folder, options, repo=repo))
    header = contract.with_(weights=None).to_json()
    if library == "transformers":
        weights = transformers_folder.write_weights(model, folder, options.max_shard_size)
        add_texts(folder / weights, {CONTRACT_KEY: header})
    else:
        weights = save_model_file(
            model.state_dict(),
            folder,
            open_clip_folder.WEIGHTS_STEM,
            metadata={"format": "pt", CONTRACT_KEY: header},
            max_shard_size=options.max_shard_size,
        )
    contract = contract.with_(weights=weights)
    (folder / CONTRACT_FILE).write_text(f"{contract.to_json()}\n", encoding="utf-8")
    return contract


def _prepared(stored: StoredModel) -> StoredModel:
    """Return a model without wrappers, and with what its contract says about the model itself."""
    model = unwrap(stored.model)
    contract = stored.contract.with_(
        library=library_of(model),
        expansion=expansion_section(model),
        versions=package_versions(),
    )
    return StoredModel(model, as_tokenizer(stored.tokenizer, model), contract)


def _write_config(
    stored: StoredModel,
    folder: Path,
    options: SaveOptions,
    *,
    repo: str | None = None,
    config_file: str = CONFIG_FILE,
) -> str:
    """Write the configuration and the tokenizer, and return the name of the architecture."""
    contract = stored.contract
    if library_of(stored.model) == "transformers":
        transformers_folder.write_config(stored.model, stored.tokenizer, folder, contract.pixels)
        return public_name(stored.model, contract.model)
    config = open_clip_folder.write_config(
        stored.model,
        stored.tokenizer,
        folder,
        contract.pixels,
        file=config_file,
        name=contract.model,
        config=options.config,
        repo=repo,
    )
    return name_of_config(config, contract.model)


def _folder(folder: object) -> Path:
    return Path(require_path(folder, "folder", "the path of a folder"))


def _require_storable(model: nn.Module) -> None:
    require_values(model)
    state = named_state(model)
    sharded = [name for name, value in state.items() if is_sharded(value)]
    if sharded:
        raise UsageError(
            f"The weights are sharded ({listed(sharded)}). Gather them in a file with "
            "openvclip.save_checkpoint(model.state_dict(), path), and load the file into a model "
            "that is not sharded."
        )
    prompts = [name for name in state if name.startswith("openvclip_prompts.")]
    if prompts:
        raise UsageError(
            f"The model has prompts ({listed(prompts)}), which open_clip and transformers can't "
            "load. Save the prompts alone with openvclip.prompting.save(model, path)."
        )
    factors = factor_names(state)
    if factors:
        raise UsageError(
            f"The model has adapters ({listed(factors)}). Merge them into the weights first: model "
            "= model.merge_and_unload() in peft. Or save the adapter alone with "
            "peft_model.save_pretrained(folder)."
        )


def _outdated(folder: Path, new: Collection[str]) -> set[str]:
    """Return the files of an older model of this library in a folder that the new files replace."""
    if not (folder / CONTRACT_FILE).is_file():
        return set()
    standard = {name for names in STANDARD_WEIGHTS.values() for name in names}
    shards = {
        shard
        for name in standard
        if (folder / name).is_file()
        for shard in shard_names_in(folder / name)
    }
    weights = {name for name in standard | shards if name.endswith(_WEIGHTS_OR_INDEX)}
    present = {entry.name for entry in folder.iterdir() if entry.is_file()}
    return present & (weights | _OWN_CONFIGS) - set(new)


def _may_write_card(path: Path) -> bool:
    try:
        return model_card.is_unchanged(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False


def _is_foreign_card(text: str) -> bool:
    return not model_card.is_unchanged(text)
