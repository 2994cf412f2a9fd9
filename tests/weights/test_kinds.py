"""Kinds of tensors, and quantised weights that are stored as plain tensors."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from openvclip import InterpolatedWeightRegularizer, SWATracker, interpolate, interpolate_into
from openvclip.errors import WeightTypeError
from openvclip.merging import apply_task_vectors, average, slerp, task_vector
from openvclip.weights import weights_hash
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


# --- what the functions do with them -------------------------------------------------------------


def quantized(seed: int) -> dict[str, Tensor]:
    """Whole numbers and one scale for each row, as exports in 8 bits have them."""
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    rows = weight.abs().amax(dim=1, keepdim=True) / 127
    whole_numbers = (weight / rows).round().to(torch.int8)
    return {"fc.weight": whole_numbers, "fc.scale": rows, "head.weight": weight.clone()}


def test_quantised_weights_are_refused() -> None:
    # Report 14 (peft#638)
    a, b = quantized(1), quantized(2)
    message = r"theta_a: 1 entries \(fc.weight\) are quantised. Dequantise all models first"
    for lam in (0.0, 0.5):
        with pytest.raises(WeightTypeError, match=message):
            interpolate(a, b, lam)
    for merge in (lambda: average([a, b]), lambda: task_vector(a, b), lambda: slerp(a, b, 0.3)):
        with pytest.raises(WeightTypeError, match="are quantised"):
            merge()
    vector = {"fc.scale": torch.ones(4, 1), "head.weight": torch.ones(4, 8)}
    with pytest.raises(WeightTypeError, match=r"base: 1 entries .* are quantised"):
        apply_task_vectors(a, [vector])
    # The scales differ, or one of the models is not quantised.
    other_scale = {**a, "fc.scale": a["fc.scale"] * 2}
    for pair in ((a, other_scale), (a, {**b, "fc.weight": torch.randn(4, 8)})):
        with pytest.raises(WeightTypeError, match="are quantised"):
            interpolate(*pair, 0.5)


def test_frozen_quantised_weights_are_accepted() -> None:
    """A frozen part in 8 bits that both models have, beside a part that was trained."""
    a = quantized(1)
    b = {name: value.clone() for name, value in a.items()}
    b["head.weight"] = a["head.weight"] + 2
    result = interpolate(a, b, 0.5)
    torch.testing.assert_close(result["head.weight"], a["head.weight"] + 1)
    assert torch.equal(result["fc.weight"], a["fc.weight"])
    assert torch.equal(result["fc.scale"], a["fc.scale"])
    average([a, b])
    vector = {"fc.scale": torch.zeros(4, 1), "head.weight": torch.ones(4, 8)}
    apply_task_vectors(a, [vector])


class Quantized(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        state = quantized(seed)
        self.fc, self.head = nn.Module(), nn.Module()
        self.fc.weight = nn.Parameter(state["fc.weight"], requires_grad=False)
        self.fc.register_buffer("scale", state["fc.scale"])
        self.head.weight = nn.Parameter(state["head.weight"])


def test_trackers_of_quantised_models() -> None:
    model = Quantized(1)
    swa = SWATracker(model)  # the frozen part keeps its values
    swa.update(model)
    InterpolatedWeightRegularizer(model)
    with pytest.raises(WeightTypeError, match=r"The model: 1 entries \(fc.weight\) are quantised"):
        SWATracker(model.requires_grad_(False))


def test_weights_without_values() -> None:
    # Report 24 (llm-compressor#1432)
    model = nn.Sequential(nn.Linear(2, 2)).to("meta")
    with pytest.raises(WeightTypeError, match=r"The trained parameters: 2 entries .*remove_hook"):
        InterpolatedWeightRegularizer(model)
    swa = SWATracker(model)  # the model can get its values before the first average
    with pytest.raises(WeightTypeError, match=r"The model: 2 entries .*on the meta device"):
        swa.update(model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    swa.update(model)
    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    for target in (model, nn.Sequential(nn.Linear(2, 2)).to("meta")):
        with pytest.raises(WeightTypeError, match="on the meta device"):
            interpolate_into(target, state, dict(state), 0.5)


def test_offloaded_weights_are_refused_before_the_training() -> None:
    # Report 24 (llm-compressor#1432)
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(2, 2))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(WeightTypeError, match=r"recurse=True\)") as error:
        SWATracker(model)
    assert "remove_hook_from_module" in str(error.value)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)  # what the error advises
    swa = SWATracker(model)
    swa.update(model)
    for name, value in swa.averaged_state_dict().items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("kind", ["sparse", "quantized", "subclass", "meta", "uninitialized"])
def test_values_that_can_not_be_averaged_are_refused_everywhere(kind: str) -> None:
    # Report 27
    value = KINDS[kind][0]
    with pytest.raises(WeightTypeError, match="theta_b: 1 entries"):
        interpolate({"w": ROWS}, {"w": value}, 0.5)
    with pytest.raises(WeightTypeError, match="theta_a: 1 entries"):
        interpolate({"w": value}, {"w": value}, 1.0)
    with pytest.raises(WeightTypeError, match=r"models\[1\]: 1 entries"):
        average([{"w": ROWS}, {"w": value}])
    with pytest.raises(WeightTypeError, match="state: 1 entries"):
        weights_hash({"w": value})


def test_a_sparse_parameter_and_a_lazy_layer() -> None:
    sparse, lazy = nn.Module(), nn.Sequential(nn.LazyLinear(2))
    sparse.w = nn.Parameter(ROWS.to_sparse())
    with pytest.raises(WeightTypeError, match=r"not dense.*to_dense"):
        InterpolatedWeightRegularizer(sparse)
    with pytest.raises(WeightTypeError, match=r"not dense.*to_dense"):
        SWATracker(sparse)
    for create in (InterpolatedWeightRegularizer, SWATracker):
        with pytest.raises(WeightTypeError, match="Run one forward pass first"):
            create(lazy)
    anchor = {"0.weight": ROWS.to_sparse(), "0.bias": torch.ones(2)}
    with pytest.raises(WeightTypeError, match="anchor: 1 entries"):
        InterpolatedWeightRegularizer(nn.Sequential(nn.Linear(3, 2)), anchor=anchor)
