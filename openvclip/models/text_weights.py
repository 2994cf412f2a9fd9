"""The weights that text features come from: which entries they are, and whether they changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError
from openvclip.weights.hashing import weights_hash
from openvclip.weights.names import named_state
from openvclip.weights.numerics import common_dtype
from openvclip.weights.shards import any_process, is_sharded, local

TextSource = Literal["own", "original"]
"""The weights that encode the class names: those of the evaluated model, or the original CLIP."""

# The image towers of open_clip and of Hugging Face, and the prompts of an image tower.
_IMAGE_SIDE = ("visual.", "vision_model.", "visual_projection.", "openvclip_prompts.vision.")
_TEMPERATURE = ("logit_scale", "logit_bias", "temperature")


def text_names(names: Iterable[str]) -> list[str]:
    """Return the names of the entries that text features can depend on.

    These are all entries outside of the image tower, except the temperature. An entry of an unknown
    part of a model counts, so text features are never taken for independent of it.

    Args:
        names: canonical names of the state dict of a CLIP model of open_clip or Hugging Face.
    """
    return [n for n in names if not n.startswith(_IMAGE_SIDE) and n not in _TEMPERATURE]


def text_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the live entries of a model that its text features can depend on.

    Args:
        model: a CLIP model.

    Returns:
        The entries under canonical names; see :func:`text_names`. They share memory with the model.
    """
    state = named_state(model)
    return {name: state[name] for name in text_names(state)}


def same_text(theta_a: Mapping[str, Tensor], theta_b: Mapping[str, Tensor]) -> bool:
    """Return whether two models have the same text weights, bit for bit.

    If so, every interpolation of the two models has these text weights too.

    Args:
        theta_a: state dict of a model under canonical names.
        theta_b: state dict of another model with the same names.
    """
    names = text_names(theta_b)
    pairs = [(theta_a[name], theta_b[name]) for name in names if name in theta_a]
    differs = len(pairs) < len(names) or not all(_equal(a, b) for a, b in pairs)
    return not any_process([differs], [*theta_a.values(), *theta_b.values()])[0]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or is_sharded(a) != is_sharded(b):
        return False
    first, second = local(a), local(b)
    if first.dtype != second.dtype:
        dtype = common_dtype(first.dtype, second.dtype)
        first, second = first.to(dtype), second.to(dtype)
    return torch.equal(first.to(second.device), second)


def require_text_source(text: str) -> TextSource:
    """Return ``text``, or raise :class:`UsageError` unless it is a :data:`TextSource`."""
    known: tuple[TextSource, ...] = get_args(TextSource)
    for name in known:
        if text == name:
            return name
    raise UsageError(f"text={text!r}: expected {' or '.join(map(repr, known))}.")


def require_whole_text(state: Mapping[str, Tensor]) -> None:
    """Raise :class:`UsageError` if text weights are sharded: they can't encode class names.

    Args:
        state: live entries of a model under canonical names.
    """
    if any(is_sharded(state[name]) for name in text_names(state)):
        raise UsageError(
            "The text weights are sharded, so the class names can't be encoded outside of a "
            "forward pass of the whole classifier. Evaluate a model that is not sharded; "
            "openvclip.save_checkpoint gathers the weights in a file."
        )


class TextMark:
    """Remembers the text weights of a model, to notice later that they changed.

    Args:
        model: a CLIP model. Its text weights at this moment are remembered as a hash.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places, self._dtypes, self._hash = _places(model), _dtypes(model), _hash(model)

    def fits(self, model: nn.Module) -> bool:
        """Return whether the text weights of ``model`` surely have the remembered values."""
        return self._hash is not None and _hash(model) == self._hash

    def differs(self, model: nn.Module, *, quick: bool = False) -> bool:
        """Return whether the text weights of ``model`` surely have other values.

        Weights that were converted to another dtype may be the remembered weights.

        Args:
            model: a CLIP model.
            quick: whether to read the values only if PyTorch has recorded a write to the weights.
                PyTorch records no writes through ``parameter.data``.
        """
        if (quick and _places(model) == self._places) or _dtypes(model) != self._dtypes:
            return False
        present = _hash(model)
        return None not in (present, self._hash) and present != self._hash


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {value.dtype for value in text_state(model).values()}


def _places(model: nn.Module) -> list[tuple[int, int]]:
    """Return the address and the version of each text entry."""
    entries = (local(value) for value in text_state(model).values())
    return [(e.data_ptr(), -1 if e.is_inference() else e._version) for e in entries]


def _hash(model: nn.Module) -> str | None:
    """Return a hash of the text weights, or None for tensors without plain bytes (quantised).

    -0 and 0 have the same hash: an interpolation of two entries that are -0 can be 0.
    """
    try:
        # One entry at a time, because the sum is a copy.
        return "".join(weights_hash({n: v + 0}) for n, v in sorted(text_state(model).items()))
    except (RuntimeError, TypeError, NotImplementedError):
        return None
