"""Files of weights made from files of weights, without loading any."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast, overload

import torch
from torch import Tensor

from openvclip.checkpoints.layout import INDEX_ENDING, require_storable
from openvclip.checkpoints.streaming.inputs import WeightInput, open_inputs
from openvclip.checkpoints.streaming.outputs import in_writing_order, weight_output
from openvclip.checkpoints.streaming.pipeline import Compute, stream
from openvclip.checkpoints.streaming.provenance import Recipe
from openvclip.errors import (
    CheckpointError,
    EmptyAverageError,
    NonFiniteWeightsError,
    UsageError,
    WeightTypeError,
)
from openvclip.weights.interpolation import Lambda, weights_of, write_interpolated
from openvclip.weights.names import listed
from openvclip.weights.numerics import common_dtype, is_interpolable

StrPath: TypeAlias = str | os.PathLike[str]
Merge: TypeAlias = Callable[[list[dict[str, Tensor]]], Mapping[str, Tensor]]
"""A method of merging: state dicts with the same names, one for each model, to one such."""


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
) -> None:
    """Write ``lam * a + (1 - lam) * b`` for two files of weights, bit for bit :func:`interpolate`.

    Safetensors files are not loaded: they are read in stretches of half a megabyte, and read,
    computed and written at the same time, in less than 100 MB of memory, however large they are.
    PyTorch files are mapped into memory, which can take back what was read of them; archives of
    TorchScript and files of before PyTorch 1.6 are loaded. **lam weighs a, the original CLIP**, as
    everywhere in openvclip.

    Args:
        a: file of the original model: safetensors, the index (``*.safetensors.index.json``) of a
            sharded one, or a PyTorch file. Names are taken as they stand in it, without those of
            wrappers; :func:`convert_checkpoint` brings released checkpoints to open_clip's.
        b: file of the fine-tuned model: the same names and shapes.
        out: file to write, ``*.safetensors``, or ``*.safetensors.index.json`` for shards with this
            index. It may be one of the files that are read, and is replaced where it exists.
        lam: a number, or a function from an entry's name to its number. With a sequence of these,
            and of as many files for ``out``, several models are written in one pass.
        dtype: dtype of the floating-point entries, as in :func:`interpolate`.
        max_shard_size: bytes of the largest shard; 5 GB by default. Only for an index.
        progress: whether to show a progress bar; by default only where standard error is a
            terminal.

    The texts in the headers of the inputs are kept; where both have one of the same name, b's. A
    further text, ``openvclip_recipe``, is JSON with the method, lam, openvclip's version, and of
    each input the file's name, a hash of its weights and the recipe that it had itself. The hash
    covers all values and depends on the weights alone, not on the files they are in: it is the
    SHA-256 of a line ``name dtype shape crc32`` for each entry, sorted by name.

    A file takes its name when it is whole and flushed to the disk: after an exception, a kill or a
    crash there is the older file or the new one. A kill can leave files behind whose names end in
    ``.tmp``. The index of a sharded model takes its name after the shards, and then the older ones
    are removed, so that a kill around this moment can leave whole shards that no index names. All
    shards written here have a tag of eight hexadecimal digits in their names
    (``clip-1a2b3c4d-00001-of-00002.safetensors``) and a recipe in their headers, and the next write
    of the same index that succeeds removes those that no JSON file in the folder names.

    Raises:
        StateMismatchError: names or shapes differ; the error lists all of them.
        CheckpointError: an input is missing, not whole or no file of weights (nothing is written
            then), an output can't be written or has another ending, or would replace a shard of
            an input.
        UnsafeCheckpointError: an input can't be read without running code that it names.
        LambdaError: a weight is not a finite number.
        UsageError: not as many outputs as weights.

    Warns:
        ExtrapolationWarning: a weight lies outside [0, 1].
    """
    outs, lams = _pairs(out, lam)
    with ExitStack() as stack:
        inputs = open_inputs([Path(a), Path(b)], stack)
        weights = []
        for one in lams:
            weights.append(weights_of(one, inputs[1].sizes))

        def compute(name: str, given: list[Tensor], results: list[Tensor]) -> None:
            for weight_of, result in zip(weights, results, strict=True):
                write_interpolated({name: result}, {name: given[0]}, {name: given[1]}, weight_of)

        recipes = [
            Recipe("interpolate", inputs, {"lam": weight_of if callable(one) else float(one)})
            for one, weight_of in zip(lams, weights, strict=True)
        ]
        _write(inputs, outs, recipes, compute, _Options(dtype, max_shard_size, progress))


def average_files(
    paths: Sequence[StrPath],
    out: StrPath,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: bool | None = None,
) -> None:
    """Write the uniform mean of files of weights, for example of the checkpoints of every epoch.

    The mean of Equation 10 (SWA) over files, each of which counts once: sums are taken in float64
    and rounded once, so that the order of the files does not matter. Entries that are no floating
    point numbers (counters, masks) come from the last file.

    Args:
        paths: safetensors files, indexes of sharded ones or PyTorch files, with the same names and
            shapes. All are read at the same time, in stretches, so that memory does not grow with
            their size; see :func:`interpolate_files`.
        out: file to write, as in :func:`interpolate_files`.
        dtype: dtype of the floating-point entries; by default their own, and where files differ
            the narrowest that holds all.
        max_shard_size: as in :func:`interpolate_files`.
        progress: as in :func:`interpolate_files`.

    Raises:
        EmptyAverageError: there are no files.
        NonFiniteWeightsError: a file holds NaN, or an infinity that the others do not have in the
            same place (as masks do).
        StateMismatchError, CheckpointError, UnsafeCheckpointError: as for
            :func:`interpolate_files`.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise WeightTypeError(f"paths: expected a list of files, got the one path {paths!s}.")
    if not paths:
        raise EmptyAverageError("There are no files to average; give at least one.")
    with ExitStack() as stack:
        inputs = open_inputs([Path(path) for path in paths], stack)
        recipe = Recipe("average", inputs, {})
        options = _Options(dtype, max_shard_size, progress)
        _write(inputs, [Path(out)], [recipe], _Mean(inputs), options)


def merge_files(
    paths: Sequence[StrPath],
    out: StrPath,
    merge: Merge,
    *,
    method: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: bool | None = None,
) -> None:
    """Apply a method that works on each entry by itself to files, entry by entry.

    ``merge`` is called once for each entry, with a state dict of this one entry for each file, so
    any function on state dicts serves that looks at no other entry: ::

        merge_files([clip, tuned], "out.safetensors", lambda states: slerp(*states, 0.3))

    In memory are a few entries of each file at a time.

    Args:
        paths: files of weights with the same names and shapes, as in :func:`average_files`.
        out: file to write, as in :func:`interpolate_files`.
        merge: from a list of state dicts, in the order of ``paths``, to one with the same name
            and shape. What it is given must not be used after it returns.
        method: name of the method for the recipe; by default that of the function.
        dtype: dtype that floating-point entries are stored in. By default ``merge`` must give each
            entry in the narrowest dtype that holds those of all files.
        max_shard_size: as in :func:`interpolate_files`.
        progress: as in :func:`interpolate_files`.

    Raises:
        WeightTypeError: ``merge`` gave something else than the entry in its shape and dtype.
        UsageError: there are no files.
        StateMismatchError, CheckpointError, UnsafeCheckpointError: as for
            :func:`interpolate_files`.
    """
    if not paths:
        raise UsageError("There are no files to merge; give at least one.")
    with ExitStack() as stack:
        inputs = open_inputs([Path(path) for path in paths], stack)
        named = method or str(getattr(merge, "__qualname__", type(merge).__name__))
        options = _Options(dtype, max_shard_size, progress, whole=True)
        compute = functools.partial(_apply, merge, inputs[-1].sizes, dtype)
        _write(inputs, [Path(out)], [Recipe(named, inputs, {})], compute, options)


# --- what the three have in common ---------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    dtype: torch.dtype | None
    max_shard_size: int | None
    progress: bool | None
    whole: bool = False


def _write(
    inputs: list[WeightInput],
    outs: list[Path],
    recipes: list[Recipe],
    compute: Compute,
    options: _Options,
) -> None:
    sizes = in_writing_order(_result_sizes(inputs, options.dtype))
    _require_sound(outs, inputs, sizes, options.max_shard_size)
    with ExitStack() as stack:
        outputs = [
            stack.enter_context(weight_output(path, sizes, recipe.texts, options.max_shard_size))
            for path, recipe in zip(outs, recipes, strict=True)
        ]
        stream(inputs, outputs, sizes, compute, whole=options.whole, progress=options.progress)
        for recipe in recipes:
            recipe.seal()


def _result_sizes(inputs: list[WeightInput], dtype: torch.dtype | None) -> dict[str, Tensor]:
    sizes = {}
    for name, size in inputs[-1].sizes.items():
        kept = size.dtype
        if is_interpolable(size):
            own = functools.reduce(common_dtype, (one.sizes[name].dtype for one in inputs))
            kept = dtype if dtype is not None else own
        # empty_like would import half a second of sympy for tensors on the meta device.
        sizes[name] = torch.empty(size.shape, dtype=kept, device="meta")
    return sizes


def _require_sound(
    outs: list[Path],
    inputs: list[WeightInput],
    sizes: Mapping[str, Tensor],
    max_shard_size: int | None,
) -> None:
    """Raise for what is wrong with the outputs before any is made."""
    for dtype in {size.dtype for size in sizes.values()}:
        require_storable(dtype)
    shards = {file.resolve() for one in inputs for file in one.files if file != one.path}
    places = [out.resolve() for out in outs]
    for out, place in zip(outs, places, strict=True):
        if not out.name.endswith((".safetensors", INDEX_ENDING)):
            raise CheckpointError(
                f"{out}: the result is a safetensors file; give it a name ending in .safetensors, "
                f"or in {INDEX_ENDING} for shards."
            )
        if max_shard_size is not None and (
            max_shard_size < 1 or not out.name.endswith(INDEX_ENDING)
        ):
            raise UsageError(
                f"max_shard_size={max_shard_size} for {out}: expected a number of bytes, and an "
                f"output whose name ends in {INDEX_ENDING}."
            )
        if place in shards:
            raise CheckpointError(
                f"{out} is a shard of a model that is read; without it that model would be "
                "broken. Give another name."
            )
        if places.count(place) > 1:
            raise UsageError(f"{out} would be written twice; give each output its own name.")


def _pairs(
    out: StrPath | Sequence[StrPath], lam: Lambda | Sequence[Lambda]
) -> tuple[list[Path], list[Lambda]]:
    if isinstance(out, (str, os.PathLike)):
        return [Path(out)], [cast(Lambda, lam)]
    if not isinstance(lam, Sequence) or len(out) != len(lam) or not out:
        raise UsageError(
            f"out={out}, lam={lam}: expected one output for each value of lam, and at least one."
        )
    return [Path(one) for one in out], list(lam)


# --- arithmetic ----------------------------------------------------------------------------------


class _Mean:
    """The mean over the inputs, with sums in float64."""

    def __init__(self, inputs: list[WeightInput]) -> None:
        self._inputs = inputs

    def __call__(self, name: str, given: list[Tensor], results: list[Tensor]) -> None:
        last = given[-1]
        if not is_interpolable(last):
            results[0].copy_(last)
            return
        wide = torch.complex128 if last.is_complex() else torch.float64
        total = given[0].to(wide, copy=True)
        addend = torch.empty_like(total)
        for values in given[1:]:
            total.add_(addend.copy_(values))  # as fast again as adding another dtype
        total.div_(len(given))
        if not bool(torch.isfinite(total.sum())):
            self._require_alike(name, given, total)
        results[0].copy_(total)

    def _require_alike(self, name: str, given: list[Tensor], mean: Tensor) -> None:
        broken = ~torch.isfinite(mean)
        if all(bool((values[broken] == mean[broken]).all()) for values in given):
            return
        files = [
            str(one.path)
            for one, values in zip(self._inputs, given, strict=True)
            if not bool(torch.isfinite(values).all())
        ]
        raise NonFiniteWeightsError(
            f"{name} holds NaN or infinity in {listed(files)}, so the mean would too. Leave "
            "that file out; look for a learning rate that is too high or a loss that overflows."
        )


def _apply(
    merge: Merge,
    sizes: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    name: str,
    given: list[Tensor],
    results: list[Tensor],
) -> None:
    shape, into = sizes[name].shape, results[0]
    merged = merge([{name: values.view(shape)} for values in given])
    value = merged.get(name) if isinstance(merged, Mapping) and len(merged) == 1 else None
    if not isinstance(value, Tensor):
        raise WeightTypeError(
            f"The method gave {str(merged)[:200]}; expected {{{name!r}: tensor}}."
        )
    if value.shape != shape or (dtype is None and value.dtype != into.dtype):
        raise WeightTypeError(
            f"The method gave {name} as {value.dtype} of shape {list(value.shape)}; expected "
            f"{into.dtype} of shape {list(shape)}."
        )
    into.copy_(value.detach().reshape(-1))
