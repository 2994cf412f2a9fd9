"""Prompts of the image tower compared with loops, attaching and detaching, and gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openvclip import encode_video, expand_temporal_attention, restore_spatial_attention
from openvclip import prompting as P
from openvclip.errors import (
    ExpansionError,
    PromptingError,
    PromptOptionError,
    UnsupportedModelError,
    UsageError,
    VideoShapeError,
)
from tests.helpers import (
    assert_same_state,
    gradients,
    random_video,
    randomise,
    same_bits,
    snapshot,
    tiny_tower,
    with_the_batch_second,
)
from tests.prompting.reference import prompt_clip, vifi_frames, vita_frames
from tests.towers.tower_laws import anatomy

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
OFF: dict[str, Any] = {
    "global_prompts": 0,
    "local_prompts": False,
    "summary_prompt": False,
    "time_embedding": False,
    "text_prompts": 0,
}
SWITCHES = {
    "global": {"global_prompts": 3},
    "local": {"local_prompts": True},
    "summary": {"summary_prompt": True},
    "time": {"time_embedding": True},
    "local and summary": {"local_prompts": True, "summary_prompt": True},
    "all": {
        "global_prompts": 2,
        "local_prompts": True,
        "summary_prompt": True,
        "time_embedding": True,
    },
}


def vita(model: Any, frames: int = 4, parts: str = "all", **settings: Any) -> Any:
    P.attach_vita(model, **{**OFF, "frames": frames, **SWITCHES[parts], **settings})
    randomise(model.openvclip_prompts, seed=3)
    return model


def vifi(model: Any, count: int = 2, depth: int = 2) -> Any:
    P.attach_vifi(model, vision_prompts=count, vision_depth=depth, text_prompts=0)
    randomise(model.openvclip_prompts, seed=3)
    return model


# --- what they compute -------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "depth"), [(1, 1), (2, 2), (3, 3)])
def test_vifi_equals_the_loops(count: int, depth: int) -> None:
    tower, video = vifi(tiny_tower(), count, depth), random_video(2, 3)
    expected = vifi_frames(tower, tower.openvclip_prompts.vision.tokens, video)
    torch.testing.assert_close(tower(video).double(), expected, **CLOSE)
    assert (tiny_tower()(video.flatten(0, 1)) - tower(video).flatten(0, 1)).abs().max() > 0.01


@pytest.mark.parametrize("parts", SWITCHES)
def test_vita_equals_the_loops(parts: str) -> None:
    tower, video = vita(tiny_tower(), 4, parts), random_video(2, 4)
    expected = vita_frames(tower, tower.openvclip_prompts.vision, video)
    torch.testing.assert_close(tower(video).double(), expected, **CLOSE)
    assert (tiny_tower()(video.flatten(0, 1)) - tower(video).flatten(0, 1)).abs().max() > 0.01


@pytest.mark.parametrize("frames", [1, 3, 6])
def test_clips_of_another_length_take_the_nearest_vectors(frames: int) -> None:
    tower, video = vita(tiny_tower(), other_length="nearest"), random_video(2, frames)
    expected = vita_frames(tower, tower.openvclip_prompts.vision, video)
    torch.testing.assert_close(tower(video).double(), expected, **CLOSE)


@pytest.mark.parametrize("parts", ["time", "local", "all"])
def test_or_they_are_refused(parts: str) -> None:
    tower = vita(tiny_tower(), 4, parts)
    with pytest.raises(VideoShapeError, match=r"clips of 6 frames .* for 4\. .*other_length='near"):
        tower(random_video(2, 6))
    with pytest.raises(VideoShapeError, match="clips of 1 frames"):
        tower(random_video(2, 1)[:, 0])


@pytest.mark.parametrize("parts", ["global", "summary"])
def test_prompts_that_know_no_length_take_any(parts: str) -> None:
    tower, video = vita(tiny_tower(), 4, parts), random_video(2, 6)
    expected = vita_frames(tower, tower.openvclip_prompts.vision, video)
    torch.testing.assert_close(tower(video).double(), expected, **CLOSE)


@pytest.mark.parametrize("make", [vifi, lambda tower: vita(tower, parts="global")])
def test_an_image_is_a_clip_of_one_frame(make: Any) -> None:
    tower, video = make(tiny_tower()), random_video(3, 1)
    torch.testing.assert_close(tower(video[:, 0]), tower(video)[:, 0])


def test_whatever_pools_the_tokens_sees_no_prompts() -> None:
    """A tower that averages its patch tokens, with the mean taken by hand."""
    tower, video = vifi(tiny_tower(pool_type="avg", output_tokens=True), 2, 3), random_video(2, 3)
    pooled, tokens = tower(video)
    assert tokens.shape == (2, 3, 4, 16)
    torch.testing.assert_close(pooled, tokens.mean(2) @ tower.proj)


def test_frames_of_other_sizes_are_refused() -> None:
    tower = vifi(tiny_tower())
    with pytest.raises(VideoShapeError, match="frames of 4 x 4 pixels"):
        tower(torch.randn(1, 2, 3, 4, 4))
    with pytest.raises(VideoShapeError, match="expected a video"):
        tower(torch.randn(3, 8, 8))


@pytest.mark.parametrize("make", [vifi, vita])
def test_one_layout_or_the_other(make: Any) -> None:
    first, last = make(tiny_tower()), with_the_batch_second(tiny_tower())
    video = random_video(2, 4)
    torch.testing.assert_close(make(last)(video), first(video))


def test_on_an_expanded_tower_neighbours_see_the_prompts_too() -> None:
    video = random_video(1, 4)
    for make in (vifi, vita):
        plain, expanded = make(tiny_tower()), tiny_tower()
        make(expand_temporal_attention(expanded, boundary="mask"))
        assert (expanded(video) - plain(video)).abs().max() > 1e-3
        # In a static clip each frame attends to three copies of the same tokens and prompts.
        if make is vifi:
            still = video[:, :1].expand(-1, 4, -1, -1, -1)
            torch.testing.assert_close(expanded(still), plain(still), **CLOSE)
        P.detach(expanded)
        restore_spatial_attention(expanded)
        assert type(expanded) is type(tiny_tower())


# --- in and out --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [vifi, vita])
@pytest.mark.parametrize("expanded", [False, True])
def test_in_and_out_again(make: Any, expanded: bool) -> None:
    model = prompt_clip()
    model.visual.conv1.requires_grad_(False)
    if expanded:
        expand_temporal_attention(model)
    before, state = anatomy(model), snapshot(model)
    required = [p.requires_grad for p in model.parameters()]
    assert make(model) is model
    added = model.state_dict().keys() - state.keys()
    assert added
    assert all(name.startswith("openvclip_prompts.") for name in added)
    backbone = {name: value for name, value in model.state_dict().items() if name in state}
    assert_same_state(backbone, state)
    assert P.detach(model) is model
    assert anatomy(model) == before
    assert_same_state(model.state_dict(), state)
    assert [p.requires_grad for p in model.parameters()] == required
    make(model)


def test_a_second_attachment() -> None:
    model = vifi(prompt_clip())
    before = anatomy(model)
    with pytest.raises(PromptingError, match=r"has prompts already \(vifi\).*detach"):
        vita(model)
    with pytest.raises(PromptingError, match="has prompts already"):
        vita(model.visual)
    assert anatomy(model) == before
    for change in (expand_temporal_attention, restore_spatial_attention):
        with pytest.raises(ExpansionError, match=r"The tower has prompts.*detach"):
            change(model)


def test_nothing_to_detach() -> None:
    for function in (P.detach, P.parameters, P.state_dict):
        with pytest.raises(PromptingError, match=r"has no prompts\. Attach some"):
            function(prompt_clip())


@pytest.mark.parametrize("make", [vifi, vita])
def test_copies_and_pickles_are_models_of_their_own(make: Any) -> None:
    model, video = make(prompt_clip()), random_video(2, 4)
    expected = model.encode_image(video)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(other.encode_image(video), expected)
        randomise(other.openvclip_prompts, seed=9)
        assert (other.encode_image(video) - expected).abs().max() > 1e-3
    assert same_bits(model.encode_image(video), expected)


def test_models_that_take_no_prompts() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"is a Linear, which can.t take prompts.*open_cl"
    ):
        vifi(nn.Linear(2, 2))
    two = nn.ModuleList([tiny_tower(), tiny_tower()])
    with pytest.raises(UnsupportedModelError, match="holds 2 towers"):
        vifi(two)
    with pytest.raises(UsageError, match="wrapped in DataParallel"):
        vifi(nn.DataParallel(prompt_clip()))
    with pytest.raises(
        UnsupportedModelError, match=r"VisionTransformer has no text tower.*text_pro"
    ):
        P.attach_vifi(tiny_tower(), vision_depth=2)


@pytest.mark.parametrize(
    ("attach", "settings", "text"),
    [
        (P.attach_vifi, {"vision_depth": 4}, "vision_depth=4: the tower has 3 layers"),
        (P.attach_vifi, {"vision_depth": 0}, "vision_depth=0: .*expected 1 to 3"),
        (P.attach_vifi, {"vision_prompts": -1}, "vision_prompts=-1"),
        (P.attach_vifi, {"vision_prompts": 0}, "nothing would be learned"),
        (P.attach_vita, {"frames": 0}, "frames=0"),
        (P.attach_vita, {"global_prompts": 1.5}, r"global_prompts=1\.5"),
        (P.attach_vita, {"other_length": "linear"}, "other_length='linear'.*'nearest'"),
        (P.attach_vita, OFF, "nothing would be learned"),
        (P.attach_vita, {"class_names": ["a"]}, "text_prompts=0 gives none"),
    ],
)
def test_options_out_of_range(attach: Any, settings: dict[str, Any], text: str) -> None:
    tower = tiny_tower()
    before = anatomy(tower)
    with pytest.raises(PromptOptionError, match=text):
        attach(tower, **{"text_prompts": 0, **settings})
    assert anatomy(tower) == before


def test_methods_that_know_nothing_of_prompts_are_refused() -> None:
    with pytest.raises(UsageError, match="detach"):
        vifi(tiny_tower()).forward_intermediates(random_video(1, 2)[0])


# --- gradients ---------------------------------------------------------------------------------


def train(model: Any, video: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(P.parameters(model), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(video).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [vifi, *(lambda t, p=p: vita(t, parts=p) for p in SWITCHES)])
def test_prompts_alone_are_trained(make: Any) -> None:
    tower, video = make(tiny_tower()).train(), random_video(2, 4)
    before = snapshot(tower)
    tower(video).square().sum().backward()
    prompts = {f"openvclip_prompts.{n}" for n, _ in tower.openvclip_prompts.named_parameters()}
    grads = gradients(tower)
    assert grads.keys() == prompts
    # A key bias shifts all scores of a query alike, so its gradient is zero but for rounding.
    assert all(value.abs().max() > 0 for value in grads.values())
    train(tower, video)
    for name, value in tower.state_dict().items():
        assert same_bits(value, before[name]) == (name not in prompts), name


@pytest.mark.parametrize("released", [False, True])
def test_the_projection_of_class_tokens_is_trained_or_as_released(released: bool) -> None:
    tower = vita(tiny_tower(), released_freeze=released)
    before = snapshot(tower)
    train(tower, random_video(2, 4))
    moved = {n for n, v in tower.state_dict().items() if not same_bits(v, before[n])}
    projections = {name for name in before if ".cls_proj." in name}
    assert projections
    assert moved & projections == (set() if released else projections)
    assert len(P.parameters(tower)) == len(moved)


@pytest.mark.parametrize("make", [vifi, vita])
@pytest.mark.parametrize("expanded", [False, True])
def test_checkpointing_changes_no_gradient(make: Any, expanded: bool) -> None:
    results = []
    for checkpointing in (False, True):
        tower = tiny_tower()
        if expanded:
            expand_temporal_attention(tower)
        make(tower).train().set_grad_checkpointing(checkpointing)
        first, second = tower(random_video(2, 4)), tower(random_video(1, 4, seed=1))
        (first.square().sum() + second.sum()).backward()
        results.append(gradients(tower))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("make", [vifi, vita])
def test_compiled_in_one_graph(make: Any) -> None:
    model, video = make(tiny_tower(layers=2)), random_video(2, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(video).square().sum().backward()
    got = gradients(model)
    model.zero_grad()
    model(video).square().sum().backward()
    torch.testing.assert_close(got, gradients(model))


@pytest.mark.parametrize("make", [vifi, vita])
def test_half_precision(make: Any, device: torch.device) -> None:
    video = random_video(2, 4)
    expected = make(tiny_tower())(video)
    half = make(tiny_tower().half())
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    with torch.autocast(device.type, dtype=torch.float16):
        mixed = make(tiny_tower())(video)
    for got in (half(video.half()), mixed):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.05)


# --- pooling -----------------------------------------------------------------------------------


def test_the_two_ways_of_pooling() -> None:
    model, video = prompt_clip(), random_video(2, 4)
    frames = model.encode_image(video.flatten(0, 1)).unflatten(0, (2, 4)).double()
    mean = frames.sum(1) / 4
    expected = mean / mean.square().sum(-1, keepdim=True).sqrt()
    torch.testing.assert_close(P.mean_pooled_features(model, video).double(), expected, **CLOSE)
    other = encode_video(model, video)
    assert (other / other.norm(dim=-1, keepdim=True) - expected).abs().max() > 1e-3
    prompted = vifi(model)
    mean = prompted.encode_image(video).mean(1)
    torch.testing.assert_close(
        P.mean_pooled_features(prompted, video), mean / mean.norm(dim=-1)[:, None]
    )
