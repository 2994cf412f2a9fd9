"""Laws that hold for prompts on every tower, as functions of a ``Case``.

The reference is the plain tower of the library. Hooks before and after its layers add prompts to
the tokens of each frame, and loops replace its attention.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openvclip import expand_temporal_attention, restore_spatial_attention
from openvclip import prompting as P
from openvclip.errors import ExpansionError, PromptingError, VideoShapeError
from openvclip.towers.temporal import encode_frames
from tests.helpers import (
    assert_same_state,
    gradients,
    random_video,
    randomise,
    same_bits,
    snapshot,
)
from tests.prompting.reference import vita_prompts
from tests.towers.tower_laws import CLOSE, Case, anatomy, images

Attach = Callable[[Any], Any]


def vifi(model: Any) -> Any:
    P.attach_vifi(model, vision_prompts=2, vision_depth=2, text_prompts=0)
    randomise(model.openvclip_prompts, seed=3)
    return model


def vita(model: Any, frames: int = 3, **settings: Any) -> Any:
    P.attach_vita(model, frames=frames, global_prompts=2, text_prompts=0, **settings)
    randomise(model.openvclip_prompts, seed=3)
    return model


METHODS: tuple[Attach, ...] = (vifi, vita)


# --- the reference -----------------------------------------------------------------------------


class Hooked:
    """A plain tower with hooks that add prompts. A clip is encoded as a batch of images.

    Args:
        model: a plain model.
        blocks: its layers in order.
        norm: what embedded patches pass before the first layer, None where there is nothing.
        prompts: the image prompts of the model that is compared with it.
        prefix: tokens before those of the patches.
        class_token: whether the first of these is a class token.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        norm: nn.Module | None,
        prompts: Any,
        prefix: int,
        class_token: bool,
    ) -> None:
        self.prompts, self.prefix, self.class_token = prompts, prefix, class_token
        self.tokens = 0
        self.is_vifi = hasattr(prompts, "tokens")
        _before(norm or blocks[0], self.embed)
        for layer, block in enumerate(blocks):
            _before(block, partial(self.before, layer))
            last = layer == len(blocks) - 1
            if last or not self.is_vifi:
                block.register_forward_hook(lambda module, args, out: out[:, : self.tokens])

    def embed(self, x: Tensor) -> Tensor:
        self.tokens = x.shape[1]
        if self.is_vifi:
            return self._with(x, self.prompts.tokens[0])
        return torch.stack([a + b for a, b in zip(x, self.prompts.time_embedding, strict=True)])

    def before(self, layer: int, x: Tensor) -> Tensor:
        if self.is_vifi:
            fresh = 0 < layer < len(self.prompts.tokens)
            return self._with(x[:, : self.tokens], self.prompts.tokens[layer]) if fresh else x
        frames = [frame[0] if self.class_token else self._mean(frame) for frame in x]
        shared, single = vita_prompts(self.prompts, layer, torch.stack(frames))
        return torch.stack(
            [torch.cat([frame, shared, last]) for frame, last in zip(x, single, strict=True)]
        )

    def _mean(self, frame: Tensor) -> Tensor:
        patches = list(frame[self.prefix :])
        return torch.stack(patches).sum(0) / len(patches)

    @staticmethod
    def _with(x: Tensor, prompts: Tensor) -> Tensor:
        return torch.stack([torch.cat([frame, prompts.double()]) for frame in x])


def _before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))


def anatomy_of_tower(case: Case, model: nn.Module) -> tuple[list[str], nn.Module | None]:
    """The names of the attentions, and the norm before the layers."""
    expanded = case.expanded()
    names = [name for name, module in expanded.named_modules() if hasattr(module, "view")]
    norms = [
        module
        for name, module in model.named_modules()
        if name.rsplit(".")[-1] in ("norm_pre", "ln_pre", "pre_layrnorm")
    ]
    assert len(norms) < 2
    return names, (norms[0] if norms else None)


@torch.no_grad()
def equals_the_hooked_tower(
    case: Case,
    attach: Attach,
    slow: Callable[..., Any] | None,
    *,
    prefix: int,
    class_token: bool,
    tolerance: float,
    pixels: tuple[int, int] = (8, 8),
    **expansion: Any,
) -> None:
    """Features of a video by the prompted model and by the reference, both in float64.

    ``slow(attention, tokens [T, N, D], *args, **kwargs)`` takes the place of each attention, None
    leaves the tower's own.
    """
    video = torch.randn(2, 3, 3, *pixels, generator=torch.manual_seed(7)).double()
    model = case.make()
    if expansion:
        expand_temporal_attention(model, **expansion)
    got = case.features(attach(model).double(), video)
    plain = case.make().double()
    names, norm = anatomy_of_tower(case, plain)
    blocks = [plain.get_submodule(name.rpartition(".")[0]) for name in names]
    prompts = model.openvclip_prompts.vision
    Hooked(plain, blocks, norm, prompts, prefix, class_token)
    for name in names if slow is not None else ():
        attention = plain.get_submodule(name)
        attention.forward = partial(slow, attention)  # type: ignore[arg-type,assignment]
    expected = torch.stack([case.features(plain, clip) for clip in video])
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    alone = case.features(case.make().double(), video.flatten(0, 1))
    assert (got.flatten(0, 1) - alone).abs().max() > 1e-3


# --- laws --------------------------------------------------------------------------------------


def in_and_out_again(case: Case, expanded: bool) -> None:
    for attach in METHODS:
        model = case.expanded() if expanded else case.make()
        next(model.parameters()).requires_grad_(False)
        before, state = anatomy(model), snapshot(model)
        required = [p.requires_grad for p in model.parameters()]
        out = case.features(model, images())
        assert attach(model) is model
        added = model.state_dict().keys() - state.keys()
        assert added
        assert all(name.startswith("openvclip_prompts.vision.") for name in added)
        backbone = {name: value for name, value in model.state_dict().items() if name in state}
        assert_same_state(backbone, state)
        for change in (expand_temporal_attention, restore_spatial_attention):
            with pytest.raises(ExpansionError, match="has prompts"):
                change(model)
        with pytest.raises(PromptingError, match="has prompts already"):
            attach(model)
        assert P.detach(model) is model
        assert anatomy(model) == before
        assert_same_state(model.state_dict(), state)
        assert [p.requires_grad for p in model.parameters()] == required
        assert same_bits(case.features(model, images()), out)


def prompts_alone_are_trained(case: Case, expanded: bool) -> None:
    for attach in METHODS:
        model = attach(case.expanded() if expanded else case.make()).train()
        before = snapshot(model)
        optimizer = torch.optim.AdamW(P.parameters(model), lr=0.01, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            case.features(model, random_video(2, 3)).square().sum().backward()
            optimizer.step()
        prompts = {f"openvclip_prompts.{n}" for n, _ in model.openvclip_prompts.named_parameters()}
        grads = gradients(model)
        assert grads.keys() == prompts
        assert all(value.abs().max() > 0 for value in grads.values())
        for name, value in model.state_dict().items():
            assert same_bits(value, before[name]) == (name not in prompts), name


def checkpointing_changes_no_gradient(case: Case, expanded: bool) -> None:
    for attach in METHODS:
        results = []
        for checkpointing in (False, True):
            model = case.expanded() if expanded else case.make()
            if checkpointing:
                case.checkpoint(model)
            attach(model).train()
            out = case.features(model, random_video(2, 3))
            (out.square().sum() + case.features(model, random_video(1, 3, seed=1)).sum()).backward()
            results.append(gradients(model))
        torch.testing.assert_close(results[1], results[0])


def an_image_is_a_clip_of_one_frame(case: Case, expanded: bool) -> None:
    for attach in (vifi, partial(vita, frames=1)):
        model = attach(case.expanded() if expanded else case.make())
        video = random_video(3, 1)
        got = case.features(model, video[:, 0])
        torch.testing.assert_close(got, case.features(model, video)[:, 0])
        assert (got - case.features(case.make(), video[:, 0])).abs().max() > 1e-3


def what_does_not_fit_is_refused(case: Case, expanded: bool) -> None:
    model = vita(case.expanded() if expanded else case.make())
    for video, text in (
        (random_video(1, 4), "clips of 4 frames"),
        (images(), "clips of 1 frames"),
        (torch.zeros(1, 3, 3, 9, 8), "9 x 8 pixels"),
        (torch.zeros(3, 8, 8), r"expected a video \[B, T, C, H, W\]"),
    ):
        with pytest.raises(VideoShapeError, match=text):
            case.features(model, video)
    with pytest.raises(VideoShapeError, match="2 clips with 8, 16 frames"):
        encode_frames(model, [torch.zeros(8, 3), torch.zeros(16, 3)])  # type: ignore[arg-type]


def copies_and_pickles_are_models_of_their_own(case: Case, expanded: bool) -> None:
    model, video = vita(case.expanded() if expanded else case.make()), random_video(2, 3)
    expected = case.features(model, video)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(case.features(other, video), expected)
        randomise(other.openvclip_prompts, seed=9)
        assert (case.features(other, video) - expected).abs().max() > 1e-3
    assert same_bits(case.features(model, video), expected)


def autocast_is_close_to_float32(case: Case, expanded: bool) -> None:
    for attach in METHODS:
        model, video = attach(case.expanded() if expanded else case.make()), random_video(2, 3)
        exact = P.mean_pooled_features(model, video)
        with torch.autocast(video.device.type, torch.bfloat16):
            rough = P.mean_pooled_features(model, video)
        assert (torch.cosine_similarity(rough.float(), exact, dim=-1) > 0.99).all()


LAWS: list[Callable[[Case, bool], None]] = [
    in_and_out_again,
    prompts_alone_are_trained,
    checkpointing_changes_no_gradient,
    an_image_is_a_clip_of_one_frame,
    what_does_not_fit_is_refused,
    copies_and_pickles_are_models_of_their_own,
    autocast_is_close_to_float32,
]


def files_go_there_and_back(case: Case, path: Path) -> None:
    for attach in METHODS:
        model, video = attach(case.make()), random_video(2, 3)
        P.save(model, path)
        other = P.load(case.make(), path)
        assert_same_state(other.state_dict(), model.state_dict())
        assert same_bits(case.features(other, video), case.features(model, video))


def compiled_in_one_graph(case: Case, attach: Attach) -> None:
    model, video = attach(case.expanded()), random_video(2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: case.features(model, x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(video), case.features(model, video), **CLOSE)
