"""Prompts on timm's ViT and Eva towers, alone and inside open_clip."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    VisionTransformer,
    checkpoint_filter_fn,
)
from torch import nn
from torch.nn import functional

from openvclip import expand_temporal_attention
from openvclip import prompting as P
from openvclip.errors import (
    CheckpointError,
    PromptBackboneWarning,
    PromptOptionError,
    UnsupportedModelError,
    UsageError,
)
from tests.helpers import assert_same_state, gradients, random_video, randomise, same_bits, snapshot
from tests.prompting import towers as laws
from tests.prompting.reference import NAMES, TEXT, word_tokenizer
from tests.prompting.test_released import VIFI, VITA, by_hand, fill, golden
from tests.prompting.towers import METHODS, vifi
from tests.towers.test_temporal_timm import (
    CASES,
    KINDS,
    call,
    eva,
    in_open_clip,
    make,
    slow_attention,
    vit,
)
from tests.towers.test_temporal_timm import vitamin as vitamin_tower
from tests.towers.tower_laws import CLOSE, Case

REGISTERS = vit(class_token=False, reg_tokens=2, no_embed_class=True, global_pool="avg")
ALL = {
    **CASES,
    "registers alone": Case("", partial(make, REGISTERS), call, lambda model: None),
}
WITHOUT_CLASS_TOKEN = ("siglip", "registers alone")
PREFIX = {"siglip": 0, "registers": 3, "grouped heads": 3, "registers alone": 2}
CASES_OF_LAWS = {name: CASES[name] for name in ("siglip", "q/k norm", "eva02", "mixed rope")}


@pytest.mark.parametrize("expansion", [{}, {"window": 1, "boundary": "zero"}], ids=str)
@pytest.mark.parametrize("attach", METHODS)
@pytest.mark.parametrize("name", ALL)
def test_the_tower_equals_the_loops(name: str, attach: Any, expansion: dict[str, Any]) -> None:
    """Rotary embeddings do not rotate prompts, and each layer gets its own angles."""
    settings = (expansion["window"], expansion["boundary"]) if expansion else (0, "mask")
    laws.equals_the_hooked_tower(
        ALL[name],
        attach,
        partial(slow_attention, settings=settings),
        prefix=PREFIX.get(name, 1),
        class_token=name not in WITHOUT_CLASS_TOKEN,
        tolerance=1e-6,
        **expansion,
    )


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "expanded"])
@pytest.mark.parametrize("name", CASES_OF_LAWS)
def test_law(name: str, expanded: bool, law: Callable[[Case, bool], None]) -> None:
    law(CASES_OF_LAWS[name], expanded)


@pytest.mark.parametrize("name", CASES)
def test_files_go_there_and_back(name: str, tmp_path: Path) -> None:
    laws.files_go_there_and_back(CASES[name], tmp_path / "prompts.safetensors")


def test_compiled_in_one_graph() -> None:
    laws.compiled_in_one_graph(CASES["eva02"], vifi)


@pytest.mark.parametrize("attach", METHODS)
@pytest.mark.parametrize("rope", ["cat", "mixed"])
def test_dropped_patches_take_their_angles_with_them(attach: Any, rope: str) -> None:
    """A plain tower equals an expanded tower in which no layer attends to neighbours."""
    kind = eva(patch_drop_rate=0.5, rope_type=rope, attn_type="rope")
    results = []
    for expanded in (False, True):
        tower = make(kind)
        if expanded:
            expand_temporal_attention(tower, layers=[])
        attach(tower).train()
        torch.manual_seed(5)
        results.append(tower(random_video(2, 3)))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    tower.eval()
    assert (tower(random_video(2, 3)) - results[1]).abs().max() > 1e-3


def test_vitamin() -> None:
    """Its patch embedding is a stack of convolutions, and it has no class token."""
    case = Case("", partial(make, vitamin_tower), call, lambda model: None)
    video = torch.randn(2, 3, 3, 32, 32)
    for attach in METHODS:
        tower = attach(case.make())
        assert tower(video).shape == (2, 3, 8)
        tower(video).square().sum().backward()
        assert gradients(tower).keys() == {
            f"openvclip_prompts.{n}" for n, _ in tower.openvclip_prompts.named_parameters()
        }
    bound = (6 / (3 * 16 * 16 + 16)) ** 0.5
    plain = P.attach_vita(case.make(), frames=3, text_prompts=0)
    start: Any = plain.openvclip_prompts  # a token stands for 16 x 16 pixels
    assert 0.9 * bound < start.vision.global_prompts.abs().max() < bound


# --- the released implementations --------------------------------------------------------------


def golden_timm(weights: dict[str, Any]) -> VisionTransformer:
    """The golden tower's sizes and weights in timm's ``VisionTransformer``."""
    tower = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=128,
        depth=3,
        num_heads=2,
        num_classes=48,
        act_layer="quick_gelu",
        norm_layer=nn.LayerNorm,
        qkv_bias=True,
        pre_norm=True,
    ).eval()
    named = {f"visual.{name}": value for name, value in weights.items()}
    tower.load_state_dict(checkpoint_filter_fn(named, tower))
    return tower


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vifi_equals_the_release(checkpointing: bool) -> None:
    released, video, output = golden(VIFI)
    tower = golden_timm({n: v for n, v in released.items() if "VPT" not in n})
    tower.set_grad_checkpointing(checkpointing)
    P.attach_vifi(tower, vision_prompts=3, vision_depth=2, text_prompts=0)
    names = ("VPT", "transformer.resblocks.1.VPT_shallow")
    fill(tower, {"tokens": torch.stack([released[name] for name in names])})
    torch.testing.assert_close(tower(video), output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vita_equals_the_release(checkpointing: bool) -> None:
    released, video, output = golden(VITA)
    weights, prompts = by_hand(released)
    tower = golden_timm(weights)
    tower.set_grad_checkpointing(checkpointing)
    P.attach_vita(tower, frames=4, global_prompts=3, text_prompts=0)
    fill(tower, prompts)
    torch.testing.assert_close(tower(video).mean(1), output, rtol=0, atol=1e-5)


def test_prompts_of_a_release_go_onto_a_tower_of_timm(tmp_path: Path) -> None:
    """The file was written with open_clip's tower. Loading it does not warn of other weights."""
    released, video, output = golden(VITA)
    P.save(P.load_released(released), tmp_path / "vita.safetensors")
    tower = P.load(golden_timm(by_hand(released)[0]), tmp_path / "vita.safetensors")
    torch.testing.assert_close(tower(video).mean(1), output, rtol=0, atol=1e-5)


# --- files -------------------------------------------------------------------------------------


def test_another_backbone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.safetensors"
    P.save(vifi(make(KINDS["siglip"])), path)
    with pytest.raises(CheckpointError, match=r"(?s)another vision tower.*layers +2 +3"):
        P.load(make(vit(class_token=False, global_pool="map", num_classes=0, depth=3)), path)
    with pytest.warns(PromptBackboneWarning, match="same sizes as the model, but other"):
        P.load(randomise(make(KINDS["siglip"]), seed=9), path)


# --- inside open_clip --------------------------------------------------------------------------


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize(
    "vision",
    [{"timm_pool": "map", "timm_proj": "none"}, {"timm_pool": "avg", "timm_proj": "mlp"}],
    ids=["map", "avg"],
)
def test_a_whole_model(vision: dict[str, str], expanded: bool, tmp_path: Path) -> None:
    """Both towers of a model around one of timm's are prompted, trained, saved and loaded."""

    def build() -> Any:
        torch.manual_seed(0)
        sizes = {"timm_model_name": "test_vit", "image_size": 32, **vision}
        model = open_clip.CustomTextCLIP(embed_dim=64, vision_cfg=sizes, text_cfg=dict(TEXT))
        model.visual.set_input_size(32)
        randomise(model, scale=0.1).eval()
        return expand_temporal_attention(model) if expanded else model

    model, video = build(), torch.randn(2, 4, 3, 32, 32)
    P.attach_vita(model, frames=4, global_prompts=2, text_prompts=2)
    head = P.VideoClassifier(model, word_tokenizer, NAMES).train()
    before = snapshot(model)
    optimizer = torch.optim.AdamW(P.parameters(model), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(head(video), torch.tensor([0, 2])).backward()
        optimizer.step()
    prompts = {name for name in before if name.startswith("openvclip_prompts.")}
    assert gradients(model).keys() == prompts
    moved = {n for n, v in model.state_dict().items() if not same_bits(v, before[n])}
    assert moved == prompts
    P.save(model, tmp_path / "prompts.safetensors")
    other = P.load(build(), tmp_path / "prompts.safetensors")
    assert_same_state(other.state_dict(), model.state_dict())
    heads = [P.VideoClassifier(m.eval(), word_tokenizer, NAMES) for m in (model, other)]
    assert same_bits(heads[0](video), heads[1](video))
    P.detach(model)
    assert_same_state(model.state_dict(), {n: before[n] for n in model.state_dict()})


# --- what is refused ---------------------------------------------------------------------------


def test_what_knows_nothing_of_prompts() -> None:
    for name in ("siglip", "eva02"):
        tower: Any = vifi(make(KINDS[name]))
        with pytest.raises(UsageError, match="detach"):
            tower.forward_intermediates(random_video(1, 2)[0])
        with pytest.raises(UsageError, match="nor for towers with prompts"):
            tower(random_video(1, 2)[0], is_causal=True)


def test_towers_that_take_no_prompts() -> None:
    with pytest.raises(UnsupportedModelError, match=r"TimmModel around ResNet, which can't take"):
        vifi(in_open_clip("test_resnet", timm_pool="avg", timm_proj="linear"))
    with pytest.raises(UnsupportedModelError, match="made of ParallelScalingBlock blocks"):
        vifi(make(vit(block_fn=ParallelScalingBlock)))
    with pytest.raises(PromptOptionError, match="vision_depth=3: the tower has 2 layers"):
        P.attach_vifi(make(KINDS["eva02"]), vision_depth=3, text_prompts=0)
