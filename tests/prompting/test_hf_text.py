"""Text prompts in the text towers of transformers. The reference is the plain tower with hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip import expand_temporal_attention
from openvclip import prompting as P
from openvclip.errors import PromptOptionError, UnsupportedModelError
from openvclip.models.tokenizers import as_tokenizer
from openvclip.towers.hf_text import find_text_tower
from tests.helpers import assert_same_state, gradients, random_video, randomise, same_bits, snapshot
from tests.prompting.test_text_towers import CLOSE, unit
from tests.tiny_transformers import TEXT_PROMPTS, VOCABULARY, WORDS, make, make_tokenizer

NAMES = ["archery", "surfing", "horse race"]
FOUR = "a photo of a"
IDS = [4 + WORDS.index(word) for word in FOUR.split()]


def read(model: Any, texts: list[str]) -> Tensor:
    return as_tokenizer(make_tokenizer(), model)(texts)


def by_hooks(model: Any, context: Tensor, deep: list[Tensor]) -> Tensor:
    """Features of the plain text tower for texts with vectors in place of four words."""
    place = slice(1, 5)  # after the start token
    position = model.text_model.embeddings.position_embedding.weight[place]
    handles = []
    for layer, written in zip(
        model.text_model.encoder.layers, [context + position, *deep], strict=False
    ):

        def write(module: nn.Module, args: Any, kwargs: Any, written: Tensor = written) -> Any:
            x = args[0].clone()
            x[:, place] = written
            return (x, *args[1:]), kwargs

        handles.append(layer.register_forward_pre_hook(write, with_kwargs=True))
    tokens = read(model, [f"{FOUR} {name}." for name in NAMES])
    features = model.get_text_features(input_ids=tokens).pooler_output
    for handle in handles:
        handle.remove()
    return unit(features)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TEXT_PROMPTS)
def test_prompts_take_the_place_of_words(name: str, implementation: str) -> None:
    for depth in (1, 2):
        model = make(name)
        model.set_attn_implementation(implementation)
        P.attach_vifi(model, vision_prompts=0, text_prompts=4, text_depth=depth)
        text = randomise(model.openvclip_prompts, seed=3).text
        deep = [] if text.deep is None else list(text.deep)
        got = P.VideoClassifier(model, make_tokenizer(), NAMES).text_features()
        torch.testing.assert_close(got, by_hooks(model, text.context, deep), **CLOSE)
        plain = P.VideoClassifier(model, make_tokenizer(), NAMES, template="{}.").text_features()
        assert (got - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name_at", "text"),
    [("end", "a photo of a {}."), ("middle", "a photo {} of a."), ("front", "{} a photo of a.")],
)
@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_prompts_that_are_words_are_the_text(name: str, name_at: Any, text: str) -> None:
    model = make(name)
    P.attach_vita(
        model, local_prompts=False, summary_prompt=False, time_embedding=False, global_prompts=0,
        text_prompts=4, name_at=name_at,
    )  # fmt: skip
    words = model.text_model.embeddings.token_embedding.weight[IDS]
    P.load_state_dict(model, {"openvclip_prompts.text.context": words.detach()})
    tokens = read(model, [text.replace("{}", name) for name in NAMES])
    expected = unit(model.get_text_features(input_ids=tokens).pooler_output)
    got = P.VideoClassifier(model, make_tokenizer(), NAMES).text_features()
    torch.testing.assert_close(got, expected, **CLOSE)


def test_words_to_start_from() -> None:
    model, tokenizer = make("CLIPModel"), make_tokenizer()
    P.attach_vifi(
        model, vision_prompts=0, text_prompts=5, text_depth=1, words=FOUR, tokenizer=tokenizer
    )
    context = model.openvclip_prompts.text.context.detach()
    words = model.text_model.embeddings.token_embedding.weight[IDS].detach()
    assert same_bits(context[:4], words)
    assert words.shape[0] < VOCABULARY


@pytest.mark.parametrize("name", ["CLIPModel", "Siglip2Model"])
def test_prompts_in_both_towers_are_trained_and_saved(name: str, tmp_path: Path) -> None:
    model = expand_temporal_attention(make(name))
    P.attach_vita(model, frames=3, global_prompts=2, text_prompts=3, class_names=NAMES)
    before, head = snapshot(model), P.VideoClassifier(model, make_tokenizer(), NAMES).train()
    functional.cross_entropy(head(random_video(3, 3)), torch.arange(3)).backward()
    assert gradients(model).keys() == {n for n in before if n.startswith("openvclip_prompts.")}
    P.save(model, tmp_path / "prompts.safetensors")
    again = P.load(expand_temporal_attention(make(name)), tmp_path / "prompts.safetensors")
    assert_same_state(again.state_dict(), model.state_dict())


def test_a_file_of_open_clip_is_a_file_of_transformers(tmp_path: Path) -> None:
    """The same weights in both libraries: the same prompts give the same features."""
    import open_clip

    from openvclip import load_checkpoint, save_checkpoint

    plain = make("CLIPModel")
    save_checkpoint(plain.state_dict(), tmp_path / "clip.safetensors")
    vision = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8}
    text = {"context_length": 12, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2}
    twin: Any = open_clip.CLIP(8, {**vision, "mlp_ratio": 2}, {**text, "mlp_ratio": 2}, True).eval()
    load_checkpoint(tmp_path / "clip.safetensors", twin)
    P.attach_vifi(twin, vision_prompts=2, vision_depth=2, text_prompts=3, text_depth=2)
    randomise(twin.openvclip_prompts, seed=3)
    P.save(twin, tmp_path / "prompts.safetensors")
    P.load(plain, tmp_path / "prompts.safetensors")
    video = random_video(2, 3)
    features = P.mean_pooled_features(plain, video)
    torch.testing.assert_close(P.mean_pooled_features(twin, video), features, **CLOSE)


def test_text_towers_that_take_no_prompts() -> None:
    for name, text in (("AltCLIPModel", "AltCLIPTextModel"), ("AlignModel", "AlignTextModel")):
        with pytest.raises(
            UnsupportedModelError, match=rf"{name} has no text tower.* is a {text}\. Set text_prom"
        ):
            P.attach_vifi(make(name), vision_prompts=0, text_prompts=2, text_depth=1)
    model = make("CLIPModel")
    with pytest.raises(PromptOptionError, match="text context holds 12 tokens"):
        P.attach_vifi(model, vision_depth=1, text_depth=1)
    with pytest.raises(PromptOptionError, match="text_depth=3: the tower has 2 layers"):
        P.attach_vifi(model, vision_depth=1, text_prompts=2, text_depth=3)


@pytest.mark.parametrize(
    ("name", "place"), [("MetaClip2Model", 3), ("CLIPModel", 2)]
)  # CLIP's first configurations name 2, and mean the largest id
def test_the_end_token_with_the_id_2(name: str, place: int) -> None:
    model = make(name)
    model.text_model.eos_token_id = 2
    tokens = torch.tensor([[0, 5, 9, 2, 1, 1]])
    tower = find_text_tower(model)
    assert tower is not None
    x, mask = tower.embed(tokens)
    for layer in range(tower.layers):
        x = tower.run_layer(layer, x, mask)
    expected = model.get_text_features(input_ids=tokens).pooler_output
    torch.testing.assert_close(tower.pool_and_project(tokens, x), expected, **CLOSE)
    ends = model.text_projection(model.text_model.final_layer_norm(x[:, place]))
    torch.testing.assert_close(ends, expected, **CLOSE)
