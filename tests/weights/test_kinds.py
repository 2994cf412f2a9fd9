"""Kinds of tensors, and quantised weights that are stored as plain tensors."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from openvclip.errors import WeightTypeError
from openvclip.weights.kinds import (
    kind_of,
    quantized_names,
    refuse,
    require_averageable,
)


class Doubled(torch.Tensor):
    """A tensor class that holds no values itself, like those of torchao."""

    @staticmethod
    def __new__(cls, half: Tensor) -> Doubled:
        made: Doubled = torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)
        made.half_values = half
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError(function)


class Named(nn.Parameter):
    """A parameter with another class and nothing else."""


ROWS = torch.ones(2, 3)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # experimental or deprecated in PyTorch
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    QUANTIZED_DTYPE = torch.quantize_per_tensor(ROWS, 0.1, 0, torch.qint8)
    COMPLEX_HALF = ROWS.to(torch.complex32)
FLOAT8 = [getattr(torch, name) for name in dir(torch) if name.startswith("float8_")]
# Newer versions of PyTorch have more dtypes.
PACKED = [dtype for name in ("uint4", "float4_e2m1fn_x2") if (dtype := getattr(torch, name, None))]
KINDS = {
    "dense": [ROWS, ROWS.half(), ROWS.bfloat16(), ROWS.double(), nn.Parameter(ROWS), Named(ROWS)],
    "float8": [ROWS.to(dtype) for dtype in FLOAT8],
    "complex": [ROWS.to(torch.complex64), COMPLEX_HALF],
    "integer": [ROWS.to(torch.int8), ROWS.bool(), torch.tensor(3)],
    "meta": [ROWS.to("meta"), nn.Parameter(ROWS.to("meta"))],
    "quantized": [
        QUANTIZED_DTYPE,
        *(torch.empty(2, 2, dtype=dtype) for dtype in PACKED),
    ],
    "sparse": [ROWS.to_sparse(), ROWS.to_mkldnn(), NESTED],
    "subclass": [Doubled(ROWS)],
    "uninitialized": [nn.LazyLinear(2).weight],
}


@pytest.mark.parametrize(
    ("kind", "position"), [(k, i) for k, v in KINDS.items() for i in range(len(v))]
)
def test_kind_of(kind: str, position: int) -> None:
    # Report 27
    value = KINDS[kind][position]
    assert kind_of(value) == kind
    if kind in ("dense", "float8", "complex", "integer"):
        require_averageable({"w": value}, "theta_a")
    else:
        with pytest.raises(WeightTypeError, match=r"theta_a: 1 entries \(w\) .* first"):
            require_averageable({"w": value, "other": ROWS}, "theta_a")


def byte(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int8)


def scale(*shape: int) -> Tensor:
    return torch.ones(shape)


F8 = torch.float8_e4m3fn
QUANTIZED: list[tuple[dict[str, Tensor], str]] = [
    ({"fc.weight": byte(4, 8), "fc.scale": scale(4, 1)}, "fc.weight"),
    ({"fc.weight": byte(4, 8), "fc.SCB": scale(4)}, "fc.weight"),  # bitsandbytes, 8 bits
    ({"fc.weight": byte(16, 1), "fc.weight.absmax": scale(2)}, "fc.weight"),  # 4 bits
    ({"weight": byte(4, 8), "weight_scale": scale(4)}, "weight"),
    ({"fc.weight": ROWS.to(F8), "fc.weight_scale": scale(1)}, "fc.weight"),
    ({"fc.weight": ROWS.to(F8), "fc.weight_scale_inv": scale(1)}, "fc.weight"),  # DeepSeek
    ({"fc.weight": ROWS.to(F8), "fc.scale_weight": scale(1)}, "fc.weight"),
    ({"fc.weight": byte(2, 3), "fc.weights_scaling": scale(1)}, "fc.weight"),  # unknown scale
    ({"fc.weight._data": byte(2, 3), "fc.weight._scale": scale(1)}, "fc.weight._data"),  # quanto
    ({"fc.in_proj": byte(2, 3).to(torch.uint8), "fc.in_proj.__scale": scale(1)}, "fc.in_proj"),
    ({"fc.w": byte(2, 3), "fc.w_scale": scale(1)}, "fc.w"),
    ({"fc.weight": torch.ones(2, 3, dtype=torch.int32), "fc.scales": scale(1)}, "fc.weight"),  # mlx
    ({"fc.qweight": torch.ones(2, 3, dtype=torch.int32)}, "fc.qweight"),  # GPTQ, AWQ
    ({"fc.weight_packed": torch.ones(2, 3, dtype=torch.int32)}, "fc.weight_packed"),
    ({"fc.W_q": byte(2, 3), "fc.zero": scale(1)}, "fc.W_q"),  # HQQ
    ({"e.up_blocks": byte(2, 3), "e.up_scales": byte(2)}, "e.up_blocks"),  # MXFP4
    ({"w": QUANTIZED_DTYPE}, "w"),
]
LEGAL: list[dict[str, Tensor]] = [
    {"n.num_batches_tracked": torch.tensor(3), "n.weight": scale(3)},
    {"position_ids": torch.arange(7)[None], "scale": scale(1)},
    {"attn.relative_position_index": torch.ones(4, 4, dtype=torch.long), "attn.scale": scale(1)},
    {"attn.mask": torch.ones(4, 4, dtype=torch.uint8), "attn.scale": scale(1)},
    {"attn.attn_mask": torch.ones(4, 4, dtype=torch.bool), "attn.scale": scale(1)},
    {"fc.weight": ROWS, "fc.scale": scale(1)},
    {"fc.weight": ROWS.to(F8), "fc.scale": scale(1).to(F8)},  # a module that was cast as a whole
    {"fc.weight": ROWS.to(F8), "fc.bias": scale(1)},
    {"palette": torch.ones(256, 3, dtype=torch.uint8)},
    {"weight_fake_quant.observer_enabled": byte(1), "weight_fake_quant.scale": scale(1)},
    {"q.zero_point": torch.ones(1, dtype=torch.int32), "q.scale": scale(1)},
    {"logit_scale": torch.tensor(1.0), "ids": torch.arange(3)},
]


@pytest.mark.parametrize(("entries", "name"), QUANTIZED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_quantised_weights_are_recognised(
    entries: dict[str, Tensor], name: str, device: str
) -> None:
    # Report 14 (peft#638). Files give their sizes on the meta device.
    if device == "meta":
        entries = {n: v if v.is_quantized else v.to("meta") for n, v in entries.items()}
    assert quantized_names(entries)[0] == name
    with pytest.raises(WeightTypeError, match=r"quantised\. Dequantise all models first"):
        refuse("quantized", quantized_names(entries), "a.safetensors")


@pytest.mark.parametrize("entries", LEGAL)
def test_other_integers_and_float8_are_legal(entries: dict[str, Tensor]) -> None:
    assert quantized_names(entries) == []
    require_averageable(entries, "theta_a")
