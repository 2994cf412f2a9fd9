"""Write the change of a model as a file: a task vector."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from openvclip.checkpoints.contract_files import contract_to_merge, merged_contract
from openvclip.checkpoints.extra_state import EXTRA_STATE_KEY
from openvclip.checkpoints.streaming.inputs import WeightInput, open_inputs
from openvclip.checkpoints.streaming.merges import MergeOptions, StrPath, write_merged
from openvclip.checkpoints.streaming.provenance import Provenance
from openvclip.checkpoints.task_vectors import task_vector_mark
from openvclip.errors import NonFiniteMergeError
from openvclip.weights.changes import difference
from openvclip.weights.names import is_extra_state
from openvclip.weights.numerics import (
    common_dtype,
    compute_dtype,
    dtype_of_result,
    is_interpolable,
)


def task_vector_file(
    base: StrPath,
    tuned: StrPath,
    out: StrPath,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: bool | None = None,
    override: bool = False,
) -> None:
    """Write the task vector ``tuned - base`` of two files of weights.

    The file can stand in the place of a fine-tuned model in :func:`merge_files`,
    :func:`average_files` and :func:`interpolate_files`, if the first file is the same original
    model. It is then read as the model ``base + vector``, in the dtypes of ``base``. Its header
    marks it as a task vector, so :func:`load_checkpoint` refuses it as a model. With
    ``names="original"``, :func:`load_checkpoint` returns the task vector for
    :func:`openvclip.merging.apply_task_vectors`.

    The file has no integer and boolean entries, such as counters and masks, and no extra state of
    modules. A merge takes these from ``base``. So the model ``base + vector`` is ``tuned`` with the
    integers, masks and extra state of ``base``.

    Args:
        base: the file of the original model, as in :func:`interpolate_files`.
        tuned: the file of the fine-tuned model, or the folder of a LoRA fine-tune of ``base``.
        out: the file to write, as in :func:`interpolate_files`. It holds the floating-point and
            complex entries.
        dtype: the dtype in which floating-point changes are stored. Default: at least float32,
            because small differences lose digits in half precision.
        max_shard_size: as in :func:`interpolate_files`.
        progress: as in :func:`interpolate_files`.
        override: as in :func:`interpolate_files`.

    Raises:
        NonFiniteMergeError: as in :func:`interpolate_files`.
        StateMismatchError, CheckpointError, UnsafeCheckpointError, ContractError: see
            :func:`interpolate_files`.
    """
    with ExitStack() as stack:
        inputs = open_inputs([Path(base), Path(tuned)], stack)
        contracts = [
            (source.path, contract_to_merge(source.path, source.metadata, override=override))
            for source in inputs
        ]
        contract = merged_contract(contracts, override=override)
        provenance = _VectorProvenance("task_vector", inputs, {}, contract)
        options = MergeOptions(
            dtype,
            max_shard_size,
            progress,
            override=override,
            sizes=_sizes(inputs, dtype),
            base=True,
        )
        _read_other_entries(inputs)
        write_merged(inputs, [Path(out)], [provenance], _compute, options)


class _VectorProvenance(Provenance):
    def metadata(self) -> dict[str, str]:
        # The hash has the same length before and after all parts are read.
        texts = {**super().metadata(), **task_vector_mark(self.inputs[0].weights_hash())}
        texts.pop(EXTRA_STATE_KEY, None)  # the file has no extra state
        return texts


def _sizes(inputs: list[WeightInput], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the entries of the task vector on the meta device."""
    base, tuned = inputs
    sizes = {}
    for name, size in base.sizes.items():
        if is_interpolable(size) and not is_extra_state(name):
            wide = compute_dtype(common_dtype(size.dtype, tuned.sizes[name].dtype))
            stored = dtype_of_result(wide, dtype)
            sizes[name] = torch.empty(size.shape, dtype=stored, device="meta")
    return sizes


def _read_other_entries(inputs: list[WeightInput]) -> None:
    """Read the entries that are not written, because the hashes of the inputs cover all entries."""
    for source in inputs:
        for name, size in source.sizes.items():
            if not is_interpolable(size) and not is_extra_state(name):
                source.read(name, 0, torch.empty(size.numel(), dtype=size.dtype))


def _compute(name: str, values: list[Tensor], results: list[Tensor]) -> None:
    base, tuned = values
    wide = compute_dtype(common_dtype(base.dtype, tuned.dtype))
    try:
        results[0].copy_(difference(tuned.to(wide), base.to(wide)))
    except NonFiniteMergeError as error:
        raise NonFiniteMergeError(f"{name}: {error}") from None
