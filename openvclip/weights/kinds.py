"""Kinds of tensors: which entries of a state dict can be averaged, and which can't.

An entry is a number for each weight only if the entry is dense and not quantised. The functions of
this module recognise all other entries and raise errors that say what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from openvclip.errors import WeightTypeError, listed
from openvclip.weights.shards import is_sharded

Kind: TypeAlias = Literal[
    "dense",
    "float8",
    "complex",
    "integer",
    "meta",
    "quantized",
    "sparse",
    "subclass",
    "uninitialized",
]

_ADVICE: dict[str, str] = {
    "meta": "have no values, because they are on the meta device. If accelerate offloads the "
    "weights (cpu_offload, device_map), take its hooks off first: "
    "accelerate.hooks.remove_hook_from_module(model, recurse=True). Else load the weights into the "
    "model.",
    "quantized": "are quantised. Dequantise all models first, for example with "
    "model.dequantize(), and quantise the result again. The same whole number stands for another "
    "weight if the scale differs, so quantised weights can't be averaged.",
    "sparse": "are not dense. Convert them first: value.to_dense().",
    "subclass": "are stored by a class of another library. Convert them to plain tensors first, "
    "for example with value.dequantize() for torchao.",
    "uninitialized": "have no shape yet. Run one forward pass first: the layers are lazy.",
}

# dtypes that pack several numbers into a byte, or that have no arithmetic at all
_PACKED = frozenset(
    dtype
    for name in (
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
        *("bits1x8", "bits2x4", "bits4x2", "bits8", "bits16", "float4_e2m1fn_x2"),
    )
    if isinstance(dtype := getattr(torch, name, None), torch.dtype)
)


def kind_of(tensor: Tensor) -> Kind:
    """Return the kind of a tensor, which decides about the arithmetic on it.

    Returns:
        The first of these that applies:

        * ``"uninitialized"``: a parameter of a lazy layer before its first forward pass.
        * ``"quantized"``: a quantised dtype, or a dtype of packed numbers.
        * ``"sparse"``: a layout that is not strided, or a nested tensor.
        * ``"subclass"``: a class that computes its values itself, for example of torchao.
        * ``"meta"``: a tensor without values.
        * ``"integer"``: integers and booleans.
        * ``"complex"``.
        * ``"float8"``: 8 bits without a scale. Compute in float32.
        * ``"dense"``: all other floating-point numbers.

        A sharded tensor (``DTensor``) has the kind of its values.
    """
    if is_lazy(tensor):
        return "uninitialized"
    if tensor.is_quantized or tensor.dtype in _PACKED:
        return "quantized"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "sparse"
    if _computes_itself(tensor) and not is_sharded(tensor):
        return "subclass"
    if tensor.is_meta:
        return "meta"
    if tensor.is_complex():
        return "complex"
    if not tensor.is_floating_point():
        return "integer"
    return "float8" if is_float8_dtype(tensor.dtype) else "dense"


def is_float8_dtype(dtype: torch.dtype) -> bool:
    """Return whether a dtype is a floating-point number of 8 bits."""
    return dtype.is_floating_point and dtype.itemsize == 1 and dtype not in _PACKED


def _computes_itself(tensor: Tensor) -> bool:
    # A subclass without its own dispatch is a plain tensor with another name.
    dispatch = type(tensor).__torch_dispatch__
    return cast(object, dispatch) is not cast(object, Tensor.__torch_dispatch__)


# --- quantised weights in plain tensors ----------------------------------------------------------

# GPTQ, AWQ, compressed-tensors, HQQ: integers under these names are always quantised.
_QUANTIZED_PARTS = frozenset({"qweight", "qzeros", "weight_packed", "W_q"})
# Names of scales beside an entry N: N_scale, scale_N, N.scale and others.
_SCALES_OF = (
    *("{0}_scale", "{0}_scales", "{0}_scale_inv", "{0}_scale_2", "{0}.scale", "{0}.scales"),
    *("{0}.__scale", "{0}.absmax", "{0}_absmax", "scale_{0}"),
)
# Names of scales of all weights of a module.
_MODULE_SCALES = ("scale", "scales", "_scale", "weight_scale", "scale_weight", "SCB", "scaler")
_WEIGHT = re.compile(r"weight|_proj$|_blocks$")
# Names of integers that are not weights, for example of observers and of attention masks.
_NO_WEIGHT = re.compile(r"mask|index|indices|ids$|count|enabled|zero_point|steps?$|shape$|table$")
_BYTES = frozenset({torch.int8, torch.uint8})


def quantized_names(entries: Mapping[str, Tensor]) -> list[str]:
    """Return the names of entries that hold quantised weights.

    These are entries with a quantised dtype, and whole numbers or float8 numbers beside their
    scales. Other integers (``num_batches_tracked``, ``position_ids``, index tables, masks) and
    float8 numbers without scales are not quantised.

    Args:
        entries: all entries of a state dict, under any names. The values are not read, so tensors
            on the meta device are accepted.
    """
    return [name for name, value in entries.items() if _is_quantized(name, value, entries)]


def _is_quantized(name: str, value: Tensor, entries: Mapping[str, Tensor]) -> bool:
    dtype = value.dtype
    if value.is_quantized or dtype in _PACKED:
        return True
    is_float8 = is_float8_dtype(dtype)
    if dtype == torch.bool or dtype.is_complex or (dtype.is_floating_point and not is_float8):
        return False
    part = name.rpartition(".")[2]
    if part in _QUANTIZED_PARTS:
        return True
    is_weight = _WEIGHT.search(part) is not None
    if not (is_weight or is_float8 or dtype in _BYTES) or _NO_WEIGHT.search(part):
        return False
    if scales_of(name, entries):
        return True
    # A matrix of bytes under the name of a weight has scales under another name.
    return is_weight and dtype in _BYTES and value.ndim > 1


def scales_of(name: str, entries: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the scales of a quantised entry, as far as they have usual names."""
    value, (module, _, part) = entries[name], name.rpartition(".")
    prefix = f"{module}." if module else ""
    scales = [prefix + pattern.format(part) for pattern in _SCALES_OF]
    if value.ndim > 1 or _WEIGHT.search(part):
        scales += [prefix + scale for scale in _MODULE_SCALES]
    return [s for s in scales if s != name and _is_scale(entries.get(s), value.dtype)]


def _is_scale(scale: Tensor | None, dtype: torch.dtype) -> bool:
    # If a whole model was cast to float8, a parameter named `scale` is not a scale of weights.
    return scale is not None and (scale.dtype != dtype or not dtype.is_floating_point)


# --- errors --------------------------------------------------------------------------------------


def require_averageable(entries: Mapping[str, Tensor], what: str) -> None:
    """Raise an error if arithmetic on the entries would fail or give wrong weights.

    Args:
        entries: all entries of a state dict.
        what: name of the argument or the file, for the error text.

    Raises:
        WeightTypeError: an entry is sparse, quantised, without values, or of a class that computes
            its values itself.
    """
    require_values(entries, what)
    refuse("quantized", quantized_names(entries), what)


def require_values(entries: Mapping[str, Tensor], what: str) -> None:
    """Raise an error if an entry has no plain values: sparse, on the meta device, or a subclass.

    Quantised dtypes are accepted. Use :func:`require_averageable` before arithmetic.

    Raises:
        WeightTypeError: there are such entries.
    """
    by_kind: dict[Kind, list[str]] = {}
    for name, value in entries.items():
        by_kind.setdefault(kind_of(value), []).append(name)
    refused: tuple[Kind, ...] = ("uninitialized", "meta", "sparse", "subclass")
    for kind in refused:
        refuse(kind, by_kind.get(kind, []), what)


def refuse(kind: Kind, names: Iterable[str], what: str) -> None:
    """Raise an error for entries of a kind, if there are any. The text says what to do.

    Raises:
        WeightTypeError: there are such entries.
    """
    refused = list(names)
    if refused:
        raise WeightTypeError(f"{what}: {len(refused)} entries ({listed(refused)}) {_ADVICE[kind]}")
