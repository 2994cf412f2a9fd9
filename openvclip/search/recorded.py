"""Where the model of an index is, so that the index can load it again."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from openvclip.checkpoints.contract import Contract
from openvclip.errors import UsageError
from openvclip.models.folders import load_stored
from openvclip.models.loading import load_model
from openvclip.models.usage import expand_as, expansion_section
from openvclip.models.video_clip import VideoCLIP
from openvclip.towers.temporal import restore_spatial_attention

__all__ = ["ModelSource"]


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of a model are.

    Attributes:
        source: a folder, a file, a name on the Hub or a name of open_clip; see
            :meth:`openvclip.VideoCLIP.from_pretrained`.
        pretrained: with a name of open_clip: its weights.
        checkpoint: a file of fine-tuned weights without a contract; see
            :func:`openvclip.models.load_model`.
        lam: weight of the original CLIP in the weights, if there is a ``checkpoint``.
    """

    source: str
    pretrained: str | None = None
    checkpoint: str | None = None
    lam: float | None = None

    @classmethod
    def of(cls, model: VideoCLIP) -> ModelSource | None:
        """Return where :meth:`openvclip.VideoCLIP.from_pretrained` loaded a model from, if so."""
        if model.origin is None:
            return None
        source, pretrained = model.origin
        return cls(whole_path(source), None if pretrained is None else whole_path(pretrained))

    @classmethod
    def at(cls, source: str | os.PathLike[str]) -> ModelSource:
        """Return where a model is from a folder or a name.

        Raises:
            UsageError: ``source`` is neither a text nor a path.
        """
        if not isinstance(source, (str, os.PathLike)):
            raise UsageError(
                f"model is a {type(source).__name__}; expected a VideoCLIP, the folder of a model "
                "or 'hf-hub:user/name'."
            )
        return cls(whole_path(os.fspath(source)))

    def load(self, contract: Contract, device: str | torch.device = "cpu") -> VideoCLIP:
        """Load the model.

        Args:
            contract: how the model is used. If the model was calibrated since, the calibration that
                is stored with the model counts.
            device: the device of the model.

        Raises:
            OpenVCLIPError: the model can't be loaded; see
                :meth:`openvclip.VideoCLIP.from_pretrained`.
        """
        if self.checkpoint is None:
            stored = load_stored(self.source, self.pretrained)
            model, tokenizer = stored.model, stored.tokenizer
            confidence = stored.contract.confidence or contract.confidence
            contract = replace(contract, confidence=confidence)
        else:
            loaded = load_model(
                self.source, self.pretrained, checkpoint=self.checkpoint, expand=False
            )
            model, tokenizer = loaded.model, loaded.tokenizer
            loaded.interpolate(self.lam)
        if expansion_section(model) not in (None, contract.expansion):
            restore_spatial_attention(model)
        expand_as(model, contract)
        return VideoCLIP(model.to(device), tokenizer, contract=contract)

    def __str__(self) -> str:
        parts = [self.source, self.pretrained, self.checkpoint]
        return " with ".join(part for part in parts if part is not None)


def whole_path(source: str) -> str:
    """Return the absolute path of a file or a folder, and other names as they are."""
    prefix, name = ("local-dir:", source.removeprefix("local-dir:"))
    if not os.path.exists(name):
        return source
    return (prefix if source.startswith(prefix) else "") + os.path.abspath(name)
