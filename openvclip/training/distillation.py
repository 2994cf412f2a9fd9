"""Residual feature distillation (FROSTER)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import RegularizationError, UsageError
from openvclip.training.original import unit
from openvclip.weights.arguments import as_float, is_whole, seeded_generator

__all__ = ["FeatureDistillation"]


class FeatureDistillation(nn.Module):
    r"""Keep the features of a CLIP near those of the original CLIP, up to a learned residual.

    A feature of the trained model is normalised to unit length, :math:`z`. A projector changes it
    to :math:`z' = z + r P(z)` with :math:`P` = linear, GELU, linear, both without bias. The loss is
    ``weight`` times :math:`(1 - \cos(z'_{image}, z^0_{image})) + (1 - \cos(z'_{text},
    z^0_{text}))`, where :math:`z^0` are features of the original CLIP. Images and texts each have
    a projector. The first part is the mean over all frames, the second the mean over all texts.

    The projectors are parameters: give them to the optimizer with those of the model. They are
    needed in training alone. The classifier uses the features without the projectors. ::

        distillation = openvclip.training.FeatureDistillation(width=512)
        original = openvclip.training.OriginalCLIP(model)
        frames = openvclip.towers.encode_frames(model, video)
        loss = cross_entropy + distillation.loss(frames, original.frames(video))

    Source: Huang et al., ICLR 2024 (FROSTER).

    Args:
        width: length D of a feature.
        weight: factor of the loss. FROSTER: 2.
        residual: factor r of the projector's output. FROSTER: 0.1.
        seed: seed of the first layer of each projector, which is drawn from the normal distribution
            of Kaiming. The last layer is zero, so that :math:`z' = z` at the start.

    Attributes:
        images: the projector of images.
        texts: the projector of texts.
        weight: as the argument.

    Raises:
        RegularizationError: ``width`` is below 1, or a number is negative or not finite.
        UsageError: ``seed`` is no whole number.
    """

    def __init__(
        self, width: int, *, weight: float = 2.0, residual: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        require_at_least_zero(weight=weight, residual=residual)
        if not is_whole(width, 1):
            raise RegularizationError(
                f"width={width!r}: expected the length of a feature, such as 512."
            )
        self.weight, self.width = float(weight), width
        generator = seeded_generator(seed)
        self.images = ResidualProjector(width, residual, generator)
        self.texts = ResidualProjector(width, residual, generator)

    def loss(
        self,
        images: Tensor,
        original_images: Tensor,
        texts: Tensor | None = None,
        original_texts: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            images: features of frames by the trained model, ``[..., D]``, of any length, such as
                those of :func:`openvclip.towers.encode_frames`.
            original_images: features of the same frames by the original CLIP, ``[..., D]``, of any
                length; see :meth:`OriginalCLIP.frames <openvclip.training.OriginalCLIP.frames>`.
            texts: features of texts by the trained model, ``[K, D]``. Default: the loss has no text
                part, for a text tower that is not trained.
            original_texts: features of the same texts by the original CLIP, ``[K, D]``.

        Raises:
            UsageError: an argument is no tensor; two tensors that belong together have different
                shapes; their last dimension is not ``width``; or one of the two is missing.
        """
        result: Tensor = self(images, original_images, texts, original_texts)
        return result

    def forward(
        self,
        images: Tensor,
        original_images: Tensor,
        texts: Tensor | None = None,
        original_texts: Tensor | None = None,
    ) -> Tensor:
        """Return the same as :meth:`loss`, for modules that contain this one.

        Args:
            images: see :meth:`loss`.
            original_images: see :meth:`loss`.
            texts: see :meth:`loss`.
            original_texts: see :meth:`loss`.
        """
        total = self._part("images", self.images, images, original_images)
        if texts is not None or original_texts is not None:
            total = total + self._part("texts", self.texts, texts, original_texts)
        return self.weight * total

    def _part(
        self,
        name: str,
        projector: ResidualProjector,
        features: Tensor | None,
        originals: Tensor | None,
    ) -> Tensor:
        """Return the mean of 1 - cos over the features of one kind."""
        if features is None or originals is None:
            absent = name if features is None else f"original_{name}"
            raise UsageError(
                f"{absent} is None; expected both {name} and original_{name}, or neither of them."
            )
        require_tensors(**{name: features, f"original_{name}": originals})
        if features.shape != originals.shape or features.shape[-1:] != (self.width,):
            raise UsageError(
                f"{name} has shape {list(features.shape)} and original_{name} has shape "
                f"{list(originals.shape)}; expected the same shape, with {self.width} (width) as "
                "the last number."
            )
        cosine = functional.cosine_similarity(projector(features), unit(originals), dim=-1)
        return (1 - cosine).mean()


class ResidualProjector(nn.Module):
    """Maps features ``[..., D]`` of any length to ``z + residual * P(z)``, z of unit length."""

    def __init__(self, width: int, residual: float, generator: torch.Generator) -> None:
        super().__init__()
        self.residual = float(residual)
        self.first = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            nn.init.kaiming_normal_(self.first.weight, generator=generator)
            self.last.weight.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Return the changed features, in at least float32, not normalised."""
        features = unit(features)
        hidden = self.first(features.to(self.first.weight.dtype))
        change: Tensor = self.last(functional.gelu(hidden))
        return features + self.residual * change.to(features.dtype)


def require_at_least_zero(**numbers: float) -> None:
    """Raise :class:`RegularizationError` unless all numbers are finite and at least 0."""
    for name, number in numbers.items():
        if not 0 <= as_float(number) < math.inf:
            raise RegularizationError(f"{name}={number!r}: expected a finite number of at least 0.")


def require_tensors(**features: object) -> None:
    """Raise :class:`UsageError` unless all features are tensors of floating-point numbers."""
    for name, value in features.items():
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            kind = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UsageError(
                f"{name} is {kind}; expected features, a tensor of floating-point numbers."
            )
