"""Options of the subcommands that use an index of videos, and its model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from openvclip.cli.options.contract import use_contract
from openvclip.cli.options.models import (
    add_frame_options,
    add_lam_option,
    add_model_options,
    amp_of,
    device_of,
    load,
    pooling_of,
    pretrained_of,
    require_effects,
    sampling_of,
    templates_of,
)
from openvclip.commands.parsing import refuse_unused
from openvclip.errors import UsageError

if TYPE_CHECKING:
    from openvclip.models.video_clip import VideoCLIP
    from openvclip.search import Index, ModelSource

_NAMES = frozenset({"model", "pretrained", "checkpoint"})
_USES = (
    "expand",
    "override",
    "window",
    "boundary",
    "allow_missing",
    "allow_unexpected",
    "lam",
    "frames",
    "sampling_rate",
    "transform",
)


_ABOUT = """\
The index knows its model and how the model is used. Give --model only if
the model is in another place now."""
_ABOUT_NEW = """\
A new index needs a model. Later commands need none of these options,
because the index knows its model. If the model was moved, --model records
the new place in the index."""


def add_library_model_options(parser: argparse.ArgumentParser, *, new: bool = False) -> None:
    """Add the options for the model of an index.

    Args:
        parser: the parser.
        new: whether the subcommand can make an index.
    """
    default = "the model of the index"
    if new:
        default += (
            "; for a new index %(default)s, or the model that the checkpoint was trained from"
        )
    add_model_options(parser, labels=False, about=_ABOUT_NEW if new else _ABOUT, default=default)
    add_lam_option(parser)
    add_frame_options(parser, views=False)


def open_index(path: Path, options: argparse.Namespace) -> Index:
    """Open an index with the model that the options name, or else with its own model.

    Args:
        path: the folder of the index.
        options: the options of :func:`add_library_model_options`.

    Raises:
        UsageError: an option has no effect.
        SearchError: there is no index, or another model made it.
        OpenVCLIPError: the model can't be loaded.
    """
    return open_index_and_source(path, options)[0]


def open_index_and_source(
    path: Path, options: argparse.Namespace
) -> tuple[Index, ModelSource | None]:
    """Open an index as :func:`open_index` does.

    Returns:
        The index, and where the weights are that the options name; ``None`` if they name none.

    Raises:
        OpenVCLIPError: see :func:`open_index`.
    """
    from openvclip.search import Index

    if names_model(options):
        index = Index.open(path)  # a wrong path is reported before the model is loaded
        model, source = load_video_clip(options)
        return Index.open(index.path, model), source
    reason = "without --model: the index knows how its model is used"
    refuse_unused(options.given, dict.fromkeys(_USES, reason))
    return Index.open(path, device=device_of(options), autocast=amp_of(options)), None


def names_model(options: argparse.Namespace) -> bool:
    """Return whether the options name a model."""
    return not _NAMES.isdisjoint(options.given)


def load_video_clip(options: argparse.Namespace) -> tuple[VideoCLIP, ModelSource | None]:
    """Load the model that the options describe.

    Returns:
        The model, and where its weights are; ``None`` if that can't be written down.

    Raises:
        UsageError: an option has no effect, or contradicts the contract of the model.
        OpenVCLIPError: the model can't be loaded.
    """
    from openvclip.checkpoints.contract_sections import Base
    from openvclip.models.usage import contract_of
    from openvclip.models.video_clip import VideoCLIP

    use_contract(options)
    require_effects(options)
    if options.text != "own":
        raise UsageError(
            "The contract of the model says that texts are encoded by the original CLIP, whose "
            "weights the model does not hold, so it can't find videos by a sentence. Choose a "
            "model that encodes texts itself."
        )
    source = _source_of(options)
    loaded = load(options)
    loaded.interpolate(options.lam)
    contract = options.contract
    if contract is None:
        base = None if source is None else Base(loaded.name, _file_name(source.pretrained))
        contract = contract_of(
            loaded.model,
            loaded.name,
            loaded.transform,
            sampling=sampling_of(options),
            templates=templates_of(options),
            pooling=pooling_of(options),
            base=base,
        )
    model = VideoCLIP(loaded.model, loaded.tokenizer, autocast=amp_of(options), contract=contract)
    return model, source


def _source_of(options: argparse.Namespace) -> ModelSource | None:
    """Return where the weights are that the options describe, if an index can load them again."""
    from openvclip.search import ModelSource
    from openvclip.search.recorded import whole_path

    def whole(value: object) -> str | None:
        return None if value is None else whole_path(str(value))

    given, model = options.given, whole_path(options.model)
    if options.contract is not None:  # the original CLIP would be needed too
        mixed = options.lam is not None or "pretrained" in given
        return None if mixed else ModelSource(whole(options.checkpoint) or model)
    if not {"allow_missing", "allow_unexpected"}.isdisjoint(given):
        return None
    return ModelSource(model, whole(pretrained_of(options)), whole(options.checkpoint), options.lam)


def _file_name(source: str | None) -> str | None:
    return None if source is None else Path(source).name
