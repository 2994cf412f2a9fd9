"""Inspect a file of weights: its family, its backbone, its sizes, and entries that do not fit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.contract_files import CONTRACT_KEY, contract_of_file
from openvclip.checkpoints.contract_report import contract_text
from openvclip.checkpoints.families import FAMILIES, Origin, Plan, has_quick_gelu, plan_conversion
from openvclip.checkpoints.file_kinds import TORCHSCRIPT
from openvclip.checkpoints.formats import WeightFile, read_weights
from openvclip.checkpoints.sizes import Shape, Sizes, sizes_of
from openvclip.checkpoints.task_vectors import TASK_VECTOR_KEY, base_hash_of, is_task_vector
from openvclip.errors import listed
from openvclip.weights.adapters import factor_names
from openvclip.weights.kinds import quantized_names

_LISTED_NAMES = 12


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of a file of weights. ``str(info)`` is a report.

    Attributes:
        path: the path of the file.
        format: ``"safetensors"``, ``"PyTorch"`` or ``"TorchScript"``, or several of them for the
            index of a model whose shards differ: ``"PyTorch and safetensors"``.
        family: the family of released checkpoints, such as ``"OpenAI CLIP"``. The family is
            recognised from the names of the entries and from the format.
        sizes: the sizes of the model. Each size is also an attribute of this object, for example
            ``info.backbone`` and ``info.image_size``.
        entries: the number of tensors in the file.
        dtypes: names of dtypes to the number of tensors of each dtype.
        key: the top-level entry that holds the weights, or ``""`` if the file has no such entry.
        beside: the other top-level entries, such as the state of an optimizer.
        ignored: entries that are known and are not weights.
        left_over: entries that have no place in open_clip's ``CLIP``.
        missing: names of open_clip that the layers of the file require, but that the file lacks.
        converted: whether entries are renamed or reshaped when the file is loaded.
        metadata: the texts in the header of a safetensors file.
        prefix: the text before the names of the CLIP, such as ``"model."`` of a Lightning module.
        prefixes: the prefixes of the CLIPs in a file that holds several CLIPs.
        extra_state: the names of the extra state of modules (``get_extra_state``).
        factors: the entries that are factors of an adapter, such as LoRA.
        quantized: the entries that are quantised.
    """

    path: str = ""
    format: str = ""
    family: str = ""
    sizes: Sizes = field(default_factory=Sizes)
    entries: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    key: str = ""
    beside: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    converted: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    prefixes: tuple[str, ...] = ()
    extra_state: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = self.sizes
        key = f" under {self.key!r}" if self.key else ""
        prefix = f" with the prefix {self.prefix!r}" if self.prefix else ""
        unchanged = "" if self.converted else " (names unchanged)"
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        rows = [
            ("file", f"{self.path} ({self.format})"),
            ("task vector", self._vector_text()),
            ("family", f"{self.family}{key}{prefix}{unchanged}"),
            ("several", _several_text(self.prefixes)),
            ("backbone", self._backbone_text()),
            ("activation", self._activation_text()),
            ("image tower", _sizes_text(patch=sizes.patch_size, resolution=sizes.image_size,
                                        width=sizes.vision_width, layers=sizes.vision_layers)),
            ("text tower", _sizes_text(width=sizes.text_width, layers=sizes.text_layers,
                                       context=sizes.context_length, vocabulary=sizes.vocab_size)),
            ("embedding", _sizes_text(length=sizes.embed_dim)),
            ("entries", f"{self.entries} ({dtypes})"),
            ("factors", _names_text(self.factors, " (merge the adapter into its base model)")),
            ("quantised", _names_text(self.quantized, " (dequantise the model first)")),
            ("extra state", _names_text(self.extra_state)),
            ("metadata", self._metadata_text()),
            ("beside", _names_text(self.beside)),
            ("ignored", _names_text(self.ignored)),
            ("left over", _names_text(self.left_over)),
            ("missing", _names_text(self.missing)),
        ]  # fmt: skip
        report = "\n".join(f"{title:<12} {text}" for title, text in rows if text)
        return f"{report}\n{contract_text(self.path, self.metadata)}".rstrip()

    @property
    def contract(self) -> Contract | None:
        """How the model is used, as the file or its folder says; ``None`` if neither says it.

        Raises:
            ContractError: there is a contract and it can't be read.
        """
        return contract_of_file(Path(self.path), self.metadata)

    @property
    def source_family(self) -> str:
        """The family that the weights came from, also after :func:`convert_checkpoint`."""
        return self.metadata.get("source_family", self.family)

    @property
    def quick_gelu(self) -> bool:
        """Whether the weights are known to have been trained with QuickGELU."""
        return has_quick_gelu(self.source_family)

    def _metadata_text(self) -> str:
        shown_elsewhere = (CONTRACT_KEY, TASK_VECTOR_KEY)
        texts = {k: text for k, text in self.metadata.items() if k not in shown_elsewhere}
        return ", ".join(f"{name}={text}" for name, text in texts.items())

    def _vector_text(self) -> str:
        if not is_task_vector(self.metadata):
            return ""
        base_hash = base_hash_of(self.metadata) or "unknown"
        return f"the change of a model, and no model (hash of its original: {base_hash})"

    def _activation_text(self) -> str:
        is_clip = self.family != FAMILIES[-1].name
        if self.quick_gelu or not is_clip:
            return ""
        return "unknown: GELU or QuickGELU, which no weight shows"

    def _backbone_text(self) -> str:
        if self.backbone is None:
            return "not recognised"
        if not self.quick_gelu:
            return self.backbone
        return f"{self.backbone} with QuickGELU (in open_clip: {self.backbone}-quickgelu)"

    @property
    def backbone(self) -> str | None:
        """See :class:`Sizes`."""
        return self.sizes.backbone

    @property
    def patch_size(self) -> int | None:
        """See :class:`Sizes`."""
        return self.sizes.patch_size

    @property
    def image_size(self) -> int | None:
        """See :class:`Sizes`."""
        return self.sizes.image_size

    @property
    def vision_width(self) -> int | None:
        """See :class:`Sizes`."""
        return self.sizes.vision_width

    @property
    def vision_layers(self) -> int | None:
        """See :class:`Sizes`."""
        return self.sizes.vision_layers

    @property
    def embed_dim(self) -> int | None:
        """See :class:`Sizes`."""
        return self.sizes.embed_dim

    @property
    def text_width(self) -> int | None:
        """See :class:`Sizes`."""
        return self.sizes.text_width

    @property
    def text_layers(self) -> int | None:
        """See :class:`Sizes`."""
        return self.sizes.text_layers

    @property
    def context_length(self) -> int | None:
        """See :class:`Sizes`."""
        return self.sizes.context_length

    @property
    def vocab_size(self) -> int | None:
        """See :class:`Sizes`."""
        return self.sizes.vocab_size


def _sizes_text(**sizes: int | None) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None)


def _several_text(prefixes: tuple[str, ...]) -> str:
    if not prefixes:
        return ""
    return f"{len(prefixes)} CLIPs, under the prefixes {listed([repr(p) for p in prefixes])}"


def _names_text(names: tuple[str, ...], remark: str = "") -> str:
    if not names:
        return ""
    more = len(names) - _LISTED_NAMES
    text = ", ".join(names[:_LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"{len(names)}{remark}: {text}"


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Inspect a file of weights without loading the weights.

    Of a safetensors file only the header is read. Of a PyTorch file only names and shapes are read.

    Args:
        path: a safetensors, PyTorch or TorchScript file, or the index of a sharded model, whose
            shards are safetensors or PyTorch files. The content decides what the file is. Its name
            does not matter.

    Raises:
        CheckpointError: the file is missing, truncated or of another kind, or it holds no weights.
        UnsafeCheckpointError: the file contains a pickle that could run arbitrary code.
        StateMismatchError: two names differ only by the prefix of a wrapper.
    """
    file = read_weights(path, sizes_only=True)
    return describe(file, plan_of(file))


def plan_of(file: WeightFile, *, left_out: Callable[[str], bool] = lambda name: False) -> Plan:
    """Return the plan that converts a file to open_clip's names.

    Args:
        file: the file.
        left_out: see :func:`~openvclip.checkpoints.families.plan_conversion`.
    """
    torchscript = file.format == TORCHSCRIPT
    origin = Origin(torchscript, file.key, file.beside, file.gelu)
    return plan_conversion(file.weights, origin, left_out=left_out)


def describe(file: WeightFile, plan: Plan) -> CheckpointInfo:
    """Return the content of a file.

    Args:
        file: the file, with or without the values of its tensors.
        plan: the result of :func:`plan_of` for this file.
    """
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in file.weights.values())
    return CheckpointInfo(
        path=os.fspath(file.path),
        format=file.format,
        family=plan.family.name,
        sizes=sizes_of(_converted_shapes(file, plan)),
        entries=len(file.weights),
        dtypes=dict(sorted(dtypes.items())),
        key=file.key,
        beside=file.beside,
        ignored=plan.ignored,
        left_over=plan.left_over,
        missing=plan.missing,
        converted=plan.converted,
        metadata=file.metadata,
        prefix=plan.prefix,
        prefixes=plan.prefixes,
        extra_state=tuple(file.extra),
        factors=tuple(factor_names(file.weights)),
        quantized=tuple(quantized_names(file.weights)),
    )


def _converted_shapes(file: WeightFile, plan: Plan) -> dict[str, Shape]:
    """Return the shapes of the converted entries, under open_clip's names.

    Entries that join several entries of the file are left out. No size is read from them.
    """
    shapes: dict[str, Shape] = {}
    for target, source in plan.targets.items():
        if len(source.names) == 1:
            shape = tuple(file.weights[source.names[0]].shape)
            shapes[target] = shape[::-1] if source.transposed else shape
    return shapes
