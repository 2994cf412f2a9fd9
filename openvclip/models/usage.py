"""Turn the contract of a model into a sampling, a transform and an expanded model, and back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from openvclip.checkpoints.contract import Contract, Expansion, Frames, Library, Pixels
from openvclip.errors import (
    ClassNamesError,
    ContractError,
    ExpansionOptionError,
    UsageError,
    VideoOptionError,
)
from openvclip.models.classifier import VIDEO_TEMPLATES, Template
from openvclip.models.text_weights import TextSource, require_text_source
from openvclip.models.versions import package_versions
from openvclip.towers.temporal import expand_temporal_attention, expansion_of, is_expanded
from openvclip.towers.view import Pooling, require_pooling
from openvclip.video import transforms
from openvclip.video.sampling import PAPER_SAMPLING, Backend, Sampling
from openvclip.video.transforms import Transform


def contract_of(
    model: nn.Module,
    name: str,
    transform: Transform,
    *,
    sampling: Sampling = PAPER_SAMPLING,
    templates: Sequence[Template] = VIDEO_TEMPLATES,
    pooling: Pooling = "unit_frames",
    **facts: Any,
) -> Contract:
    """Return the contract of a model that is used with these settings.

    The temporal attention is read from the model.

    Args:
        model: an open_clip model or a model of transformers, expanded or not.
        name: name of the architecture in its library.
        transform: the transform from 8-bit frames to the input of the model.
        sampling: the frames of a video.
        templates: texts of a class, with ``{}`` for its name.
        pooling: how the features of frames become the feature of a clip.
        facts: other attributes of the contract, such as ``method`` and ``lam``; see
            :class:`openvclip.checkpoints.Contract`.

    Raises:
        ContractError: ``transform`` is random, or an attribute has a value of another kind.
        ClassNamesError: a template is a function, which can't be stored.
    """
    return Contract(
        library=library_of(model),
        model=public_name(model, name),
        expansion=expansion_section(model),
        frames=frames_section(sampling),
        pixels=pixels_section(transform),
        templates=_texts(templates),
        pooling=pooling,
        versions=package_versions(),
        **facts,
    )


def library_of(model: nn.Module) -> Library:
    """Return the library that defines the class of a model: transformers, or else open_clip."""
    bases = type(model).__mro__
    in_transformers = any(base.__module__.partition(".")[0] == "transformers" for base in bases)
    return "transformers" if in_transformers else "open_clip"


def public_name(model: nn.Module, name: str) -> str:
    """Return a name that means something to others: not the folder that a model was loaded from.

    Args:
        model: a model of any library.
        name: the name of the model, which can be a folder if the model is of transformers.
    """
    is_folder = Path(name).exists() or name.startswith((".", os.sep))
    return type(model).__name__ if is_folder and library_of(model) == "transformers" else name


def expansion_section(model: nn.Module) -> Expansion | None:
    """Return the temporal attention of a model, or ``None`` if the model is not expanded."""
    settings = expansion_of(model) if is_expanded(model) else None
    return None if settings is None else Expansion(**vars(settings))


def frames_section(sampling: Sampling) -> Frames:
    """Return the frames of a sampling. The library that decodes is left out.

    Raises:
        ContractError: the sampling has a ``last_second``, which is of one data set alone.
    """
    values = asdict(sampling)
    values.pop("backend")
    last = values.pop("last_second")
    if last is not None:
        raise ContractError(
            f"sampling has last_second={last}, which can't be stored with a model. Give "
            "sampling.with_(last_second=None)."
        )
    return Frames(**values)


def pixels_section(transform: Transform) -> Pixels:
    """Return the pixels of a transform.

    Raises:
        ContractError: the transform is random.
    """
    if transform.random:
        raise ContractError(
            f"transform is {transform.name!r}, which is random; a model is used with a fixed "
            'transform. Give transform.with_(name="released", short_side=None).'
        )
    short_side = None if transform.short_side is None else transform.short_side[0]
    return Pixels(
        transform.name, transform.size, transform.mean, transform.std, short_side, transform.crops
    )


def sampling_of(contract: Contract, backend: Backend = "pyav") -> Sampling:
    """Return the sampling of a contract.

    Args:
        contract: the contract of a model.
        backend: the library that decodes.

    Raises:
        ContractError: the contract names a sampler that this version of openvclip does not know.
    """
    with _errors_of_contract():
        return Sampling(**_values(contract.frames), backend=backend)


def transform_of(contract: Contract) -> Transform:
    """Return the transform of a contract.

    Args:
        contract: the contract of a model.

    Raises:
        ContractError: the contract names a transform that this version of openvclip does not know,
            or its numbers do not fit together.
    """
    with _errors_of_contract():
        return transforms.build(**_values(contract.pixels))


def pooling_of(contract: Contract) -> Pooling:
    """Return the pooling of a contract.

    Raises:
        ContractError: the contract names a pooling that this version of openvclip does not know.
    """
    with _errors_of_contract():
        return require_pooling(contract.pooling)


def text_source_of(contract: Contract) -> TextSource:
    """Return which weights encode the class names: ``"own"`` or ``"original"``.

    Raises:
        ContractError: the contract names weights that this version of openvclip does not know.
    """
    with _errors_of_contract():
        return require_text_source(contract.text)


def expand_as(model: nn.Module, contract: Contract) -> None:
    """Expand the temporal attention of a model as a contract says, in place.

    A model that is expanded with the same settings stays as it is.

    Args:
        model: a model that :func:`openvclip.expand_temporal_attention` supports.
        contract: the contract of the model.

    Raises:
        ContractError: the model is expanded with other settings, or the contract names a boundary
            that this version of openvclip does not know.
        UnsupportedModelError: the model has no tower that can be expanded.
    """
    present, wanted = expansion_section(model), contract.expansion
    if present == wanted:
        return
    if present is not None or wanted is None:
        raise ContractError(
            f"The model is expanded with {present}; its contract has {wanted}. Call "
            "openvclip.restore_spatial_attention(model) first."
        )
    with _errors_of_contract():
        expand_temporal_attention(model, **_values(wanted))


def _values(section: Expansion | Frames | Pixels) -> dict[str, Any]:
    return asdict(section)


def _texts(templates: Sequence[Template]) -> tuple[str, ...]:
    functions = [template for template in templates if not isinstance(template, str)]
    if functions:
        raise ClassNamesError(
            f"templates holds {functions[0]!r}, a function, which can't be stored with a model; "
            "give texts with {} for the class name."
        )
    return tuple(str(template) for template in templates)


@contextmanager
def _errors_of_contract() -> Iterator[None]:
    """Context manager that raises errors about settings as errors about the contract."""
    try:
        yield
    except (VideoOptionError, ExpansionOptionError, UsageError) as error:
        raise ContractError(
            f"The contract of the model can't be used: {error} If the model was made by a newer "
            "openvclip, update openvclip."
        ) from error
