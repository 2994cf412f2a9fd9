"""The contract of a model on the command line: it decides the options that are not given.

A model that was trained with openvclip says how it is used. An option that contradicts the contract
is an error, unless ``--override`` is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvclip.errors import ContractError, UsageError
from openvclip.video.sampling import BY_NUMBER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from openvclip.checkpoints.contract import Contract
    from openvclip.models.loading import LoadedModel


def use_contract(options: argparse.Namespace, ignored: Collection[str] = ()) -> None:
    """Read the contract of the model that the options name, and set the options that it decides.

    The options need the attributes ``checkpoint``, ``model``, ``override`` and ``given``.

    Afterwards ``options.contract`` is the contract with which the model is used, or ``None``.
    Call this first: other checks read the options that the contract sets.

    Args:
        options: the options of a command that runs a model.
        ignored: names of options that the contract does not decide for this command.

    Raises:
        UsageError: an option that is given contradicts the contract, and ``--override`` is not
            given.
        ContractError: there is a contract and it can't be read.
        CheckpointError: a file of weights can't be read.
    """
    contract, source = _contract_of(options)
    options.contract = contract
    if contract is None:
        if options.override:
            raise UsageError(
                "--override has no effect on a model without a contract. Leave it out."
            )
        return
    for name, value in _decided(contract).items():
        if name in ignored or not hasattr(options, name):
            continue
        if name not in options.given:
            setattr(options, name, value)
        elif not options.override and not _agree(name, getattr(options, name), value):
            raise UsageError(
                f"--{_flag(name, getattr(options, name))} contradicts the contract of the model: "
                f"{source} was trained with {_flag(name, value)}. Leave the option out, or give "
                "--override to use it all the same."
            )
    options.contract = _effective(contract, options)


def options_for_files(
    options: argparse.Namespace,
    paths: Sequence[Path],
    *,
    expand: bool,
    ignored: Collection[str] = (),
) -> argparse.Namespace:
    """Return the options with which files of weights are used that share one model.

    Args:
        options: the options of a command that takes several files, with the attributes
            ``override`` and ``given``. They are not changed.
        paths: the files of weights.
        expand: whether the command uses the files with temporal attention.
        ignored: see :func:`use_contract`.

    Returns:
        The options, with the attribute ``contract``: the contract of the files, or ``None``.

    Raises:
        UsageError: an option or ``expand`` contradicts the contract, and ``--override`` is not
            given.
        ContractError, CheckpointError: see :func:`use_contract`; or the contracts differ.
    """
    from openvclip.checkpoints.contract_files import merged_contract, read_contract

    files = [(path, read_contract(path) if path.is_file() else None) for path in paths]
    contract = merged_contract(files, override=options.override)
    if contract is None:
        return argparse.Namespace(**{**vars(options), "contract": None})
    source = next(path for path, known in reversed(files) if known is not None)
    if expand != (contract.expansion is not None) and not options.override:
        used, trained = ("with", "without") if expand else ("without", "with")
        raise UsageError(
            f"{source} is to be used {used} temporal attention, but its contract says that it was "
            f"trained {trained} it. Give --override to use it all the same."
        )
    chosen = argparse.Namespace(**{**vars(options), "checkpoint": source, "expand": expand})
    chosen.given = {*options.given, "expand"}
    use_contract(chosen, ignored)
    return chosen


def _contract_of(options: argparse.Namespace) -> tuple[Contract | None, Path]:
    """Return the contract of the weights that the options name, and the file or folder."""
    from openvclip.checkpoints.contract_files import read_contract

    if options.checkpoint is not None:
        path: Path = options.checkpoint
        _require_no_configuration(path)
        return (read_contract(path) if path.is_file() else None), path
    if "model" not in options.given:
        return None, Path()
    from openvclip.models.folders import downloaded_folder

    folder = downloaded_folder(options.model)
    return (None if folder is None else read_contract(folder)), folder or Path()


def _require_no_configuration(path: Path) -> None:
    """Raise an error for a JSON file that holds no contract and is no index of shards."""
    from openvclip.checkpoints.contract import Contract
    from openvclip.checkpoints.sharding import is_index

    if path.suffix == ".json" and path.is_file() and not is_index(path):
        try:
            Contract.from_json(path.read_text(encoding="utf-8"), str(path))
        except ContractError as error:
            raise UsageError(
                f"--checkpoint {path} is a JSON file; expected a file of weights. Give the "
                "configuration of a model as --model, and its weights as --checkpoint or "
                "--pretrained."
            ) from error


def load_with_contract(
    options: argparse.Namespace, contract: Contract, device: torch.device
) -> LoadedModel:
    """Load a model as its contract says.

    The original CLIP is loaded only if it has an effect: if ``--lam`` or ``--pretrained`` is given,
    or the original text tower encodes the class names. The model then has the weights of the
    original CLIP, and ``tuned`` has the weights of the fine-tuned model.

    Args:
        options: the options, after :func:`use_contract`.
        contract: the contract with which the model is used.
        device: the device of the model.

    Raises:
        UsageError: the original CLIP is needed and its weights are not known; or they are not the
            weights from which the model was trained, and ``--override`` is not given.
    """
    from openvclip.models.folders import load_stored
    from openvclip.models.loading import LoadedModel
    from openvclip.models.usage import expand_as, expansion_section, transform_of
    from openvclip.towers.temporal import restore_spatial_attention

    stored = load_stored(options.checkpoint or options.model)
    model = stored.model
    if expansion_section(model) not in (None, contract.expansion):
        restore_spatial_attention(model)  # with --override
    expand_as(model, contract)
    tuned = None
    if options.lam not in (None, []) or "pretrained" in options.given or options.text != "own":
        tuned = _replace_by_original(model, contract, options)
    return LoadedModel(
        name=contract.model,
        model=model.to(device),
        tokenizer=stored.tokenizer,
        transform=transform_of(contract),
        tuned=None if tuned is None else {name: value.to(device) for name, value in tuned.items()},
    )


def _replace_by_original(
    model: nn.Module, contract: Contract, options: argparse.Namespace
) -> dict[str, Tensor]:
    """Load the original CLIP into a fine-tuned model, and return the fine-tuned weights."""
    from openvclip.checkpoints.api import load_checkpoint
    from openvclip.models.folders import load_stored
    from openvclip.models.loading import brings_weights, load_model
    from openvclip.weights.names import named_state

    tuned = {name: value.detach().clone() for name, value in named_state(model).items()}
    base, pretrained = contract.base, options.pretrained
    if pretrained is None and (base is None or not brings_weights(base.name)):
        raise UsageError(
            "The original CLIP is needed for these options, and the contract of the model does not "
            "say where its weights are. Give --pretrained: a tag of open_clip, a file or a folder."
        )
    if pretrained is not None and Path(pretrained).is_file():
        load_checkpoint(pretrained, model)
    elif pretrained is not None and Path(pretrained).is_dir():
        model.load_state_dict(load_stored(pretrained).model.state_dict())
    else:
        name = contract.model if base is None else base.name
        model.load_state_dict(load_model(name, pretrained).model.state_dict())
    if not options.override:
        require_base(model, contract, f"The weights {pretrained}")
    return tuned


def require_base(model: nn.Module, contract: Contract, what: str) -> None:
    """Check that a model has the weights of the original CLIP that a contract names.

    Args:
        model: the model.
        contract: the contract of a fine-tuned model.
        what: the weights of the model, for the error.

    Raises:
        UsageError: the contract has a hash of the weights, and the weights have another hash.
    """
    from openvclip.weights.hashing import weights_hash
    from openvclip.weights.names import named_state

    known = None if contract.base is None else contract.base.weights_hash
    if known is not None and weights_hash(named_state(model)) != known:
        raise UsageError(
            f"{what} are not those from which the model was trained: their hash differs from the "
            "hash in the contract. Give the right file with --pretrained, or give --override to "
            "use these weights all the same."
        )


def _decided(contract: Contract) -> dict[str, Any]:
    """Return the values of the options that a contract decides, by the name of the option."""
    frames, pixels, base = contract.frames, contract.pixels, contract.base
    values: dict[str, Any] = {
        "model": contract.model,
        "expand": contract.expansion is not None,
        "text": contract.text,
        "templates": contract.templates,
        "frames": frames.num_frames,
        "views": frames.views,
        "sampler": frames.sampler,
        "transform": pixels.name,
        "short_side": pixels.short_side,
        "crops": pixels.crops,
        "method": contract.method,
    }
    if contract.expansion is not None:
        values |= {"window": contract.expansion.window, "boundary": contract.expansion.boundary}
    if frames.sampler not in BY_NUMBER:
        values |= {"sampling_rate": frames.sampling_rate, "target_fps": frames.target_fps}
    # An original CLIP that is not known is not replaced by the default of the option.
    values["pretrained"] = None if base is None else base.pretrained
    return values


def _agree(name: str, given: Any, decided: Any) -> bool:
    """Return whether an option that is given says what the contract says."""
    from openvclip.models.labels import read_labels

    if name == "model":  # a JSON file or a folder is named after the model, or holds the contract
        return given == decided or Path(given).stem == decided or Path(given).is_dir()
    if name == "templates":
        return tuple(read_labels(given)) == tuple(decided)
    if name == "pretrained":  # the weights of a file are compared when they are loaded
        return decided is None or given == decided or Path(given).exists()
    return bool(given == decided)


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if name == "expand":
        return flag if value else f"no-{flag}"
    if name == "templates" and isinstance(value, tuple):
        more = f" and {len(value) - 1} more" if len(value) > 1 else ""
        return f"{flag} {value[0]!r}{more}"
    return f"{flag} {value}"


def _effective(contract: Contract, options: argparse.Namespace) -> Contract:
    """Return the contract with the options that override it."""
    from dataclasses import replace

    from openvclip.checkpoints.contract import Expansion
    from openvclip.models.labels import read_labels

    def value(name: str, default: Any) -> Any:
        return getattr(options, name, default)

    present, frames, pixels = contract.expansion, contract.frames, contract.pixels
    expansion = None
    if value("expand", present is not None):
        present = present or Expansion()
        window, boundary = value("window", present.window), value("boundary", present.boundary)
        expansion = Expansion(window, boundary, present.layers)
    frames = replace(
        frames,
        num_frames=value("frames", frames.num_frames),
        sampling_rate=value("sampling_rate", frames.sampling_rate),
        target_fps=value("target_fps", frames.target_fps),
        sampler=value("sampler", frames.sampler),
        views=value("views", frames.views),
    )
    pixels = replace(
        pixels,
        name=value("transform", pixels.name),
        short_side=value("short_side", pixels.short_side),
        crops=value("crops", pixels.crops),
    )
    templates = value("templates", contract.templates)
    if not isinstance(templates, tuple):
        templates = tuple(read_labels(templates))
    return contract.with_(
        expansion=expansion,
        frames=frames,
        pixels=pixels,
        templates=templates,
        text=value("text", contract.text),
    )
