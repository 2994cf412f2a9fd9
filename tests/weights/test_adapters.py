"""Factors of adapters: which names are factors, and which of them can be averaged."""

from __future__ import annotations

import pytest

from openvclip.errors import WeightTypeError
from openvclip.weights.adapters import factor_names, mixed_factors, refuse_factors

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
