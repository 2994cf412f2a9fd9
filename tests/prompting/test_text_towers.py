"""Text prompts in every kind of text tower that open_clip builds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip import prompting as P
from openvclip.errors import CheckpointError, PromptOptionError, UnsupportedModelError
from tests.helpers import (
    VISION,
    assert_same_state,
    gradients,
    random_video,
    randomise,
    same_bits,
    snapshot,
)
from tests.prompting.reference import (
    CONTEXT,
    DOT,
    END,
    NAMES,
    START,
    TEXT,
    prompt_clip,
    word_tokenizer,
    words_of,
)

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
WORDS = "a photo of a"


def tokenizer(texts: list[str], *, before: list[int], after: list[int], dots: bool) -> Tensor:
    """One token per word between ``before`` and ``after``, padded with the last token."""
    rows = []
    for text in texts:
        ids = [*before, *(i for i in words_of(text) if dots or i != DOT), *after]
        rows.append([*ids, *after[-1:] * CONTEXT][:CONTEXT])
    return torch.tensor(rows)


CLIP = word_tokenizer
# SigLIP removes punctuation and pads with end tokens. SigLIP 2 pads with another token.
SIGLIP = partial(tokenizer, before=[], after=[1], dots=False)
SIGLIP2 = partial(tokenizer, before=[], after=[END, 0], dots=False)
# CLIPA has a start token and no end token.
CLIPA = partial(tokenizer, before=[START], after=[0], dots=True)

TOWERS: dict[str, tuple[dict[str, Any], Callable[[list[str]], Tensor]]] = {
    "causal": ({}, CLIP),
    "end token": ({"pool_type": "eos", "eos_id": END}, CLIP),
    "both ways": ({"no_causal_mask": True}, CLIP),
    "masked padding": ({"no_causal_mask": True, "use_pad_mask": True}, CLIP),
    "SigLIP": ({"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, SIGLIP),
    "SigLIP 2": ({"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, SIGLIP2),
    "CLIPA": ({"no_causal_mask": True, "pool_type": "last"}, CLIPA),
    "CoCa": ({"embed_cls": True}, CLIP),
    "CoCa, mended": ({"embed_cls": True, "correct_cls_mask": True}, CLIP),
    "no projection": ({"proj_type": "none", "pool_type": "argmax"}, CLIP),
}


def custom_clip(settings: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    # The masks of padding are settings of the tower that no configuration sets.
    masks = {name: value for name, value in settings.items() if name.endswith("_mask")}
    masks.pop("no_causal_mask", None)
    text = {name: value for name, value in settings.items() if name not in masks}
    model = open_clip.CustomTextCLIP(
        embed_dim=8, vision_cfg=dict(VISION), text_cfg={**TEXT, **text}
    )
    for name, value in masks.items():
        assert hasattr(model.text, name)
        setattr(model.text, name, value)
    return randomise(model, seed).eval()


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def by_hooks(model: Any, tokens: Tensor, first: int, context: Tensor, deep: list[Tensor]) -> Tensor:
    """Features of the plain text tower for texts with vectors in place of some embeddings."""
    place = slice(first, first + len(context))
    position = model.text.positional_embedding[place]
    vectors = [context + position, *deep]
    handles = []
    for block, written in zip(model.text.transformer.resblocks, vectors, strict=False):

        def write(module: nn.Module, args: Any, written: Tensor = written) -> Any:
            x = args[0].clone()
            x[:, place] = written
            return (x, *args[1:])

        handles.append(block.register_forward_pre_hook(write))
    features = model.encode_text(tokens)
    for handle in handles:
        handle.remove()
    return unit(features)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", TOWERS)
def test_prompts_take_the_place_of_words(name: str, depth: int) -> None:
    settings, read = TOWERS[name]
    model = custom_clip(settings)
    P.attach_vifi(model, vision_prompts=0, text_prompts=4, text_depth=depth)
    text = randomise(model.openvclip_prompts, seed=3).text
    deep = [] if text.deep is None else list(text.deep)
    start = int(bool((read([""])[0, 0] == START).item()))
    tokens = read([f"{WORDS} {name}." for name in NAMES])
    expected = by_hooks(model, tokens, start, text.context, deep)
    got = P.VideoClassifier(model, read, NAMES).text_features()
    torch.testing.assert_close(got, expected, **CLOSE)
    model.text.set_grad_checkpointing(True)
    torch.testing.assert_close(P.VideoClassifier(model, read, NAMES).text_features(), got)
    gone = P.VideoClassifier(model, read, NAMES, template="{}.").text_features()
    assert (got - gone).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name_at", "text"),
    [("end", "a photo of a {}."), ("middle", "a photo {} of a."), ("front", "{} a photo of a.")],
)
@pytest.mark.parametrize("name", TOWERS)
def test_prompts_that_are_words_are_the_text(name: str, name_at: Any, text: str) -> None:
    settings, read = TOWERS[name]
    model = custom_clip(settings)
    P.attach_vita(
        model, local_prompts=False, summary_prompt=False, time_embedding=False, global_prompts=0,
        text_prompts=4, name_at=name_at,
    )  # fmt: skip
    words = model.text.token_embedding.weight[words_of(WORDS)]
    P.load_state_dict(model, {"openvclip_prompts.text.context": words.detach()})
    expected = unit(model.encode_text(read([text.replace("{}", name) for name in NAMES])))
    got = P.VideoClassifier(model, read, NAMES).text_features()
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", TOWERS)
def test_words_to_start_from(name: str) -> None:
    settings, read = TOWERS[name]
    model = custom_clip(settings)
    P.attach_vifi(
        model, vision_prompts=0, text_prompts=5, text_depth=1, words=WORDS, tokenizer=read
    )
    context = model.openvclip_prompts.text.context.detach()
    assert same_bits(context[:4], model.text.token_embedding.weight[words_of(WORDS)].detach())
    assert 0 < context[4].abs().max() < 0.1


def test_a_tower_of_its_own_is_the_same_tower() -> None:
    """Text prompts of ``CLIP`` and of ``CustomTextCLIP`` with the same weights are equal."""
    model, custom = prompt_clip(), custom_clip({})
    not_text = ("visual.", "logit_scale")
    state = {n if n.startswith(not_text) else f"text.{n}": v for n, v in model.state_dict().items()}
    custom.load_state_dict(state)
    heads = []
    for each in (model, custom):
        torch.manual_seed(1)
        P.attach_vifi(each, vision_prompts=2, vision_depth=2, text_prompts=3, text_depth=2)
        randomise(each.openvclip_prompts, seed=3)
        heads.append(P.VideoClassifier(each, word_tokenizer, NAMES))
    video = random_video(2, 3)
    assert same_bits(heads[0](video), heads[1](video))


@pytest.mark.parametrize("name", ["SigLIP", "CoCa"])
def test_prompts_alone_are_trained(name: str, tmp_path: Path) -> None:
    settings, read = TOWERS[name]
    model = custom_clip(settings)
    P.attach_vita(model, frames=3, global_prompts=2, text_prompts=3, class_names=NAMES)
    before, head = snapshot(model), P.VideoClassifier(model, read, NAMES).train()
    optimizer = torch.optim.AdamW(P.parameters(model), lr=0.01)
    functional.cross_entropy(head(random_video(3, 3)), torch.arange(3)).backward()
    optimizer.step()
    prompts = {n for n in before if n.startswith("openvclip_prompts.")}
    assert gradients(model).keys() == prompts
    assert {n for n, v in model.state_dict().items() if not same_bits(v, before[n])} == prompts
    path = tmp_path / "prompts.safetensors"
    P.save(model, path)
    assert_same_state(P.load(custom_clip(settings), path).state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match=r"(?s)another text tower.*layers +3 +2"):
        P.load(custom_clip({**settings, "layers": 2}), path)


def test_what_is_refused() -> None:
    model = custom_clip({"pool_type": "first"})
    with pytest.raises(UnsupportedModelError, match=r"takes prompts; .*end-of-text token or the"):
        P.attach_vifi(model, vision_depth=1, text_depth=1)
    model.text = nn.Linear(2, 2)  # a tower of another library
    with pytest.raises(UnsupportedModelError, match="text_prompts=0"):
        P.attach_vita(model)
    settings, read = TOWERS["SigLIP"]
    model = custom_clip(settings)
    P.attach_vifi(model, vision_prompts=0, text_prompts=8, text_depth=1)
    P.VideoClassifier(model, read, ["surfing waves well"])  # 8 + 3, and one end token: 12
    with pytest.raises(PromptOptionError, match=r"'one two three four' takes 13 tokens"):
        P.VideoClassifier(model, read, ["one two three four"])
