"""What ``openvclip evaluate`` does differently for a retrieval protocol."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from openvclip.cli.options.contract import use_contract
from openvclip.cli.options.models import require_effects
from openvclip.commands.parsing import refuse_unused
from openvclip.errors import UsageError
from openvclip.video import retrieval

if TYPE_CHECKING:
    from openvclip.video.retrieval import RetrievalSet
    from openvclip.video.transforms import Transform

_WHY = "with a retrieval protocol, which"
_UNUSED = {
    **dict.fromkeys(
        ("views", "sampler", "sampling_rate"),
        f"{_WHY} takes one frame for each second (--frames sets how many at most)",
    ),
    **dict.fromkeys(("crops", "short_side"), f"{_WHY} takes the centre of each frame"),
    "templates": f"{_WHY} encodes captions as they are",
    **dict.fromkeys(("classes", "per_class", "confusion"), f"{_WHY} has no classes"),
}


OWN = "captions"
"""The name of ``--protocol`` for captions of one's own."""
NAMES: tuple[str, ...] = (*retrieval.PROTOCOLS, OWN)
"""The names of ``--protocol`` that are retrieval."""


def is_retrieval(options: argparse.Namespace) -> bool:
    """Return whether ``--protocol`` names a retrieval protocol."""
    return any(name in NAMES for name in options.protocol)


def check_retrieval(options: argparse.Namespace) -> None:
    """Check the options of a retrieval protocol, and apply the contract of the model.

    The contract decides everything but the frames, which the protocol decides, and the pixels, if
    ``--transform`` is given.

    Raises:
        UsageError: an option has no effect, or options contradict each other.
    """
    if len(set(options.protocol)) > 1:
        raise UsageError(
            f"--protocol {' '.join(options.protocol)}: expected one retrieval protocol. Run one "
            "command for each data set."
        )
    own = "with captions of your own, which are complete" if OWN in options.protocol else ""
    refuse_unused(options.given, {**_UNUSED, "allow_incomplete": own})
    use_contract(options, ignored=options.given & {"frames", "transform"})
    require_effects(options)


def test_set_of(options: argparse.Namespace) -> RetrievalSet:
    """Return the test set that the options name.

    All videos must exist, unless ``--allow-missing-videos`` is given.

    Raises:
        AnnotationError, ProtocolError: the annotation files are not valid.
        VideoNotFoundError: captions are of videos that are missing.
    """
    from openvclip.evaluation import require_captioned

    if OWN in options.protocol:
        test_set = retrieval.from_captions(options.annotations, videos=options.videos)
    else:
        test_set = retrieval.load(
            options.protocol[0],
            annotations=options.annotations,
            videos=options.videos,
            allow_incomplete=options.allow_incomplete,
        )
    sampling = test_set.sampling.with_(backend=options.backend)
    if "frames" in options.given:
        sampling = sampling.with_(num_frames=options.frames)
    if not options.allow_missing_videos:
        require_captioned(test_set, str(options.videos))
    return test_set._replace(sampling=sampling)


def pixels_of(options: argparse.Namespace, transform: Transform) -> Transform:
    """Return the transform of the protocol for a model.

    The frames are resized as in the preprocessing of CLIP. ``--transform`` chooses another way. A
    model whose frames are squashed to a square, such as SigLIP, keeps its transform.

    Args:
        options: the options.
        transform: the transform of the model, with its size, mean and standard deviation.
    """
    if transform.name.startswith("squash"):
        return transform
    name = options.transform if "transform" in options.given else "clip"
    return transform.with_(name=name, short_side=None, crops=1)


def setting(test_set: RetrievalSet, transform: Transform, pooling: str) -> str:
    """Return the setting of a retrieval result in words. Results depend on it by several points."""
    frames, last = test_set.sampling.num_frames, test_set.sampling.last_second
    until = "" if last is None else f", up to second {last}"
    words = "whole captions"
    if test_set.words is not None:
        words = f"at most {test_set.words} tokens of a caption"
    return (
        f"at most {frames} frames of a video, one for each second{until}; {words}; "
        f"pixels {transform.name!r}, {transform.size} x {transform.size}; pooling {pooling!r}"
    )
