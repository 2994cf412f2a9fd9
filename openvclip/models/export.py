"""Export a model for programs without this package: ONNX files and ``torch.export`` archives."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from openvclip.checkpoints import Contract
from openvclip.checkpoints.exported_files import EXPORTED
from openvclip.checkpoints.paths import require_path
from openvclip.errors import ContractError, UnsupportedModelError, UsageError, reason_of
from openvclip.models.classifier import (
    VIDEO_TEMPLATES,
    TextClassifier,
    ZeroShotClassifier,
    class_features,
)
from openvclip.models.exported_graph import quantise_linear, remove_unused
from openvclip.models.exported_parts import (
    Part,
    PixelKind,
    TextPart,
    VideoPart,
    classifier_logits,
    clip_features,
    example_tokens,
    fixed_frames,
    frame_features,
    label_logits,
)
from openvclip.models.exported_writing import (
    ExportFacts,
    Program,
    quiet,
    require_packages,
    require_same_results,
    write_onnx,
    write_pt2,
)
from openvclip.models.features import scale_of
from openvclip.models.finite import require_values
from openvclip.models.modes import evaluation_mode
from openvclip.models.preprocess import transform_for
from openvclip.models.tokenizers import Tokenizer, as_tokenizer
from openvclip.models.usage import expansion_section, pooling_of, text_source_of, transform_of
from openvclip.towers.families import tower_facts
from openvclip.towers.view import Pooling
from openvclip.video.transforms import Transform
from openvclip.weights.names import unwrap

WeightKind = Literal["float32", "int8"]
"""The numbers in which an exported model stores its weights."""

_CHOICES: dict[str, Any] = {"part": Part, "pixels": PixelKind, "weights": WeightKind}
_CLIPS, _FRAMES, _TEXTS = "clips", "frames", "texts"  # the names of the open axes
_MOST = 2**16  # clips, frames or texts; torch 2.7 can't export an axis without an end


@dataclass(frozen=True)
class ExportSettings:
    """The settings of :func:`export_model`.

    Attributes:
        part: the part of the model that is exported; see
            :data:`openvclip.models.exported_parts.Part`. Default: ``"labels"`` if there are labels,
            and ``"image"`` otherwise.
        pixels: the frames that the exported model takes. ``"float"``: normalised float32 frames,
            as a transform returns them. ``"uint8"``: 8-bit frames of the same size; the exported
            model normalises them.
        weights: ``"float32"``, or ``"int8"`` for 8-bit weights of the linear layers. The weights of
            ``"int8"`` are rounded by torchao, and the model computes in float32.
        opset: version of the ONNX operators. Default: the version that PyTorch prefers.
        check: whether the written file is run and compared with PyTorch. For an ONNX file this
            needs onnxruntime; without onnxruntime the file is not checked.

    Raises:
        UsageError: a value is not known.
    """

    part: Part | None = None
    pixels: PixelKind = "float"
    weights: WeightKind = "float32"
    opset: int | None = None
    check: bool = True

    def __post_init__(self) -> None:
        for name, literal in _CHOICES.items():
            value, known = getattr(self, name), get_args(literal)
            if value not in known and not (name == "part" and value is None):
                names = ", ".join(map(repr, known))
                raise UsageError(f"{name}={value!r} is not known: choose one of {names}.")
        if self.opset is not None and (type(self.opset) is not int or self.opset < 1):
            raise UsageError(f"opset={self.opset!r}: expected a whole number such as 18.")


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    contract: Contract | str | None = None,
    labels: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    settings: ExportSettings | None = None,
) -> Path:
    """Write a part of a model as an ONNX file, or as an archive of ``torch.export``.

    The exported model takes any number of clips and of frames from 1 to 65,536, also if its
    attention is expanded. A model with prompts of Vita-CLIP takes only the number of frames of its
    prompts. The model is exported in eval mode and in float32 on the CPU, and is not changed.

    The file carries the contract and :class:`ExportFacts` as texts.
    :func:`openvclip.checkpoints.read_contract` and :func:`read_export` read them without the
    packages that run the file. The file is written atomically. If an ONNX file would be larger than
    2 GB, its weights are written to ``NAME-XXXXXXXX.onnx.data`` beside it. Then copy both files.

    Args:
        model: an open_clip model, a model of transformers, or an image tower; expanded or not, with
            or without prompts. For ``part="labels"`` it can be a classifier, whose class names are
            the labels.
        path: the file to write: ``.onnx`` or ``.pt2``.
        contract: the contract of the model, or its JSON text. It decides the size of the frames,
            the normalisation of 8-bit frames, the templates and the pooling. Default: the values of
            the model, the templates of the released code and the pooling of
            :func:`openvclip.encode_video`; the file then has no contract.
        labels: K different labels, for ``part="labels"``.
        tokenizer: see :class:`openvclip.ZeroShotClassifier`. Needed for ``labels``.
        settings: the part, the pixels and the weights of the file. Default: ``ExportSettings()``.

    Returns:
        The path of the file.

    Raises:
        UsageError: the file has another ending; or the arguments do not fit together.
        ContractError: the contract can't be used, or the model is expanded in another way than its
            contract says.
        MissingDependencyError: a package that the export needs is not installed.
        UnsupportedModelError: PyTorch can't export the model, or the exported model computes other
            values than the model.
        CheckpointError: the file can't be written.
    """
    path = Path(require_path(path, "path", "a file to write, with the ending .onnx or .pt2"))
    settings = settings or ExportSettings()
    if path.suffix not in EXPORTED:
        raise UsageError(
            f"{path}: the ending is {path.suffix!r}; expected .onnx (onnxruntime and other "
            "programs) or .pt2 (torch.export)."
        )
    if settings.opset is not None and path.suffix != ".onnx":
        raise UsageError(f"opset={settings.opset}: {path} is no ONNX file. Leave opset out.")
    require_packages(path.suffix, settings.weights)
    if isinstance(contract, str):
        contract = Contract.from_json(contract, "contract")
    model = _float_on_cpu(unwrap(model))
    with torch.no_grad(), evaluation_mode(model):
        exported = _Export(model, contract, settings, labels, tokenizer)
        program = exported.program()
        texts = exported.texts()
        write = write_pt2 if path.suffix == ".pt2" else partial(write_onnx, opset=settings.opset)
        check = partial(require_same_results, program) if settings.check else None
        write(program, path, texts, check)
    return path


@dataclass
class _Export:
    """An export: its arguments, and the module that is exported."""

    model: nn.Module
    contract: Contract | None
    settings: ExportSettings
    labels: Sequence[str] | None
    tokenizer: Tokenizer | None

    def __post_init__(self) -> None:
        self.clip = self.model.model if isinstance(self.model, TextClassifier) else self.model
        named = self.labels is not None or isinstance(self.model, TextClassifier)
        self.part: Part = self.settings.part or ("labels" if named else "image")
        if self.tokenizer is not None:
            self.tokenizer = as_tokenizer(self.tokenizer, self.clip)
        self.frames = fixed_frames(self.clip) if self.part != "text" else None
        self._require_labels()
        self._require_contract()

    def program(self) -> Program:
        """Return the exported program, with examples for the check.

        Raises:
            UnsupportedModelError: PyTorch can't export the model.
        """
        module = self._module()
        example, *others = self._examples()
        axes = {0: _TEXTS} if self.part == "text" else {0: _CLIPS, 1: _FRAMES}
        if self.frames is not None:
            del axes[1]
        sizes = {axis: torch.export.Dim(name, min=1, max=_MOST) for axis, name in axes.items()}
        with quiet():
            try:
                program = torch.export.export(
                    module, (example,), dynamic_shapes=(sizes,), strict=False
                )
            except Exception as error:
                raise UnsupportedModelError(
                    f"torch.export can't export {type(self.clip).__name__} ({reason_of(error)}). "
                    "Remove hooks and layers that other tools added to the model."
                ) from error
            remove_unused(program)
            if self.settings.weights == "int8":
                quantise_linear(program)
                module = program.module()  # the model that the file must agree with
            expected = [(other, module(other)) for other in others if self.settings.check]
        names = ("tokens" if self.part == "text" else "frames", _OUTPUTS[self.part])
        return Program(program, names, axes, expected)

    def texts(self) -> dict[str, str]:
        """Return the texts that the file carries, by key."""
        has_scale = hasattr(self.clip, "logit_scale") or hasattr(self.clip, "temperature")
        facts = ExportFacts(
            part=self.part,
            pixels=self.settings.pixels,
            weights=self.settings.weights,
            frames=self.frames,
            labels=None if self.part != "labels" else tuple(self._labels()),
            logit_scale=float(scale_of(self.clip)) if has_scale else None,
        )
        return facts.texts(self.contract)

    def _module(self) -> nn.Module:
        if self.part == "text":
            return TextPart(self.clip)
        if self.part == "labels":
            function = self._logits()
        elif self.part == "frames":
            function = frame_features(self.clip)
        else:
            function = clip_features(self.clip, self._pooling())
        pixels = self._transform() if self.settings.pixels == "uint8" else None
        return VideoPart(self.model, function, pixels)

    def _logits(self) -> Callable[[Tensor], Tensor]:
        if isinstance(self.model, TextClassifier):
            return classifier_logits(self.model, _text_of(self.model))
        assert self.tokenizer is not None
        templates = VIDEO_TEMPLATES if self.contract is None else self.contract.templates
        text = class_features(self.model, self.tokenizer, self._labels(), templates)
        return label_logits(self.model, text, self._pooling())

    def _pooling(self) -> Pooling:
        return "unit_frames" if self.contract is None else pooling_of(self.contract)

    def _labels(self) -> Sequence[str]:
        if isinstance(self.model, TextClassifier):
            return self.model.class_names
        return self.labels or ()

    def _transform(self) -> Transform:
        return transform_for(self.clip) if self.contract is None else transform_of(self.contract)

    def _examples(self) -> list[Tensor]:
        """Return the example for PyTorch and others for the check.

        PyTorch treats a size of 1 in its example as a constant.
        """
        if self.part == "text":
            tokens = example_tokens(self.clip, self.tokenizer)
            return [tokens, tokens[1:], tokens[[0, 1, 1]]]
        sizes = [(2, 3), (1, 1), (3, 2)]
        if self.frames is not None:
            sizes = [(2, self.frames), (1, self.frames), (3, self.frames)]
        return [self._random_frames(*size) for size in sizes]

    def _random_frames(self, clips: int, frames: int) -> Tensor:
        shape = (clips, frames, 3, *self._size())
        generator = torch.Generator().manual_seed(0)
        if self.settings.pixels == "uint8":
            return torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return torch.randn(shape, generator=generator)

    def _size(self) -> tuple[int, int]:
        """Return height and width of a frame."""
        if self.contract is not None:
            return (transform_of(self.contract).size,) * 2
        size = getattr(getattr(self.clip, "visual", None), "image_size", None)
        if size is None:
            size = tower_facts(self.clip).image_size
        if size is None:
            raise UsageError(
                f"The size of the frames of {type(self.clip).__name__} is not known. Give the "
                "contract of the model."
            )
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def _require_labels(self) -> None:
        """Check that labels, tokenizer and part fit together.

        Raises:
            UsageError: they do not.
        """
        classifier = isinstance(self.model, TextClassifier)
        self._require_own_text(classifier)
        if self.labels is not None and (self.part != "labels" or classifier):
            what = f'part="{self.part}"' if self.part != "labels" else "a classifier"
            raise UsageError(
                f"labels are given for {what}, which has none to choose from. Leave labels out."
            )
        if self.part != "labels" or classifier:
            return
        if self.labels is None or self.tokenizer is None:
            missing = "labels" if self.labels is None else "tokenizer"
            raise UsageError(
                f'{missing} is None; part="labels" needs labels and a tokenizer, or a classifier '
                "such as openvclip.ZeroShotClassifier."
            )

    def _require_own_text(self, classifier: bool) -> None:
        if self.part not in ("labels", "text") or (classifier and self.part == "labels"):
            return  # a classifier can have the text features of the original CLIP
        if self.contract is not None and text_source_of(self.contract) == "original":
            raise UsageError(
                'The contract says text="original": the original CLIP encodes the texts, and the '
                "model has other weights. Export a classifier with the text features of the "
                "original CLIP: ZeroShotClassifier(..., text_features=...)."
            )

    def _require_contract(self) -> None:
        """Check that the model is expanded as its contract says.

        Raises:
            ContractError: it is not.
        """
        if self.contract is None or self.part == "text":
            return
        present = expansion_section(self.clip)
        if present != self.contract.expansion:
            raise ContractError(
                f"The model has the temporal attention {present}; its contract has "
                f"{self.contract.expansion}. Expand the model as its contract says, or correct the "
                "contract."
            )


_OUTPUTS: dict[str, str] = {
    "image": "features",
    "frames": "features",
    "text": "features",
    "labels": "logits",
}


def _text_of(classifier: TextClassifier) -> Tensor:
    """Return the text features of a classifier that may have been converted to float32.

    Text features that were given are kept: the text tower of the model would compute others.
    """
    given = isinstance(classifier, ZeroShotClassifier) and not classifier.own_text
    # Weights that were converted to another dtype count as unchanged.
    kept = classifier.text_features if given and classifier.text_is_current() else None
    return classifier.present_text() if kept is None else cast(Tensor, kept)


def _float_on_cpu(model: nn.Module) -> nn.Module:
    """Return a model whose parameters are float32 on the CPU: the model itself, or a copy."""
    require_values(model)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    if all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors):
        return model
    return copy.deepcopy(model).cpu().float()
