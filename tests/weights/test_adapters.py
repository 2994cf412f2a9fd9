"""Factors of adapters: which names are factors, and which of them can be averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openvclip import (
    EMATracker,
    GaussianTracker,
    InterpolatedWeightRegularizer,
    LAWATracker,
    SWATracker,
    interpolate,
    interpolate_into,
)
from openvclip.errors import WeightTypeError
from openvclip.merging import apply_task_vectors, task_vector
from openvclip.weights.adapters import factor_names, mixed_factors, refuse_factors
from tests.merging.methods import MERGES, State

LAYER = "base_model.model.visual.blocks.0.attn"
FACTORS = [
    *(f"{LAYER}.q.lora_{part}.default.weight" for part in "AB"),  # peft, live
    *(f"{LAYER}.q.lora_{part}.weight" for part in "ABE"),  # peft, saved
    *(f"{LAYER}.embed.lora_embedding_{part}.default" for part in "AB"),
    f"{LAYER}.q.lora_magnitude_vector",
    f"{LAYER}.q.lora_magnitude_vector.default.weight",
    f"{LAYER}.q.lora_B.default.bias",
    *("attn.c_attn.lora_A", "attn.c_attn.lora_B", "lora_A"),  # loralib
    *("visual.blocks.0.attn.q_proj.w_lora_A", "attn.q_proj.w_lora_B"),
    *("layers.0.q.lora_a.weight", "layers.0.q.lora_b.weight"),  # torchtune
    *("lora_unet_down_0_to_k.lora_up.weight", "lora_te_text_k.lora_down.weight"),  # kohya
    *("a.lora_mid.weight", "a.dora_scale"),
    *("up.attn.to_q_lora.down.weight", "up.attn.to_q_lora.up.weight"),  # diffusers
    *("q.lora.up.weight", "q.lora.down.weight", "q.lora_linear_layer.up.weight"),
    *(f"q.hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *("q.lokr_w1", "q.lokr_w2_a.default", "q.lokr_t2"),
    *("q.oft_r.default", "q.oft_R.default.weight", "q.oft_blocks", "q.boft_R.default", "q.hra_u.x"),
    *("mlp.ia3_l.default", "q.vera_lambda_b.default", "q.vera_lambda_d", "base.vera_A.default"),
]
ORDINARY = [
    *("visual.class_embedding", "visual.conv1.weight", "visual.proj", "text_projection"),
    *("logit_scale", "alpha", "q.alpha", "magnitude", "q.magnitude", "visual.ln_pre.bias"),
    *("q.base_layer.weight", "soft_r.weight", "flora_A.weight", "explora_b", "lora.weight"),
    *("lora_net.layer.weight", "color_up.weight", "up.weight", "layers.lora_dropout.p", "rho_oft"),
    *("blocks.0.gamma_1", "lora_unet_q.alpha", "valora_B.weight", "ia3_layer.weight", "lora_ABC"),
]


def test_factors_are_recognised_and_ordinary_names_are_not() -> None:
    # Report 13 (peft#1155) and 39
    assert factor_names([*ORDINARY, *FACTORS]) == FACTORS


@pytest.mark.parametrize(
    ("different", "mixed"),
    [
        ((), ()),
        (("q.lora_A.weight",), ()),  # B (a A1 + b A2) is the mean of B A1 and B A2
        (("q.lora_B.weight", "k.lora_A.weight"), ()),  # factors of two products
        (("q.lora_A.weight", "q.lora_B.weight"), ("q.lora_A.weight", "q.lora_B.weight")),
        (("k.lora_B.weight",), ()),
        (("up.lora_up.weight", "up.alpha"), ("up.lora_up.weight", "up.alpha")),
        (("up.alpha",), ()),
        (("dora.lora_B.weight",), ("dora.lora_B.weight",)),  # divided by a norm
        (("tune.lora_b.weight",), ("tune.lora_b.weight",)),
        (("x.ia3_l",), ()),
        (("x.base_layer.weight",), ()),
        (("x.ia3_l", "x.base_layer.weight"), ("x.ia3_l", "x.base_layer.weight")),
        (("h.hada_w1_a",), ()),
        (("h.hada_w1_a", "h.hada_w2_b"), ("h.hada_w1_a", "h.hada_w2_b")),
        (("q.weight", "q.bias"), ()),
    ],
)
def test_a_product_may_differ_in_one_factor(
    different: tuple[str, ...], mixed: tuple[str, ...]
) -> None:
    names = [
        *(f"{layer}.lora_{part}.weight" for layer in ("q", "k", "dora") for part in "AB"),
        *(
            "up.lora_up.weight",
            "up.lora_down.weight",
            "up.alpha",
            "x.ia3_l",
            "x.base_layer.weight",
            "q.weight",
            "q.bias",
        ),
        *("tune.lora_a.weight", "tune.lora_b.weight", "tune.magnitude"),
        "dora.lora_magnitude_vector",
        *(f"h.hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")),
    ]
    assert mixed_factors(names, lambda name: name in different) == list(mixed)


def test_the_error_says_what_to_do() -> None:
    refuse_factors([], "theta_a")
    with pytest.raises(WeightTypeError, match="theta_a holds 2 factors") as error:
        refuse_factors(["q.lora_A", "q.lora_B"], "theta_a")
    assert "merge_and_unload() in peft), then interpolate." in str(error.value)
    with pytest.raises(WeightTypeError, match=r"Freeze A\. The factors can't be averaged"):
        refuse_factors(["q.lora_A", "q.lora_B"], "theta_a", advice="Freeze A.")


# --- what is refused, and what is exact ----------------------------------------------------------


class LoRA(nn.Module):
    """A frozen weight with an update ``B A``, as peft names them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base_layer = nn.Linear(6, 5, bias=False).requires_grad_(False)
        self.base_layer.weight.data.copy_(torch.arange(30.0).reshape(5, 6) / 30)
        self.lora_A = nn.ParameterDict({"default": torch.randn(2, 6, generator=generator)})
        self.lora_B = nn.ParameterDict({"default": torch.randn(5, 2, generator=generator)})

    def merged(self) -> Tensor:
        update = self.lora_B["default"].double() @ self.lora_A["default"].double()
        return (self.base_layer.weight + update).detach()


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_a(model: LoRA, other: LoRA) -> LoRA:
    other.lora_A["default"].data.copy_(model.lora_A["default"])
    return other


A, B = "lora_A.default", "lora_B.default"
METHODS: dict[str, Callable[[State, Sequence[State]], object]] = {
    **MERGES,
    "interpolate": lambda a, others: interpolate(a, others[0], 0.5),
    "interpolate_into": lambda a, others: interpolate_into(LoRA(0), a, others[0], 0.5),
    "task_vector": lambda a, others: task_vector(a, others[0]),
    "apply_task_vectors": lambda a, others: apply_task_vectors(
        a, [{name: b[name] - a[name] for name in a} for b in others]
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_not_combined_one_by_one(method: str) -> None:
    # Report 13 (peft#1155)
    with pytest.raises(WeightTypeError, match=r"2 factors of an adapter .*merge_and_unload"):
        METHODS[method](copied(LoRA(1)), [copied(LoRA(seed)) for seed in (2, 3)])
    METHODS[method](copied(LoRA(1)), [copied(same_a(LoRA(1), LoRA(seed))) for seed in (2, 3)])


@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_one_factor_is_combined_exactly(lam: float) -> None:
    first = LoRA(1)
    second = same_a(first, LoRA(2))
    exact = lam * first.merged() + (1 - lam) * second.merged()
    result = LoRA(3)
    result.load_state_dict(interpolate(copied(first), copied(second), lam))
    torch.testing.assert_close(result.merged(), exact, rtol=1e-5, atol=1e-5)
    # The original CLIP in the form of the adapter: the same A, and zeros for B.
    clip = {name: torch.zeros_like(v) if name == B else v for name, v in copied(first).items()}
    result.load_state_dict(interpolate(clip, copied(first), lam))
    exact = lam * first.base_layer.weight.double() + (1 - lam) * first.merged()
    torch.testing.assert_close(result.merged(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "tracker", [SWATracker, EMATracker, LAWATracker, partial(GaussianTracker, mu=2.0, sigma=1.0)]
)
def test_trackers_refuse_factors_that_are_trained_together(tracker: Any) -> None:
    # Report 39
    with pytest.raises(WeightTypeError, match=r"Train one factor of each adapter only.*lora_A fr"):
        tracker(LoRA(0))
    model = LoRA(0)
    model.lora_A.requires_grad_(False)
    tracker(model).update(model)


def test_the_average_of_one_factor_is_exact() -> None:
    model = LoRA(0)
    model.lora_A.requires_grad_(False)
    swa, merged = SWATracker(model), []
    for seed in (1, 2, 3):
        model.lora_B["default"].data.copy_(LoRA(seed).lora_B["default"])
        swa.update(model)
        merged.append(model.merged())
    model.load_state_dict(swa.averaged_state_dict())
    torch.testing.assert_close(model.merged(), torch.stack(merged).mean(0), rtol=1e-5, atol=1e-5)


def test_the_regulariser_accepts_what_is_exact() -> None:
    # Report 39
    model = LoRA(1)
    original = model.base_layer.weight.double()
    start = copied(model)
    zeros = {B: torch.zeros(5, 2)}
    wrong: list[tuple[State | None, str]] = [
        (None, "error"),  # the current factors
        (start, "error"),
        ({**start, **zeros}, "error"),  # also moves A
        ({B: torch.ones(5, 2)}, "skip"),  # the original B with another A
        ({A: start[A]}, "skip"),
    ]
    for anchor, missing in wrong:
        with pytest.raises(WeightTypeError, match="Pass zeros for lora_B as the only anchor"):
            InterpolatedWeightRegularizer(model, anchor=anchor, missing=missing)  # type: ignore[arg-type]
    for name in (B, A):  # either factor scales the product
        anchor = {name: torch.zeros_like(start[name])}
        iwr = InterpolatedWeightRegularizer(
            model, anchor=anchor, missing="skip", interval=(0.25, 0.25)
        )
        exact = 0.25 * original + 0.75 * model.merged()
        with iwr.interpolated():
            torch.testing.assert_close(model.merged(), exact, rtol=1e-5, atol=1e-5)
    model.lora_A.requires_grad_(False)
    iwr = InterpolatedWeightRegularizer(model, interval=(0.25, 0.25))  # A is frozen
    before = model.merged()
    model.lora_B["default"].data.add_(1.0)
    exact = 0.25 * before + 0.75 * model.merged()
    with iwr.interpolated():
        torch.testing.assert_close(model.merged(), exact, rtol=1e-5, atol=1e-5)
