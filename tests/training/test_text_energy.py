"""The loss of random texts equals its equation; the texts are valid for each text tower."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from openvclip.errors import RegularizationError, StateMismatchError, UsageError
from openvclip.models import as_tokenizer
from openvclip.training import OriginalCLIP, TextEnergy
from tests.helpers import VISION, same_bits, through_a_file, tiny_clip, tiny_tokenizer
from tests.training.regulariser_models import END, START, slow_energy, words


def energy(**changes: Any) -> TextEnergy:
    changes = {"weight": 0.5, "n_texts": 4, **changes}
    return TextEnergy(OriginalCLIP(tiny_clip().double()), words, **changes)


def features(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_the_loss_and_its_gradient_are_those_of_the_equation(shape: tuple[int, ...]) -> None:
    loss = energy()
    images, originals, texts = (
        features(1, *shape).requires_grad_(),
        features(2, *shape),
        loss.draw(),
    )
    expected = slow_energy(images, originals, texts, loss.original.scale, 0.5)
    found = loss.loss(images, originals, texts)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(total, images)[0] for total in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert loss.loss(originals, 3 * originals, texts).item() == pytest.approx(0, abs=1e-20)


def test_equal_micro_batches_have_the_loss_of_the_whole_batch() -> None:
    loss, images, originals = energy(), features(1, 4), features(2, 4)
    texts = loss.draw()
    parts = zip(images.chunk(2), originals.chunk(2), strict=True)
    mean = torch.stack([loss.loss(a, b, texts) for a, b in parts]).mean()
    torch.testing.assert_close(loss.loss(images, originals, texts), mean)


def test_each_call_draws_new_texts_from_its_own_generator() -> None:
    loss = energy(seed=5)
    before = torch.get_rng_state()
    first, second = loss.draw_tokens(), loss.draw_tokens()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    again = energy(seed=5)
    assert torch.equal(again.draw_tokens(), first)
    resumed = energy(seed=9)
    resumed.load_state_dict(through_a_file(again.state_dict()))
    assert torch.equal(resumed.draw_tokens(), second)
    images, originals = features(1, 2), features(2, 2)
    assert resumed.loss(images, originals) != resumed.loss(images, originals)


def test_texts_are_cut_as_the_tokenizer_cuts_them() -> None:
    tokens = energy(n_texts=50).draw_tokens()  # 8 places: the start, 6 tokens, the end
    assert tokens.shape == (50, 8)
    assert set(tokens[:, 0].tolist()) == {START}
    assert set(tokens[:, -1].tolist()) == {END}
    drawn = tokens[:, 1:-1]
    assert drawn.min() >= 1
    assert drawn.max() < START
    assert len(drawn.unique()) > 50
    three = energy(n_texts=50, n_tokens=3).draw_tokens()
    assert set(three[:, 4].tolist()) == {END}
    assert not three[:, 5:].any()
    few = energy(vocabulary=[7, 9]).draw_tokens()
    assert set(few[:, 1:-1].flatten().tolist()) == {7, 9}


def test_the_texts_of_open_clip_are_those_of_the_paper() -> None:
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=dict(VISION), text_cfg=text)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    loss = TextEnergy(OriginalCLIP(model, copy=False), tokenizer, weight=1.0)
    tokens = loss.draw_tokens()
    assert tokens.shape == (80, 77)
    assert set(tokens[:, 0].tolist()) == {49406}
    assert set(tokens[:, 9].tolist()) == {49407}
    assert not tokens[:, 10:].any()
    drawn = tokens[:, 1:9]
    assert drawn.min() > 0
    assert drawn.max() < 49406
    assert len(drawn.unique()) > 600  # of 640
    assert loss.draw().shape == (80, 8)
    torch.testing.assert_close(loss.draw().norm(dim=-1), torch.ones(80))


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "AlignModel"])
def test_the_texts_of_transformers_keep_special_tokens_and_the_mask(name: str) -> None:
    tiny = pytest.importorskip("tests.tiny_transformers")
    model, tokenizer = tiny.make(name), tiny.make_tokenizer()
    loss = TextEnergy(OriginalCLIP(model), tokenizer, weight=1.0, n_texts=20, n_tokens=4)
    assert loss.draw().shape[0] == 20
    tokens, layout = loss.draw_tokens(), as_tokenizer(tokenizer, model)(["a a a a"])
    assert tokens.shape[1:] == layout.shape[1:]
    special = set(tokenizer.all_special_ids)
    word = layout == tokenizer.convert_tokens_to_ids("a")
    if layout.ndim == 3:
        word[:, 1] = False  # the attention mask
    assert word.sum() == 4
    assert torch.equal(tokens.masked_fill(word, 0), layout.masked_fill(word, 0).expand_as(tokens))
    drawn = set(tokens[word.expand_as(tokens)].tolist())
    assert len(drawn) > 3
    assert not drawn & special


def test_autocast_does_not_change_the_loss() -> None:
    loss, images, originals = energy(), features(1, 4).float(), features(2, 4).float()
    texts = loss.draw()
    with torch.autocast(images.device.type, torch.bfloat16):
        found = loss.loss(images, originals, texts)
    assert same_bits(found, loss.loss(images, originals, texts))


def test_bad_input_is_refused() -> None:
    for wrong in ({"weight": -1.0}, {"n_texts": 0}, {"n_tokens": 0}, {"vocabulary": []}):
        with pytest.raises(RegularizationError, match=next(iter(wrong))):
            energy(**wrong)
    with pytest.raises(UsageError, match="expected one token for each word"):
        TextEnergy(OriginalCLIP(tiny_clip()), tiny_tokenizer, weight=1.0)
    with pytest.raises(UsageError, match=r"images has shape \[2, 8\]"):
        energy().loss(features(1, 2), features(1, 3))
    with pytest.raises(StateMismatchError, match="generator"):
        energy().load_state_dict({"seed": 1})
