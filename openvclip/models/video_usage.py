"""How a model is used on videos: the frames, the pixels, the texts and the pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from openvclip.checkpoints.contract import Contract
from openvclip.errors import PromptingError, UsageError, VideoOptionError
from openvclip.models.classifier import (
    VIDEO_TEMPLATES,
    Template,
    TextClassifier,
    require_templates,
)
from openvclip.models.features import require_clip
from openvclip.models.preprocess import transform_for
from openvclip.models.usage import pooling_of, sampling_of, text_source_of, transform_of
from openvclip.towers.prompted import is_prompted
from openvclip.towers.view import Pooling, require_pooling
from openvclip.video.sampling import PAPER_SAMPLING, Sampling
from openvclip.video.transforms import Transform

__all__ = ["VideoUsage", "name_of", "require_usable", "usage_for"]


_MOST_VALUES = 2**32  # of the input of one video, which is in memory as a whole


@dataclass(frozen=True)
class VideoUsage:
    """How a model is used on videos. The attributes are those of :class:`openvclip.VideoCLIP`."""

    sampling: Sampling
    transform: Transform
    templates: tuple[Template, ...]
    pooling: Pooling


def usage_for(
    model: nn.Module,
    contract: Contract | None,
    sampling: Sampling | None = None,
    transform: Transform | None = None,
    templates: Sequence[Template] | None = None,
    pooling: Pooling | None = None,
) -> VideoUsage:
    """Return the settings that are given; for the others, those of the contract or the defaults.

    Args:
        model: a CLIP model of open_clip or transformers.
        contract: the contract of the model, or ``None``.
        sampling: see :class:`openvclip.VideoCLIP`.
        transform: see :class:`openvclip.VideoCLIP`.
        templates: see :class:`openvclip.VideoCLIP`.
        pooling: see :class:`openvclip.VideoCLIP`.

    Raises:
        VideoOptionError, UsageError, ClassNamesError: see :class:`openvclip.VideoCLIP`.
    """
    if sampling is None:
        sampling = PAPER_SAMPLING if contract is None else sampling_of(contract)
    if transform is None:
        transform = transform_for(model) if contract is None else transform_of(contract)
    if templates is None:
        templates = VIDEO_TEMPLATES if contract is None else contract.templates
    if pooling is None:
        pooling = "unit_frames" if contract is None else pooling_of(contract)
    _require_fixed(sampling, transform)
    require_pooling(pooling)
    return VideoUsage(sampling, transform, require_templates(templates), pooling)


def require_usable(model: nn.Module, contract: Contract | None) -> None:
    """Check that a model with its contract can be used as a VideoCLIP.

    Raises:
        UsageError, PromptingError, UnsupportedModelError: see :class:`openvclip.VideoCLIP`.
    """
    if isinstance(model, TextClassifier):
        raise UsageError(
            f"model is a {type(model).__name__}; expected a CLIP model. Pass classifier.model, or "
            "call openvclip.predict(classifier, video)."
        )
    if is_prompted(model) or hasattr(model, "openvclip_prompts"):
        raise PromptingError(
            "The model has prompts, which VideoCLIP does not support. Create an "
            "openvclip.prompting.VideoClassifier, and call openvclip.predict(classifier, video). "
            "To hand the model over, save the prompts with openvclip.prompting.save(model, path), "
            "and give the model without prompts with the file."
        )
    require_clip(model)
    if contract is not None and not isinstance(contract, Contract):
        raise UsageError(
            f"contract is {contract!r}; expected a Contract, such as "
            "openvclip.checkpoints.read_contract(path) returns."
        )
    if contract is not None and text_source_of(contract) == "original":
        raise UsageError(
            "The contract says that class names are encoded by the original CLIP, whose text "
            "weights the model does not hold. Create a ZeroShotClassifier with text_features= of "
            "the original CLIP, or give the model the text weights of the original CLIP and "
            'contract.with_(text="own").'
        )


def _require_fixed(sampling: Sampling, transform: Transform) -> None:
    """Raise :class:`VideoOptionError` unless the settings give each video one input, of some size.

    Two predictions of one video must not differ, and the input must fit into memory.
    """
    if not isinstance(sampling, Sampling):
        raise VideoOptionError(
            f"sampling is {sampling!r}; expected openvclip.video.Sampling(num_frames=8, ...)."
        )
    if not isinstance(transform, Transform):
        raise VideoOptionError(
            f"transform is {transform!r}; expected openvclip.models.transform_for(model), or "
            "openvclip.video.transforms.build(name, size): the contract stores the transform."
        )
    values = sampling.views * sampling.num_frames * transform.crops * 3 * transform.size**2
    if values > _MOST_VALUES:
        raise VideoOptionError(
            f"A video would be {values:,} numbers: {sampling.views} views of "
            f"{sampling.num_frames} frames, {transform.crops} crops, {transform.size} pixels. "
            f"Expected at most {_MOST_VALUES:,} (16 GiB). Give fewer frames, views or pixels."
        )
    if transform.random:
        raise VideoOptionError(
            f"transform is {transform.name!r}, which is random. Give "
            'transform.with_(name="released", short_side=None).'
        )
    if sampling.sampler == "dense":
        raise VideoOptionError(
            "sampling has the sampler 'dense', which starts at random frames. Give "
            'sampling.with_(sampler="released"), which takes the same frames at fixed places.'
        )


def name_of(model: nn.Module) -> str:
    """Return the name that a model of transformers was loaded from, or the name of its class."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
