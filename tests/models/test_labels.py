"""Labels that the text tower can't tell apart are a warning; all others are not."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.shapes.model import create_model
from openvclip import ZeroShotClassifier, prompting
from openvclip.errors import LabelWarning
from openvclip.models.labels import warn_of_equal_labels
from tests.helpers import tiny_clip, tiny_tokenizer

LONG = " ".join(["a very long description of a red shape"] * 12)
PAIRS = {
    "cut off after the last token": (f"{LONG} on the left", f"{LONG} on the right"),
    "case": ("Star Sliding", "star sliding"),
    "white space": ("star  sliding", "star sliding"),
    "entities": ("rock &amp; roll", "rock & roll"),
}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        *((kind, ZeroShotClassifier) for kind in PAIRS),
        ("cut off after the last token", prompting.VideoClassifier),
    ],
)
def test_labels_with_equal_texts_are_named(
    kind: str, make: type[ZeroShotClassifier] | type[prompting.VideoClassifier]
) -> None:
    # Report 15 (torchmetrics#2883): two labels got equal probabilities, without a word.
    labels = ["key", PAIRS[kind][0], "square", PAIRS[kind][1], "bottle"]
    with pytest.warns(LabelWarning, match="2 labels get the same probabilities") as caught:
        make(*create_model(), labels, *([["a {}."]] if make is ZeroShotClassifier else []))
    text = str(caught[0].message)
    assert len(caught) == 1
    for label in PAIRS[kind]:
        assert repr(label) in text or (label[:20] in text and label[-20:] in text)
    assert "key" not in text
    assert len(text) < 500


def test_learned_prompts_around_equal_names() -> None:
    model = prompting.attach_vifi(
        tiny_clip(), vision_prompts=0, text_prompts=1, vision_depth=1, text_depth=1
    )

    def blind(texts: list[str]) -> torch.Tensor:
        return tiny_tokenizer([text.lower() for text in texts])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompting.VideoClassifier(model, blind, ["ab", "cd", "ef"])
    with pytest.warns(LabelWarning, match="'ab' = 'AB'"):
        prompting.VideoClassifier(model, blind, ["ab", "cd", "AB"])


@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 99))
def test_groups_equal_a_comparison_of_all_pairs(kinds: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.nn.functional.normalize(torch.randn(7, 16, generator=generator), dim=-1)
    noise = 1e-7 * torch.rand(len(kinds), 16, generator=generator)  # rounding of a batch
    labels = [f"n{i}" for i in range(len(kinds))]
    equal = [i for i, kind in enumerate(kinds) if kinds.count(kind) > 1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert warn_of_equal_labels(labels, distinct[kinds] + noise) == bool(equal)
    assert len(caught) == bool(equal)
    if equal:
        text = str(caught[0].message)
        assert text.startswith(f"{len(equal)} labels ")
        named = [label for label in labels if f"'{label}'" in text]
        assert len(named) <= 10
        assert {int(label[1:]) for label in named} <= set(equal)
        if len(equal) <= 10:
            assert {int(label[1:]) for label in named} == set(equal)
