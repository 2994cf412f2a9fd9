"""Evaluate a model on text-to-video retrieval: find the video of a sentence, and the reverse."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import EvaluationError, VideoNotFoundError, listed, near_path
from openvclip.evaluation.mixture import Mixture
from openvclip.evaluation.ranking import dual_softmax, retrieval_metrics
from openvclip.evaluation.retrieval_results import RetrievalEvaluation, RetrievalScore
from openvclip.evaluation.video_pass import RunOptions, VideoPass, missing_videos
from openvclip.models.classifier import encode_texts
from openvclip.models.features import require_clip, scale_of
from openvclip.models.preprocess import transform_for
from openvclip.models.short_texts import shortened
from openvclip.models.text_cache import cached_features
from openvclip.models.tokenizers import as_tokenizer, tokens_of
from openvclip.video.retrieval import RetrievalSet
from openvclip.video.transforms import Transform

__all__ = ["evaluate_retrieval", "require_captioned"]

_TEXTS = 256  # captions that are encoded at a time


def evaluate_retrieval(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    test_set: RetrievalSet,
    videos: str | os.PathLike[str],
    *,
    mixture: Mixture | None = None,
    transform: Transform | None = None,
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> RetrievalEvaluation:
    """Evaluate a model on a retrieval protocol, in both directions.

    The protocol is that of CLIP4Clip with mean pooling. The frames are one for each second of a
    video, at most ``test_set.sampling.num_frames``. The feature of a video is the mean of its
    L2-normalised frame features, L2-normalised again. A caption is encoded as it is, without a
    template, and cut to ``test_set.words`` tokens. A similarity is the cosine times the scale of
    the model; the bias of SigLIP is left out, because it is the same for all pairs.

    Each video is decoded once, and encoded once for each λ of ``mixture``. Under ``torchrun``, or
    within a process group, each process encodes a part of the videos. Every process returns the
    whole result.

    Args:
        model: a CLIP of open_clip or transformers, expanded or not, with the weights of the
            original CLIP. On exit the model has its original weights, bitwise.
        tokenizer: a function from a list of texts to token ids, or a tokenizer of transformers.
        test_set: the result of :func:`openvclip.video.retrieval.load`, or videos and captions of
            your own.
        videos: the folder of the videos. The paths of ``test_set`` are relative to this folder.
        mixture: the weights to evaluate; see :func:`openvclip.evaluation.evaluate_protocol`. The
            captions are encoded once for each λ if the text weights of both models differ.
        transform: a transform from 8-bit frames to the input of the model. Default: the protocol,
            which is the preprocessing of CLIP (bicubic) at the image size of the model.
        out: folder for the results; see :func:`openvclip.evaluation.evaluate_protocol`.
        run: batch size, worker processes, progress bar and treatment of videos that can't be read.
            By default such a video is found by no caption, and finds none: its ranks are the worst.
            With ``leave_out_broken``, the video and its captions are left out. Default:
            ``RunOptions()``.

    Raises:
        VideoNotFoundError: ``videos`` does not exist, or captions are of videos that are missing.
            The error says how many, and which.
        EvaluationError: ``test_set`` has no videos, a video without captions or a video twice, or
            all videos are left out.
        RecordsError, UsageError, StateMismatchError, NonFiniteWeightsError, VideoOptionError: see
            :func:`openvclip.evaluation.evaluate_protocol`.

    Source: the released code of CLIP4Clip (``meanP``).
    """
    require_clip(model)
    mixture, run = mixture or Mixture(), run or RunOptions()
    root = os.fspath(videos)
    _require_captions(test_set)
    if not run.allow_missing:
        require_captioned(test_set, root)
    tokenize = as_tokenizer(tokenizer, model)
    if test_set.words is not None:
        tokenize = shortened(tokenize, test_set.words)
    captions = [caption for texts in test_set.captions for caption in texts]
    starts = range(0, len(captions), _TEXTS)
    tokens = [tokens_of(tokenize, captions[i : i + _TEXTS]) for i in starts]
    transform = transform or transform_for(model, "clip")
    job = VideoPass(test_set.videos, root, mixture, test_set.sampling, transform, out, run)
    encoded = job.encode(model, lambda: _caption_features(model, tokens))
    counted = _Counted(test_set, encoded.errors, run.leave_out_broken)
    weights: list[float | None] = [*mixture.lams] or [None]
    scales = _scales(model, mixture)
    scores = {
        lam: counted.score(encoded.texts[i].float().cpu(), encoded.features[:, i], scales[i])
        for i, lam in enumerate(weights)
    }
    settings = {**encoded.settings, "words": test_set.words, "captions": len(captions)}
    return RetrievalEvaluation(test_set.name, scores, encoded.failures, encoded.timing, settings)


def require_captioned(test_set: RetrievalSet, root: str) -> None:
    """Check that all videos of a test set exist.

    Args:
        test_set: videos and captions.
        root: the folder of the videos.

    Raises:
        VideoNotFoundError: the folder or videos do not exist. The error says how many videos and
            captions, which videos, and what to do.
    """
    missing = missing_videos(test_set.videos, root)
    if not missing:
        return
    names = set(missing)
    pairs = zip(test_set.videos, test_set.captions, strict=True)
    lost = sum(len(texts) for video, texts in pairs if video in names)
    total = sum(map(len, test_set.captions))
    near = near_path(os.path.join(root, missing[0]))
    raise VideoNotFoundError(
        f"{len(missing)} of {len(test_set.videos)} videos, with {lost} of {total} captions, are "
        f"not in {root}: {listed(missing, 10)}{near}. Videos are searched for by their names, in "
        "all subfolders and with all extensions of videos. Check the folder, get the missing "
        "videos, or allow missing videos (--allow-missing-videos, allow_missing=True). A missing "
        "video then has the worst rank; with --leave-out-broken (leave_out_broken=True), the video "
        "and its captions are left out."
    )


def _require_captions(test_set: RetrievalSet) -> None:
    videos, captions = test_set.videos, test_set.captions
    if not videos or len(videos) != len(captions):
        raise EvaluationError(
            f"The test set {test_set.name!r} has {len(videos)} videos and captions of "
            f"{len(captions)} videos; expected a list of captions for each video, and at least one "
            "video."
        )
    bare = [video for video, texts in zip(videos, captions, strict=True) if not texts]
    twice = [video for video, n in Counter(videos).items() if n > 1]
    for found, what in ((bare, "without captions"), (twice, "listed more than once")):
        if found:
            raise EvaluationError(
                f"The test set {test_set.name!r} has videos {what} ({len(found)}): "
                f"{listed(found, 10)}. Each video needs one list of captions."
            )


def _caption_features(model: nn.Module, tokens: Sequence[Tensor]) -> Tensor:
    return cached_features(model, tokens, lambda: encode_texts(model, tokens))


@torch.no_grad()
def _scales(model: nn.Module, mixture: Mixture) -> list[float]:
    """Return the scale of the logits at each λ."""
    scales = []
    with mixture.setters(model) as setters:
        for set_weights in setters:
            set_weights()
            scales.append(float(scale_of(model)))
    return scales


class _Counted:
    """The videos and captions of a test set that are counted.

    Args:
        test_set: videos and captions.
        broken: the indices of the videos that can't be read.
        leave_out: whether these videos and their captions are left out.

    Raises:
        EvaluationError: no video can be read.
    """

    def __init__(self, test_set: RetrievalSet, broken: Collection[int], leave_out: bool) -> None:
        counts = torch.tensor([len(texts) for texts in test_set.captions])
        self._readable = torch.tensor([i not in broken for i in range(len(counts))])
        if not self._readable.any():
            raise EvaluationError(
                f"None of the {len(counts)} videos of {test_set.name!r} can be read, so there is "
                "nothing to rank. Check the folder of the videos."
            )
        self._videos = self._readable if leave_out else torch.ones_like(self._readable)
        self._texts = self._videos.repeat_interleave(counts)
        self._left_out = int((~self._videos).sum())
        self._several = test_set.several or bool((counts > 1).any())
        self._counts = counts[self._videos]

    def score(self, texts: Tensor, videos: Tensor, scale: float) -> RetrievalScore:
        """Score features at one λ.

        Args:
            texts: features of all captions ``[K, D]``, unit length.
            videos: means of the frame features of all videos ``[N, D]``; NaN if a video is broken.
            scale: the scale of the logits.
        """
        texts = texts[self._texts]
        units = functional.normalize(videos, dim=-1)[self._videos]
        readable = self._readable[self._videos]
        # A broken video is at the end of each ranking, and all captions are tied for it.
        plain = torch.full((len(texts), len(units)), float("-inf"))
        weighed = plain.clone()
        found = scale * texts @ units[readable].T
        plain[:, readable] = found
        weighed[:, readable] = dual_softmax(found)
        counts = self._counts.tolist() if self._several else None
        return RetrievalScore(
            retrieval_metrics(plain, counts),
            retrieval_metrics(weighed, counts),
            n_texts=len(texts),
            n_videos=len(units),
            left_out=self._left_out,
            similarities=plain,
        )
