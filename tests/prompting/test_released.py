"""Prompts equal the released implementations, and released towers are rebuilt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors import safe_open
from torch import Tensor

from openvclip import prompting as P
from openvclip.errors import (
    CheckpointError,
    PromptOptionError,
    StateMismatchError,
    VideoShapeError,
    WeightTypeError,
)
from tests.helpers import GOLDEN, gradients, randomise, same_bits
from tests.on_device import placed
from tests.prompting.reference import (
    NAMES,
    prompt_clip,
    vifi_frames,
    vita_frames,
    word_tokenizer,
)

VIFI = GOLDEN / "vifi_vision_prompt_T4.safetensors"
VITA = GOLDEN / "vita_vision_all_T4.safetensors"
BLOCK = "transformer.resblocks"

State = dict[str, Tensor]


def golden(path: Any) -> tuple[State, Tensor, Tensor]:
    """Released weights, a video ``[B, T, C, H, W]``, and the released output."""
    with safe_open(path, "pt") as file:
        tensors = {name: placed(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    weights = {n.removeprefix("weights."): v for n, v in tensors.items() if n.startswith("weights")}
    video = tensors["input"] if path == VIFI else tensors["input"].transpose(1, 2)
    return weights, video, tensors["output"]


def golden_tower(**changes: Any) -> VisionTransformer:
    settings: dict[str, Any] = {"layers": 3, "width": 128, "heads": 2, "output_dim": 48}
    sizes = {"image_size": 32, "patch_size": 8, "mlp_ratio": 4.0}
    return VisionTransformer(**settings, **sizes, act_layer=QuickGELU, **changes).eval()


def by_hand(released: State) -> tuple[State, State]:
    """Vita-CLIP's weights and prompts under this library's names, written out one by one."""
    r = released
    position = r["pos_embed"].clone()
    position[1:] += r["patch_embed.proj.bias"]
    tower = {"class_embedding": r["cls_token"], "positional_embedding": position}
    tower |= {"conv1.weight": r["patch_embed.proj.weight"], "proj": r["proj"]}
    prompts = {"global_prompts": r["global_prompts"], "time_embedding": r["time_embed"]}
    prompts["local_prompts"] = torch.cat([r[f"blocks.{i}.local_prompts"] for i in range(3)])
    for kind in ("weight", "bias"):
        tower |= {f"{n}.{kind}": r[f"{n}.{kind}"] for n in ("ln_pre", "ln_post")}
        for i in range(3):
            ours, theirs = f"{BLOCK}.{i}", f"blocks.{i}"
            for a, b in (
                ("ln_1", "norm1"),
                ("ln_2", "norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
                ("attn.out_proj", "attn.out_proj"),
            ):
                tower[f"{ours}.{a}.{kind}"] = r[f"{theirs}.{b}.{kind}"]
            qkv = [r[f"{theirs}.attn.{x}_proj.{kind}"] for x in "qkv"]
            tower[f"{ours}.attn.in_proj_{kind}"] = torch.cat(qkv)
            summary = f"{theirs}.summary_attn_layer"
            qkv = [r[f"{summary}.{x}_proj.{kind}"] for x in "qkv"]
            prompts[f"summary.{i}.attn.in_proj_{kind}"] = torch.cat(qkv)
            prompts[f"summary.{i}.attn.out_proj.{kind}"] = r[f"{summary}.out_proj.{kind}"]
            prompts[f"summary.{i}.norm.{kind}"] = r[f"{theirs}.summary_ln.{kind}"]
            prompts[f"cls_proj.{i}.{kind}"] = r[f"{theirs}.cls_proj.{kind}"]
    return tower, prompts


def fill(tower: VisionTransformer, prompts: State) -> None:
    P.load_state_dict(tower, {f"openvclip_prompts.vision.{n}": v for n, v in prompts.items()})


def test_vifi_attached_equals_the_release() -> None:
    released, video, output = golden(VIFI)
    tower = golden_tower()
    tower.load_state_dict({n: v for n, v in released.items() if "VPT" not in n})
    plain = tower(video.flatten(0, 1)).unflatten(0, (2, 4))
    P.attach_vifi(tower, vision_prompts=3, vision_depth=2, text_prompts=0)
    tokens = torch.stack([released["VPT"], released[f"{BLOCK}.1.VPT_shallow"]])
    fill(tower, {"tokens": tokens})
    torch.testing.assert_close(tower(video), output, rtol=0, atol=1e-5)
    assert (plain - output).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vita_attached_equals_the_release(checkpointing: bool) -> None:
    released, video, output = golden(VITA)
    weights, prompts = by_hand(released)
    tower = golden_tower()
    tower.load_state_dict(weights)
    tower.set_grad_checkpointing(checkpointing)
    plain = tower(video.flatten(0, 1)).unflatten(0, (2, 4)).mean(1)
    P.attach_vita(tower, frames=4, global_prompts=3, text_prompts=0)
    fill(tower, prompts)
    torch.testing.assert_close(tower(video).mean(1), output, rtol=0, atol=1e-5)
    assert (plain - output).abs().max() > 0.1


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual.", "module.image_encoder."])
@pytest.mark.parametrize("path", [VIFI, VITA], ids=["vifi", "vita"])
def test_rebuilt_equals_the_release(path: Any, prefix: str) -> None:
    released, video, output = golden(path)
    state = {prefix + name: value for name, value in released.items()}
    if prefix:
        outer = "module." if prefix.startswith("module.") else ""
        for name in ("prompt_learner.ctx", "prompt_learner.token_prefix", "logit_scale"):
            state[outer + name] = torch.zeros(2)
        state[f"{outer}text_encoder.{BLOCK}.1.VPT_shallow"] = torch.zeros(2)
    model: Any = P.load_released(state)
    got = model.encode_image(video)
    assert got.shape == (2, 4, 48)
    torch.testing.assert_close(got if path == VIFI else got.mean(1), output, rtol=0, atol=1e-5)
    assert not model.training
    assert {p.requires_grad for p in model.visual.parameters()} == {False}
    unit = model.encode_image(video, normalize=True)
    torch.testing.assert_close(unit, got / got.norm(dim=-1, keepdim=True))
    model(video).sum().backward()
    assert all(name.startswith("openvclip_prompts.vision.") for name in gradients(model))


PARTS = {
    "all": (),
    "no global": ("global_prompts",),
    "no local": ("local_prompts",),
    "no summary": ("summary",),
    "no time": ("time_embed",),
    "global only": ("local_prompts", "summary", "cls_proj", "time_embed"),
    "local only": ("global_prompts", "summary", "time_embed"),
    "summary only": ("global_prompts", "local_prompts", "time_embed"),
    "time only": ("global_prompts", "local_prompts", "summary", "cls_proj"),
    "a projection for nothing": ("global_prompts", "local_prompts", "summary"),
    "none": ("global_prompts", "local_prompts", "summary", "cls_proj", "time_embed"),
}


class _Parts:
    """The remaining prompts, with the attributes that the reference reads."""

    def __init__(self, full: Any, dropped: tuple[str, ...]) -> None:
        self.global_prompts = None if "global_prompts" in dropped else full.global_prompts
        self.local_prompts = None if "local_prompts" in dropped else full.local_prompts
        self.summary = None if "summary" in dropped else full.summary
        self.time_embedding = None if "time_embed" in dropped else full.time_embedding
        self.cls_proj = full.cls_proj


@pytest.mark.parametrize("dropped", PARTS.values(), ids=PARTS.keys())
def test_any_subset_of_vita_is_what_the_loops_make_of_it(dropped: tuple[str, ...]) -> None:
    released, video, _ = golden(VITA)
    video = video[:1]
    full: Any = P.load_released(released)
    reference = _Parts(full.openvclip_prompts.vision, dropped)
    left = {n: v for n, v in released.items() if not any(part in n for part in dropped)}
    got = P.load_released(left).encode_image(video)
    expected = vita_frames(full.visual, reference, video)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    if dropped:
        assert (full.encode_image(video) - got).abs().max() > 1e-3


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_any_depth_of_vifi_is_what_the_loops_make_of_it(depth: int) -> None:
    released, video, _ = golden(VIFI)
    prompts = ["VPT", f"{BLOCK}.1.VPT_shallow"]
    left = {n: v for n, v in released.items() if n not in prompts[depth:]}
    model: Any = P.load_released(left)
    got = model.encode_image(video[:1])
    if depth == 0:
        tower = golden_tower()
        tower.load_state_dict(left)
        assert same_bits(got[0], tower(video[0]))
        return
    tokens = torch.stack([released[name] for name in prompts[:depth]])
    expected = vifi_frames(model.visual, tokens, video[:1])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_heads_are_given_or_of_64() -> None:
    released, video, output = golden(VIFI)
    other = P.load_released(released, heads=4).encode_image(video)
    assert (other - output).abs().max() > 1e-3
    for heads in (0, 3):
        with pytest.raises(PromptOptionError, match=f"heads={heads}: the tower is 128 wide"):
            P.load_released(released, heads=heads)


def test_prompts_of_a_release_go_into_another_model(tmp_path: Any) -> None:
    released, video, output = golden(VITA)
    P.save(P.load_released(released), tmp_path / "vita.safetensors")
    tower = golden_tower()
    tower.load_state_dict(by_hand(released)[0])
    P.load(tower, tmp_path / "vita.safetensors")
    torch.testing.assert_close(tower(video).mean(1), output, rtol=0, atol=1e-5)


def test_clips_of_another_length() -> None:
    released, video, _ = golden(VITA)
    model: Any = P.load_released(released)
    longer = video[:1].repeat_interleave(2, dim=1)
    expected = vita_frames(model.visual, model.openvclip_prompts.vision, longer)
    got = model.encode_image(longer)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def released_names(model: Any) -> State:
    """A model's state dict under the names that a data-parallel run of ViFi-CLIP saves."""
    prompts = model.openvclip_prompts
    state: State = {"prompt_learner.ctx": prompts.text.context.detach()}
    state["prompt_learner.token_prefix"] = torch.zeros(3, 1, 16)
    state["image_encoder.VPT"] = prompts.vision.tokens[0].detach()
    for i in (1, 2):
        state[f"image_encoder.{BLOCK}.{i}.VPT_shallow"] = prompts.vision.tokens[i].detach()
    state[f"text_encoder.{BLOCK}.1.VPT_shallow"] = prompts.text.deep[0].detach()
    for name, value in model.state_dict().items():
        if name.startswith("visual."):
            state[f"image_encoder.{name.removeprefix('visual.')}"] = value
        elif name == "logit_scale":
            state[name] = value
        elif not name.startswith(("openvclip_prompts.", "token_embedding.")):
            state[f"text_encoder.{name}"] = value
    return {f"module.{name}": value for name, value in state.items()}


def test_a_whole_vifi_checkpoint_comes_back() -> None:
    settings = {"vision_prompts": 2, "vision_depth": 3, "text_prompts": 2, "text_depth": 2}
    model, other = prompt_clip(), prompt_clip(seed=1)
    for clip in (model, other):
        P.attach_vifi(clip, **settings)
    randomise(model.openvclip_prompts, seed=5)
    state = P.released_state_dict(released_names(model))
    assert model.state_dict().keys() - state.keys() == {"token_embedding.weight"}
    state["token_embedding.weight"] = model.token_embedding.weight.detach()
    other.load_state_dict(state)
    video = torch.randn(2, 3, 3, 8, 8)
    heads = [P.VideoClassifier(clip, word_tokenizer, NAMES) for clip in (model, other)]
    assert same_bits(heads[0](video), heads[1](video))


def test_a_whole_vita_checkpoint_comes_back() -> None:
    released, _, _ = golden(VITA)
    weights, prompts = by_hand(released)
    text = {f"textual.{BLOCK}.0.ln_1.bias": torch.ones(2), "textual.ln_final.bias": torch.ones(3)}
    context = {"prompt_learner.ctx": torch.ones(5, 8, 16)}
    state = {**{f"visual.{n}": v for n, v in released.items()}, **text, **context}
    got = P.released_state_dict(state)
    expected = {f"visual.{n}": v for n, v in weights.items()}
    expected |= {f"openvclip_prompts.vision.{n}": v for n, v in prompts.items()}
    expected |= {n.removeprefix("textual."): v for n, v in text.items()}
    expected["openvclip_prompts.text.context"] = context["prompt_learner.ctx"]
    assert got.keys() == expected.keys()
    assert all(same_bits(got[name], expected[name]) for name in got)


def toy(layers: int = 2) -> State:
    """Names and shapes of a small ViFi-CLIP tower with prompts in all layers."""
    tower = VisionTransformer(8, 4, 64, layers, 1, 2.0, output_dim=4)
    prompts = {f"{BLOCK}.{i}.VPT_shallow": torch.randn(2, 64) for i in range(1, layers)}
    return {**tower.state_dict(), "VPT": torch.randn(2, 64), **prompts}


def test_entries_that_do_not_fit() -> None:
    assert P.load_released(toy()).encode_image(torch.randn(1, 2, 3, 8, 8)).shape == (1, 2, 4)
    cases: list[tuple[State, str]] = [
        ({"VPT_2": torch.zeros(1)}, r"the same shape in consecutive layers"),
        ({f"{BLOCK}.1.VPT_shallow": torch.zeros(3, 64)}, r"expected \[2, 64\], given \[3, 64\]"),
        ({"ln_post.gain": torch.zeros(1)}, r"unexpected \(1\): ln_post\.gain"),
        ({"ln_post.weight": torch.zeros(3)}, r"shape of ln_post\.weight: expected \[64\]"),
        ({"proj": torch.zeros(64)}, r"proj has shape \[64\]"),
        (
            {"positional_embedding": torch.zeros(4, 64)},
            "4 rows.*expected one row for the class",
        ),
    ]
    for change, text in cases:
        with pytest.raises(StateMismatchError, match=text):
            P.load_released({**toy(), **change})
    for name in ("VPT", "proj", "ln_pre.bias"):
        with pytest.raises(StateMismatchError, match=rf"missing \(1\): {name}"):
            P.load_released({n: v for n, v in toy().items() if n != name})


def test_what_is_no_released_tower() -> None:
    with pytest.raises(CheckpointError, match=r"neither ViFi-CLIP's .* nor Vita-CLIP's"):
        P.load_released({"weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="none"):
        P.load_released({})
    with pytest.raises(WeightTypeError, match="pass its weights"):
        P.load_released({"model": toy()})  # type: ignore[dict-item]
    narrow = {"conv1.weight": torch.zeros(48, 3, 4, 4), "positional_embedding": torch.zeros(5, 48)}
    narrow |= {"proj": torch.zeros(48, 4), f"{BLOCK}.0.mlp.c_fc.weight": torch.zeros(96, 48)}
    with pytest.raises(PromptOptionError, match="heads=None: the tower is 48 wide"):
        P.load_released(narrow)
    with pytest.raises(VideoShapeError, match="expected a video"):
        P.load_released(toy()).encode_image(torch.randn(2, 3, 8, 8))
