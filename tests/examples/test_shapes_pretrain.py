"""The tiny CLIP of the shapes world: its configuration, its committed weights, its script."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch

from examples.shapes import pretrain as script
from examples.shapes.drawing import draw_images
from examples.shapes.model import (
    BACKBONES,
    COMMITTED,
    WEIGHTS,
    create_model,
    image_tower,
    normalise,
)
from examples.shapes.pretrain import (
    caption_targets,
    contrastive_loss,
    main,
    pretrain,
    still_accuracy,
)
from examples.shapes.world import ACTIONS, SHAPES, TEMPLATES, class_names


@pytest.fixture(scope="module")
def pretrained():
    return create_model()


@pytest.mark.parametrize(("backbone", "size"), [("tiny", 0.5e6), ("small", 8e6), ("wider", 2e6)])
def test_the_weights_are_small_and_in_half_precision(backbone, size):
    from safetensors.torch import load_file

    assert COMMITTED[backbone].stat().st_size < size
    assert {value.dtype for value in load_file(COMMITTED[backbone]).values()} == {torch.float16}


def test_the_sizes_share_the_text_tower_and_have_image_towers_of_their_own():
    states = {backbone: create_model(backbone=backbone)[0].state_dict() for backbone in BACKBONES}
    towers = [image_tower(state) for state in states.values()]
    sizes = [sum(value.numel() for value in tower.values()) for tower in towers]
    assert sizes == sorted(set(sizes))
    for state in states.values():
        for name in state.keys() - towers[0].keys() - towers[2].keys():
            assert torch.equal(state[name], states["small"][name])
        assert "token_embedding.weight" in state


def test_the_model_is_float32_and_in_eval_mode(pretrained):
    model, _ = pretrained
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.mark.parametrize(
    ("backbone", "shape", "action", "both"),
    [("tiny", 0.78, 0.85, 0.7), ("small", 0.9, 0.9, 0.85), ("wider", 0.9, 0.9, 0.85)],
)
def test_the_committed_weights_reach_the_stated_accuracy(backbone, shape, action, both):
    accuracy = still_accuracy(*create_model(backbone=backbone), count=1024)
    assert accuracy["shape"] > shape
    assert accuracy["action"] > action
    assert accuracy["class"] > both


def test_every_class_name_fits_the_context(pretrained):
    model, tokenizer = pretrained
    names = [name for split in ("seen", "development", "unseen") for name in class_names(split)]
    tokens = tokenizer([template.format(name) for name in names for template in TEMPLATES])
    assert tokens.shape[1] == model.context_length
    # A truncated caption would have no padding at the end.
    assert (tokens[:, -1] == 0).all()
    assert len({tuple(row) for row in tokens.tolist()}) == len(names) * len(TEMPLATES)


def test_missing_weights_say_how_to_make_them(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"python -m examples\.shapes\.pretrain --backbone small --out"
    ):
        create_model(tmp_path / "none.safetensors")


def test_normalise_is_what_clip_does():
    pixels = np.full((2, 5, 32, 32, 3), 255, np.uint8)
    values = normalise(pixels)
    assert values.shape == (2, 5, 3, 32, 32)
    expected = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(values[0, 0, :, 0, 0], expected)


def test_a_caption_fits_every_image_of_which_it_is_true():
    drawn = np.array([[0, 1, 2], [0, 1, 3], [0, 1, 2], [4, 1, 2]])
    mentioned = np.array([[0, 1, -1], [0, 1, 3], [0, 1, 2], [4, -1, -1]])
    expected = [[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert caption_targets(drawn, mentioned).tolist() == expected


def test_without_duplicates_the_loss_is_open_clips(pretrained):
    open_clip = pytest.importorskip("open_clip")
    model, tokenizer = pretrained
    generator = np.random.default_rng(0)
    places = np.arange(6)
    images = normalise(draw_images(places, places, places, generator))
    tokens = tokenizer([f"a {SHAPES[i]} {ACTIONS[i]}" for i in places])
    with torch.no_grad():
        features = (
            model.encode_image(images, normalize=True),
            model.encode_text(tokens, normalize=True),
        )
        loss = contrastive_loss(*features, model.logit_scale.exp(), torch.eye(6))
        expected = open_clip.ClipLoss()(*features, model.logit_scale.exp())
    torch.testing.assert_close(loss, expected)


def test_a_repeated_pair_costs_nothing_that_a_perfect_model_could_avoid(pretrained):
    """Two equal pairs share the probability, so the loss of each direction is log 2."""
    model, tokenizer = pretrained
    image = normalise(draw_images(*np.zeros((3, 1), np.int64), np.random.default_rng(0)))
    tokens = tokenizer(["a square resting"])
    with torch.no_grad():
        features = (
            model.encode_image(image, normalize=True).repeat(2, 1),
            model.encode_text(tokens, normalize=True).repeat(2, 1),
        )
        loss = contrastive_loss(*features, model.logit_scale.exp(), torch.ones(2, 2))
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


def test_the_script_learns_in_a_smaller_world_from_nothing():
    """3 shapes and 4 actions, an eighth of the steps and an eighth of the stills: above chance.

    Chance is 1/3, 1/4 and 1/12; its standard deviation over 1024 stills is at most 0.015.
    """
    model, tokenizer = pretrain(
        steps=300, batch_size=32, lr=1e-3, seed=1, shapes=3, actions=4, progress=False
    )
    accuracy = still_accuracy(model, tokenizer, count=1024, shapes=3, actions=4)
    assert accuracy["shape"] > 1 / 3 + 0.1
    assert accuracy["action"] > 1 / 4 + 0.1
    assert accuracy["class"] > 1 / 12 + 0.1


def test_the_script_still_makes_a_model_of_that_accuracy():
    """Training continues from the committed weights without a loss of accuracy.

    If the drawings, the captions or the loss had changed, the accuracy would fall at this rate.
    """
    model, tokenizer = pretrain(
        steps=60, batch_size=64, lr=5e-4, seed=2, start=WEIGHTS, progress=False
    )
    accuracy = still_accuracy(model, tokenizer, count=1024)
    assert accuracy["shape"] > 0.9
    assert accuracy["action"] > 0.9
    assert accuracy["class"] > 0.85


def test_a_locked_text_tower_stays_and_the_image_tower_learns_to_match_it():
    """Only the image tower and the logit scale change, and the accuracy rises above chance."""
    torch.manual_seed(4)
    before = create_model(None, backbone="tiny")[0].state_dict()
    model, tokenizer = pretrain(steps=40, batch_size=32, seed=4, backbone="tiny", progress=False)
    committed = create_model()[0].state_dict()
    for name, value in model.state_dict().items():
        if name in image_tower(before):
            assert value.ndim == 0 or not torch.equal(value, before[name])
        else:
            assert torch.equal(value, committed[name])
    accuracy = still_accuracy(model, tokenizer, count=1024)
    assert accuracy["action"] > 1 / 8 + 0.05  # chance is 1/8 with a deviation of 0.01


@pytest.mark.parametrize("backbone", ["small", "tiny"])
def test_the_command_writes_what_it_reports(backbone, tmp_path, capsys, monkeypatch):
    out = tmp_path / "weights.safetensors"
    still_accuracy = partial(script.still_accuracy, count=256)  # not of 2048 stills
    monkeypatch.setattr(script, "still_accuracy", still_accuracy)
    main(["--backbone", backbone, "--steps", "2", "--batch-size", "8", "--out", str(out)])
    reported = re.findall(r"(\w+) accuracy on held-out stills: (.*)%", capsys.readouterr().out)
    accuracy = still_accuracy(*create_model(out, backbone=backbone))
    assert {kind: float(value) for kind, value in reported} == pytest.approx(
        {kind: 100 * value for kind, value in accuracy.items()}, abs=0.051
    )


def test_pretraining_is_repeatable():
    first, second = (
        pretrain(steps=2, batch_size=8, seed=3, progress=False)[0].state_dict() for _ in range(2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
