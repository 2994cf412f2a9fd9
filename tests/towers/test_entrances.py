"""Other entrances of expanded models: the outputs of chosen layers, CoCa, output_hidden_states."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from openvclip import encode_video, expand_temporal_attention, restore_spatial_attention
from openvclip.errors import UnsupportedModelError, UsageError, VideoShapeError
from openvclip.towers.temporal import expansion_of
from tests.helpers import random_video, same_bits, tiny_clip, tiny_tower
from tests.prompting.towers import vifi
from tests.towers import test_temporal_hf as hf
from tests.towers import test_temporal_naflex as naflex
from tests.towers import test_temporal_timm as timm
from tests.towers.tower_laws import images

NAFLEX = {f"naflex {name}": naflex.CASES[name] for name in ("siglip 2", "mixed rope")}
TIMM = ["siglip", "registers", "post norm", "eva01", "perception encoder", "mixed rope", *NAFLEX]


def tower_of(name: str) -> Any:
    if name == "open_clip":
        return tiny_tower()
    if name == "attention pooling":
        return tiny_clip(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2).visual
    return {**timm.CASES, **NAFLEX}[name].make()


def intermediates(tower: Any, x: Tensor, **options: Any) -> tuple[Tensor | None, list[Any]]:
    """Return the final features and the outputs of the layers, of either library."""
    output = tower.forward_intermediates(x, **options)
    if isinstance(output, dict):
        return output.get("image_features"), output["image_intermediates"]
    return (None, output) if isinstance(output, list) else (output[0], output[1])


def hooked(tower: Any, video: Tensor) -> list[Tensor]:
    """Return the output of each layer in a call of the tower, without its first tokens."""
    blocks = tower.blocks if hasattr(tower, "blocks") else tower.transformer.resblocks
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda m, i, out: outputs.append(out)) for b in blocks]
    tower(video)
    for hook in hooks:
        hook.remove()
    return [out[:, :, getattr(tower, "num_prefix_tokens", 1) :] for out in outputs]


# Report 28: model.visual.forward_intermediates(video) raised "too many values to unpack".
@pytest.mark.parametrize("name", ["open_clip", "attention pooling", *TIMM])
def test_outputs_of_layers_are_those_of_a_call(name: str) -> None:
    tower, pictures, video = tower_of(name), images(), random_video(2, 3)
    before = intermediates(tower, pictures, output_fmt="NLC")
    expand_temporal_attention(tower, window=2, boundary="mask")
    after = intermediates(tower, pictures, output_fmt="NLC")
    assert all(same_bits(a, b) for a, b in zip(before[1], after[1], strict=True))
    expected = hooked(tower, video)
    final, tokens = intermediates(tower, video, output_fmt="NLC")
    maps = intermediates(tower, video)[1]
    for got, grid, wanted in zip(tokens, maps, expected, strict=True):
        assert torch.equal(got, wanted)
        assert torch.equal(grid.flatten(-2).transpose(-1, -2), wanted)
    features = tower(video)
    assert torch.equal(final if name not in TIMM else tower.forward_head(final), features)
    options = {"indices": [0], "stop_early": True, "intermediates_only": True}
    (first,) = intermediates(tower, video, output_fmt="NLC", **options)[1]
    assert torch.equal(first, expected[0])
    with pytest.raises(VideoShapeError, match="9 x 8 pixels"):
        tower.forward_intermediates(torch.zeros(1, 2, 3, 9, 8))
    state = list(tower.state_dict())
    assert state == list(restore_spatial_attention(tower).state_dict())


@pytest.mark.parametrize("name", ["open_clip", "eva01"])
def test_gradients_and_checkpointing_of_outputs_of_layers(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        tower = expand_temporal_attention(tower_of(name)).train()
        tower.set_grad_checkpointing(checkpointing)
        video = random_video(2, 3).requires_grad_()
        intermediates(tower, video)[1][-1].square().sum().backward()
        gradients.append(video.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().amax(dim=(2, 3, 4)).min() > 0


DROPPING: dict[str, Callable[[], Any]] = {
    "eva": lambda: timm.make(timm.eva(patch_drop_rate=0.5, num_classes=8)),
    "naflex": lambda: naflex.make(naflex.AXIAL, reg_tokens=0, patch_drop_rate=0.5),
}


@pytest.mark.parametrize("make", DROPPING.values(), ids=DROPPING)
def test_dropped_patches_keep_the_positions_of_each_frame(make: Callable[[], Any]) -> None:
    tower = make()
    expand_temporal_attention(tower).train()
    torch.manual_seed(0)
    expected = tower.forward_features(random_video(2, 3))
    torch.manual_seed(0)
    got, tokens = intermediates(tower, random_video(2, 3), output_fmt="NLC")
    assert torch.equal(got, expected)
    assert tokens[0].shape == (2, 3, 2, 16)


def test_timm_methods_and_masks() -> None:
    tower, video = expand_temporal_attention(timm.CASES["registers"].make()), random_video(2, 3)
    last = tower.get_intermediate_layers(video, 1, return_prefix_tokens=True, norm=True)[0]
    assert torch.equal(torch.cat(last[::-1], dim=2), tower.forward_features(video))
    for options in ({"attn_mask": torch.ones(7, 7)}, {"is_causal": True}):
        with pytest.raises(UsageError, match="attn_mask and is_causal are for images only"):
            tower.forward_intermediates(video, **options)


@pytest.mark.parametrize("make", [tiny_clip, timm.in_open_clip])
def test_the_models_of_open_clip(make: Callable[[], Any]) -> None:
    model = expand_temporal_attention(make().eval())
    video = random_video(2, 3, pixels=8 if make is tiny_clip else 32)
    text = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 63]])
    expected = model.encode_image(video, normalize=True)
    output = model.forward_intermediates(video, text, image_output_extra_tokens=True)
    assert torch.equal(output["image_features"], expected)
    assert output["image_intermediates_prefix"][0].shape[:3] == (2, 3, 1)
    assert torch.equal(model(video, text)[0], expected)


def test_prompted_towers_say_why_not() -> None:
    with pytest.raises(UsageError, match="forward_intermediates\\(\\) does not support prompts"):
        vifi(tiny_clip()).visual.forward_intermediates(random_video(1, 2))


def test_coca_captions_frames_of_clips() -> None:
    size = {"layers": 1, "width": 16}
    torch.manual_seed(0)
    model = open_clip.CoCa(
        embed_dim=16,
        multimodal_cfg={**size, "context_length": 8, "vocab_size": 64, "heads": 2},
        text_cfg={**size, "context_length": 8, "vocab_size": 64, "heads": 2, "embed_cls": True,
                  "output_tokens": True},
        vision_cfg={**size, "head_width": 8, "patch_size": 4, "image_size": 8,
                    "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2,
                    "output_tokens": True},
    ).eval()  # fmt: skip
    text, pictures, video = torch.randint(1, 60, (2, 8)), images(2), random_video(2, 3)
    before = model(pictures, text)
    expand_temporal_attention(model)
    after = model(pictures, text)
    assert all(same_bits(before[name], after[name]) for name in before)
    frames = model.encode_image(video)
    assert torch.equal(encode_video(model, video), functional.normalize(frames, dim=-1).mean(1))
    latent, tokens = model.visual(video)
    still = model.visual(video[:, :1].expand(-1, 3, -1, -1, -1))
    assert (latent.shape, tokens.shape) == ((2, 3, 16), (2, 3, 3, 16))
    captions = model(video, text, image_latent=frames.mean(1), image_embs=tokens.flatten(1, 2))
    assert captions["logits"].shape[:2] == (2, 7)
    assert not torch.equal(still[1], tokens)


@pytest.mark.parametrize("name", ["CLIPModel-sdpa", "SiglipModel-eager"])
def test_hidden_states_of_hugging_face(name: str) -> None:
    model, video = hf.CASES[name].expanded(), random_video(2, 3)
    tower = model.vision_model
    outputs = tower(pixel_values=video, output_hidden_states=True)
    blocks: list[Tensor] = []
    for layer in tower.encoder.layers:
        layer.register_forward_hook(lambda m, i, out: blocks.append(out))
    tower(video)
    assert all(torch.equal(a, b) for a, b in zip(outputs.hidden_states[1:], blocks, strict=True))
    large = tower(random_video(2, 3, pixels=12), interpolate_pos_encoding=True)
    assert large.pooler_output.shape[:2] == (2, 3)


def test_expanding_while_threads_encode_images() -> None:
    """A thread in the middle of a call sees images as plain CLIP, before and after."""
    model, pictures = tiny_clip(), images()
    expected = model.encode_image(pictures)
    stop = threading.Event()
    different: list[int] = []

    def encode() -> None:
        while not stop.is_set():
            if not torch.equal(model.encode_image(pictures), expected):
                different.append(1)

    threads = [threading.Thread(target=encode) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        expand_temporal_attention(model)
        restore_spatial_attention(model)
    stop.set()
    for thread in threads:
        thread.join()
    assert different == []


def test_an_expanded_tower_with_lora_is_known_as_expanded_and_not_half_restored() -> None:
    """docs/lora.md expands first. peft wraps the attention of open_clip."""
    peft = pytest.importorskip("peft")
    model = expand_temporal_attention(tiny_clip(), boundary="replicate")
    expected = expansion_of(model)
    config = peft.LoraConfig(target_modules=r"visual\..*\.0\.attn")
    wrapped = peft.get_peft_model(model, config).base_model.model
    assert expected is not None
    assert expansion_of(wrapped) == expected
    with pytest.raises(
        UnsupportedModelError, match=r"Layer 0 of the expanded tower .* another tool"
    ):
        restore_spatial_attention(wrapped)
    assert expansion_of(wrapped) == expected
