"""Merge files of weights into a file, without loading the models."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast, overload

import torch
from torch import Tensor

from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.contract_files import (
    contract_of_mean,
    contract_to_merge,
    interpolated_lam,
    merged_contract,
)
from openvclip.checkpoints.layout import require_storable
from openvclip.checkpoints.streaming.arithmetic import FiniteOnly, Merge, apply_merge, mean
from openvclip.checkpoints.streaming.inputs import WeightInput, open_inputs, require_own_base
from openvclip.checkpoints.streaming.outputs import check_outputs, in_writing_order, weight_output
from openvclip.checkpoints.streaming.pipeline import Compute, stream
from openvclip.checkpoints.streaming.provenance import PROVENANCE_KEY, Provenance
from openvclip.checkpoints.streaming.threads import stream_in_threads
from openvclip.errors import EmptyAverageError, UsageError, WeightTypeError
from openvclip.weights.interpolation import Lambda, weights_of, write_interpolated
from openvclip.weights.names import is_extra_state
from openvclip.weights.numerics import common_dtype, dtype_of_result, is_interpolable

StrPath: TypeAlias = str | os.PathLike[str]


@overload
def interpolate_files(
    a: StrPath,
    b: StrPath,
    out: StrPath,
    lam: Lambda,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: bool | None = None,
    override: bool = False,
) -> None: ...
@overload
def interpolate_files(
    a: StrPath,
    b: StrPath,
    out: Sequence[StrPath],
    lam: Sequence[Lambda],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: bool | None = None,
    override: bool = False,
) -> None: ...
def interpolate_files(
    a: StrPath,
    b: StrPath,
    out: StrPath | Sequence[StrPath],
    lam: Lambda | Sequence[Lambda],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: bool | None = None,
    override: bool = False,
) -> None:
    """Write ``lam * a + (1 - lam) * b`` for two files of weights (Equation 6).

    The result is bitwise that of :func:`interpolate` on the loaded state dicts. **lam weighs a, the
    original CLIP**, as everywhere in openvclip.

    Safetensors files are not loaded. They are read in parts of half a megabyte. Parts are read,
    computed and written at the same time, in less than 100 MB of memory for models of any size.
    PyTorch files are mapped into memory, and the system can free this memory at any time.
    TorchScript archives and files from before PyTorch 1.6 are loaded.

    Args:
        a: the file of the original CLIP: a safetensors file, the index
            (``*.safetensors.index.json``) of a sharded model, or a PyTorch file. Entries keep their
            names, without the prefixes of wrappers. Use :func:`convert_checkpoint` to bring
            released checkpoints to open_clip's names.
        b: the file of the fine-tuned model, with the same names and shapes. A task vector of ``a``
            (:func:`openvclip.checkpoints.task_vector_file`) is read as the model that it makes.
        out: the file to write, ``*.safetensors``, or ``*.safetensors.index.json`` for shards and
            their index. An existing file is replaced. ``out`` may be one of the inputs.
        lam: the interpolation weight λ: a number, or a function from the name of an entry to a
            number. Give a sequence of weights, and as many files for ``out``, to write several
            models in one pass.
        dtype: the dtype in which floating-point entries are stored. Default: as in
            :func:`interpolate`.
        max_shard_size: the largest size of a shard in bytes. Only for an index. Default: 5 GB.
        progress: whether to show a progress bar. Default: only if standard error is a terminal.
        override: whether the contract of ``b`` is used if both inputs have a contract and the
            contracts differ, whether a contract that can't be read is left out, and whether a task
            vector may be added to another model than its original. Default: ``False``, raise an
            error.

    **Metadata.** The texts in the headers of the inputs are kept. If both inputs have a text of the
    same name, the text of ``b`` is kept. The text ``openvclip_recipe`` is added. It is JSON with
    the method, ``lam``, the version of openvclip, and for each input the name of the file, a hash
    of its weights and the ``openvclip_recipe`` of that file. The hash is the SHA-256 of a line
    ``name dtype shape crc32`` for each entry, sorted by name. It covers all values, and it does not
    depend on how the weights are distributed over files. The contract of the inputs is passed on,
    with the weight of the original CLIP in the result; see :class:`openvclip.checkpoints.Contract`.
    If ``a`` has no contract, it counts as the original CLIP. The weight is unknown if ``a`` is a
    merged file, or if its weights differ from the original CLIP that the contract of ``b`` names.

    **Crashes.** A file gets its name when it is complete and flushed to the disk. After an
    exception, a kill or a crash, ``out`` is the old file or the new file. A kill can leave files
    whose names end in ``.tmp``. The index of a sharded model gets its name after its shards, and
    then the older shards are removed. A kill around this moment can leave complete shards without
    an index. The names of all shards have a tag of eight hexadecimal digits
    (``clip-1a2b3c4d-00001-of-00002.safetensors``), and their headers have an ``openvclip_recipe``.
    The next successful write of the same index removes these shards, unless a JSON file in the
    folder names them.

    Raises:
        StateMismatchError: names or shapes differ. The error lists all differences.
        CheckpointError: an input is missing, incomplete or no file of weights (nothing is written
            then). Or an output can't be written, has another ending, or would replace a shard of an
            input.
        UnsafeCheckpointError: an input contains a pickle that could run arbitrary code.
        ContractError: the contracts of the inputs differ, or a contract can't be read, and
            ``override`` is false.
        LambdaError: an interpolation weight is not a finite number.
        NonFiniteMergeError: a file holds NaN, or holds an infinity that the other files do not
            hold in the same place. (An attention mask holds the same infinities in all files.) A
            file whose weight is 0 is not used, so its values are not checked. Or the result holds
            NaN, or a value beyond the range of its dtype.
        UsageError: the number of outputs is not the number of interpolation weights.

    Warns:
        ContractWarning: a contract that can't be read is left out.
        ExtrapolationWarning: an interpolation weight lies outside [0, 1].
    """
    outs, lams = _pairs(out, lam)
    with ExitStack() as stack:
        inputs = open_inputs([Path(a), Path(b)], stack)
        weights = []
        names = {n: size for n, size in inputs[1].sizes.items() if not is_extra_state(n)}
        for one_lam in lams:
            weights.append(weights_of(one_lam, names))

        def compute(name: str, values: list[Tensor], results: list[Tensor]) -> None:
            for weight_of, result in zip(weights, results, strict=True):
                write_interpolated({name: result}, {name: values[0]}, {name: values[1]}, weight_of)

        contracts = _contracts(inputs, override)
        contract = merged_contract(contracts, override=override)
        provenances = []
        for one_lam, weight_of in zip(lams, weights, strict=True):
            settings = {"lam": weight_of if callable(one_lam) else float(one_lam)}
            if contract is not None:
                share = interpolated_lam(
                    contracts[0][1],
                    contracts[1][1],
                    settings["lam"],
                    a_is_original=PROVENANCE_KEY not in inputs[0].metadata,
                )
                contract = contract.with_(lam=share)
            original_hash = _original_hash(contracts)
            provenances.append(
                Provenance("interpolate", inputs, settings, contract, original_hash=original_hash)
            )
        write_merged(
            inputs,
            outs,
            provenances,
            compute,
            MergeOptions(dtype, max_shard_size, progress, override=override, base=True),
        )


def average_files(
    paths: Sequence[StrPath],
    out: StrPath,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: bool | None = None,
    override: bool = False,
) -> None:
    """Write the uniform mean of files of weights, for example of the checkpoints of every epoch.

    This is the mean of Equation 10 (SWA) over files. Every file counts once. Sums are computed in
    float64 and rounded once, so the order of the files does not matter. Entries that are not
    floating-point numbers (counters, masks) come from the last file.

    Args:
        paths: safetensors files, indexes of sharded models or PyTorch files, with the same names
            and shapes. A task vector of the first file counts as the model that it makes. All
            files are read at the same time, in parts, so the memory does not grow with their size.
            See :func:`interpolate_files`.
        out: the file to write, as in :func:`interpolate_files`.
        dtype: the dtype in which floating-point entries are stored. Default: the dtype of each
            entry. If the files differ, the narrowest dtype that holds the values of all files.
        max_shard_size: as in :func:`interpolate_files`.
        progress: as in :func:`interpolate_files`.
        override: whether the contract of the last file is used if the contracts differ, whether a
            contract that can't be read is left out, and whether a task vector may be added to
            another model than its original.

    Raises:
        EmptyAverageError: ``paths`` is empty.
        NonFiniteMergeError: as in :func:`interpolate_files`.
        StateMismatchError, CheckpointError, UnsafeCheckpointError, ContractError: see
            :func:`interpolate_files`.
    """
    _require_list(paths)
    if not paths:
        raise EmptyAverageError("There are no files to average; give at least one.")
    with ExitStack() as stack:
        inputs = open_inputs([Path(path) for path in paths], stack)
        contract = contract_of_mean(_contracts(inputs, override), override=override)
        provenance = Provenance("average", inputs, {}, contract)
        options = MergeOptions(dtype, max_shard_size, progress, override=override)
        write_merged(inputs, [Path(out)], [provenance], mean, options)


def merge_files(
    paths: Sequence[StrPath],
    out: StrPath,
    merge: Merge,
    *,
    method: str | None = None,
    settings: Mapping[str, object] | None = None,
    base: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: bool | None = None,
    override: bool = False,
) -> None:
    """Apply a merge method to files, entry by entry.

    ``merge`` is called once for each entry, with one state dict for each file. Each state dict
    holds only this entry. The method must therefore treat each entry independently of the other
    entries: ::

        merge_files([clip, tuned], "out.safetensors", lambda states: slerp(*states, 0.3))

    A few entries of each file are in memory at a time.

    Args:
        paths: files of weights with the same names and shapes, as in :func:`average_files`. A
            task vector of the first file is given to ``merge`` as the model that it makes.
        out: the file to write, as in :func:`interpolate_files`.
        merge: maps a list of state dicts, in the order of ``paths``, to a state dict with the same
            name and shape. The tensors must not be used after ``merge`` returns.
        method: the name of the method in the metadata. Default: the name of the function.
        settings: the settings of the method in the metadata, such as ``{"scale": 0.3}``.
        base: whether the first file is the original CLIP, so that the result has no single weight λ
            of the original CLIP. Its contract then says that λ is not known.
        dtype: the dtype in which floating-point entries are stored. Default: the narrowest dtype
            that holds the values of all files. Without ``dtype``, ``merge`` must return the entry
            in this default dtype.
        max_shard_size: as in :func:`interpolate_files`.
        progress: as in :func:`interpolate_files`.
        override: whether the contract of the last file is used if the contracts differ, whether a
            contract that can't be read is left out, and whether a task vector may be added to
            another model than its original.

    Raises:
        WeightTypeError: ``merge`` did not return the entry in its shape and dtype, or ``paths`` is
            one path.
        NonFiniteMergeError: as in :func:`interpolate_files`.
        UsageError: ``paths`` is empty.
        StateMismatchError, CheckpointError, UnsafeCheckpointError, ContractError: see
            :func:`interpolate_files`.
    """
    _require_list(paths)
    if not paths:
        raise UsageError("There are no files to merge; give at least one.")
    with ExitStack() as stack:
        inputs = open_inputs([Path(path) for path in paths], stack)
        method_name = method or str(getattr(merge, "__qualname__", type(merge).__name__))
        options = MergeOptions(
            dtype, max_shard_size, progress, whole_entries=True, override=override, base=base
        )
        compute = functools.partial(apply_merge, merge, inputs[-1].sizes, dtype)
        contract = contract_of_mean(_contracts(inputs, override), override=override)
        if base and contract is not None:
            contract = contract.with_(lam=None)
        provenance = Provenance(method_name, inputs, dict(settings or {}), contract)
        write_merged(inputs, [Path(out)], [provenance], compute, options)


def _require_list(paths: object) -> None:
    if isinstance(paths, (str, os.PathLike)):
        raise WeightTypeError(f"paths: expected a list of files, got the one path {paths!s}.")


# --- outputs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeOptions:
    """The options that all merges of files share.

    Attributes:
        dtype: the dtype in which floating-point entries are stored.
        max_shard_size: see :func:`interpolate_files`.
        progress: see :func:`interpolate_files`.
        whole_entries: whether each entry is computed as a whole.
        override: whether a task vector may be added to another model than its original model.
        sizes: the entries of the result, on the meta device. Default: those of the last input.
        base: whether the first input is the original model.
    """

    dtype: torch.dtype | None
    max_shard_size: int | None
    progress: bool | None
    whole_entries: bool = False
    override: bool = False
    sizes: Mapping[str, Tensor] | None = None
    base: bool = False


def write_merged(
    inputs: list[WeightInput],
    outs: list[Path],
    provenances: list[Provenance],
    compute: Compute,
    options: MergeOptions,
) -> None:
    """Compute and write one file for each path in ``outs``, with the hashes of the inputs."""
    sizes = options.sizes if options.sizes is not None else _result_sizes(inputs, options.dtype)
    sizes = in_writing_order(sizes)
    for dtype in {size.dtype for size in sizes.values()}:
        require_storable(dtype)
    check_outputs(outs, inputs, options.max_shard_size)
    with ExitStack() as stack:
        outputs = [
            stack.enter_context(
                weight_output(path, sizes, provenance.metadata, options.max_shard_size)
            )
            for path, provenance in zip(outs, provenances, strict=True)
        ]
        models = [str(source.path) for source in inputs]
        models[0] += ", the original model" if options.base else ""
        compute = functools.partial(_compute_weights, FiniteOnly(compute, models))
        progress = options.progress
        if options.whole_entries or not all(source.threads_can_read for source in inputs):
            whole = options.whole_entries
            stream(inputs, outputs, sizes, compute, whole=whole, progress=progress)
        else:
            stream_in_threads(inputs, outputs, sizes, compute, progress=progress)
        if not options.override:
            require_own_base(inputs)
        for provenance in provenances:
            provenance.add_hashes()


def _contracts(inputs: Sequence[WeightInput], override: bool) -> list[tuple[Path, Contract | None]]:
    return [
        (source.path, contract_to_merge(source.path, source.metadata, override=override))
        for source in inputs
    ]


def _original_hash(contracts: Sequence[tuple[Path, Contract | None]]) -> str | None:
    """Return the hash of the original CLIP, if a first model without a contract must have it."""
    first, last = contracts[0][1], contracts[-1][1]
    if first is not None or last is None or last.base is None:
        return None
    return last.base.weights_hash


def _compute_weights(
    compute: Compute, name: str, values: list[Tensor], results: list[Tensor]
) -> None:
    """Compute a part of the weights, or copy a part of the extra state."""
    if not is_extra_state(name):
        compute(name, values, results)
        return
    for result in results:
        result.copy_(values[-1])


def _result_sizes(inputs: list[WeightInput], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the entries of the result on the meta device."""
    sizes = {}
    for name, size in inputs[-1].sizes.items():
        result_dtype = size.dtype
        if is_interpolable(size) and not is_extra_state(name):
            dtypes = (source.sizes[name].dtype for source in inputs)
            result_dtype = dtype_of_result(functools.reduce(common_dtype, dtypes), dtype)
        # torch.empty_like on the meta device would import sympy, which takes half a second.
        sizes[name] = torch.empty(size.shape, dtype=result_dtype, device="meta")
    return sizes


def _pairs(
    out: StrPath | Sequence[StrPath], lam: Lambda | Sequence[Lambda]
) -> tuple[list[Path], list[Lambda]]:
    if isinstance(out, (str, os.PathLike)):
        return [Path(out)], [cast(Lambda, lam)]
    if not isinstance(lam, Sequence) or len(out) != len(lam) or not out:
        raise UsageError(
            f"out={out}, lam={lam}: expected one output for each value of lam, and at least one."
        )
    return [Path(path) for path in out], list(lam)
