"""by_depth and visual_only: names of all tower families, and use in interpolate."""

from __future__ import annotations

import doctest
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openvclip import interpolate
from openvclip.errors import LambdaError
from openvclip.merging import by_depth, visual_only
from openvclip.weights import lambdas
from tests.helpers import same_bits, snapshot, tiny_clip

NAMES = [
    "visual.transformer.resblocks.{}.attn.in_proj_weight",
    "transformer.resblocks.{}.mlp.c_fc.weight",
    "blocks.{}.attn.qkv.weight",
    "visual.trunk.blocks.{}.norm1.bias",
    "vision_model.encoder.layers.{}.layer_norm1.weight",
    "text_model.encoder.layers.{}.mlp.fc1.bias",
]


@pytest.mark.parametrize("pattern", NAMES)
@settings(max_examples=10)
@given(blocks=st.integers(1, 24), first=st.floats(-1, 2), last=st.floats(-1, 2))
def test_by_depth_is_linear(pattern: str, blocks: int, first: float, last: float) -> None:
    names = [pattern.format(i) for i in range(blocks)]
    for lam in (by_depth(first, last, blocks), by_depth(first, last, reversed(names))):
        assert lam(names[0]) == first
        if blocks > 1:
            assert lam(names[-1]) == last
            steps = [lam(b) - lam(a) for a, b in itertools.pairwise(names)]
            assert steps == pytest.approx([(last - first) / (blocks - 1)] * (blocks - 1), abs=1e-12)


def test_towers_are_counted_by_themselves_and_wrappers_do_not_matter() -> None:
    names = [NAMES[0].format(i) for i in range(3)] + [NAMES[1].format(i) for i in range(5)]
    lam = by_depth(1.0, 0.0, [f"module.{name}" for name in names])
    assert [lam(names[2]), lam(names[5]), lam(names[7])] == [0.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "name", ["visual.conv1.weight", "visual.ln_post.bias", "logit_scale", "layer1.0.conv.weight"]
)
def test_outside_the_blocks(name: str) -> None:
    assert by_depth(0.25, 1.0, 12)(name) == 0.25
    assert by_depth(0.25, 1.0, 12, outside=0.75)(name) == 0.75


def test_by_depth_that_does_not_fit() -> None:
    for blocks in (0, -1, [], ["layer1.0.conv.weight"]):
        with pytest.raises(LambdaError, match="found no blocks"):
            by_depth(0.0, 1.0, blocks)
    with pytest.raises(LambdaError, match=r"block 12 \(from 0\).* told 12 blocks"):
        by_depth(0.0, 1.0, 12)(NAMES[0].format(12))
    with pytest.raises(LambdaError, match="told 0 blocks"):
        by_depth(0.0, 1.0, [NAMES[0].format(0)])(NAMES[1].format(0))


def test_visual_only_leaves_the_rest_bitwise_the_originals() -> None:
    clip, tuned = snapshot(tiny_clip(0)), snapshot(tiny_clip(1))
    got = interpolate(clip, tuned, visual_only(0.5))
    plain = interpolate(clip, tuned, 0.5)
    for name in clip:
        expected = plain if name.startswith("visual.") else clip
        assert same_bits(got[name], expected[name]), name
    assert {"logit_scale", "text_projection"} <= clip.keys()


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("vision_model.encoder.layers.0.mlp.fc1.weight", True),
        ("visual_projection.weight", True),
        ("visual.proj", True),
        ("text_model.final_layer_norm.weight", False),
        ("text_projection.weight", False),
        ("logit_scale", False),
        ("positional_embedding", False),
        ("prompts.visual_context", False),
    ],
)
def test_what_is_visual(name: str, inside: bool) -> None:
    assert visual_only(0.25)(name) == (0.25 if inside else 1.0)


def test_visual_only_takes_a_function() -> None:
    clip, tuned = snapshot(tiny_clip(0)), snapshot(tiny_clip(1))
    got = interpolate(clip, tuned, visual_only(by_depth(1.0, 0.0, clip)))
    name = "visual.transformer.resblocks.{}.ln_1.weight"
    assert same_bits(got[name.format(0)], clip[name.format(0)])
    assert same_bits(got[name.format(2)], tuned[name.format(2)])
    middle = 0.5 * (clip[name.format(1)] + tuned[name.format(1)])
    torch.testing.assert_close(got[name.format(1)], middle)
    assert same_bits(
        got["transformer.resblocks.0.ln_1.weight"], clip["transformer.resblocks.0.ln_1.weight"]
    )


def test_the_examples_run() -> None:
    result = doctest.testmod(lambdas)
    assert result.attempted >= 4
    assert result.failed == 0
