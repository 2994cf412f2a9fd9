"""A random part of a batch: which clips, and in which kinds of batches."""

from __future__ import annotations

from collections import Counter, UserDict
from collections.abc import Iterator, MutableMapping
from fractions import Fraction
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openvclip.errors import UsageError
from openvclip.weights.batch_part import number_of_clips, part_size, take_clips
from openvclip.weights.draws import Draws


class Pair(NamedTuple):
    video: Tensor
    label: Tensor


class Mapping(MutableMapping[str, Any]):
    """Keeps its entries in a dict, which a plain copy shares."""

    def __init__(self, **entries: Any) -> None:
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def video(n: int) -> Tensor:
    """A clip is filled with its number."""
    return torch.arange(float(n))[:, None, None].expand(n, 2, 3).clone()


def uneven(n: int) -> list[Tensor]:
    return [torch.full((1 + i % 3, 2), float(i)) for i in range(n)]


# For each kind of batch: how to make one of n clips, and how to read the clips of a part.
KINDS: dict[str, tuple[Any, Any]] = {
    "tensor": (video, lambda part: part[:, 0, 0].tolist()),
    "labels": (torch.arange, lambda part: part.tolist()),
    "array": (np.arange, lambda part: part.tolist()),
    "texts": (lambda n: [str(i) for i in range(n)], lambda part: [int(t) for t in part]),
    "texts in a tuple": (lambda n: tuple(map(str, range(n))), lambda part: [int(t) for t in part]),
    "range": (range, list),
    "videos of other sizes": (uneven, lambda part: [int(clip.max()) for clip in part]),
    "tuple of videos": (lambda n: tuple(uneven(n)), lambda part: [int(c.max()) for c in part]),
    "dicts": (lambda n: [{"boxes": i} for i in range(n)], lambda p: [x["boxes"] for x in p]),
    "list of a loader": (lambda n: [video(n), torch.arange(n)], lambda part: part[1].tolist()),
    "only tensor of a loader": (lambda n: [video(n)], lambda part: part[0][:, 0, 0].tolist()),
    "views": (lambda n: {"views": [video(n), video(n)], "n": torch.arange(n)},
              lambda part: part["views"][1][:, 0, 0].tolist()),
    "named tuple": (lambda n: Pair(video(n), torch.arange(n)), lambda part: part.label.tolist()),
    "dict": (lambda n: {"pixels": video(n), "ids": list(range(n)), "size": 3, "loss": True},
             lambda part: part["ids"]),
    "encoding": (lambda n: UserDict(ids=torch.arange(n)), lambda part: part["ids"].tolist()),
    "own mapping": (lambda n: Mapping(ids=torch.arange(n)), lambda p: p["ids"].tolist()),
    "fixed": (lambda n: MappingProxyType({"ids": torch.arange(n)}), lambda p: p["ids"].tolist()),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_clips_are_taken_from_each_kind_of_batch(kind: str) -> None:
    make, read = KINDS[kind]
    for n, chosen in ((5, [0, 3, 4]), (5, [2]), (1, [0])):
        batch = make(n)
        for arguments in ((batch,), (torch.arange(n), None, batch, "all", 0.5, torch.tensor(7.0))):
            if kind == "views" and n == 1:  # two views, or one clip with two entries
                continue
            assert number_of_clips(arguments) == n
            part = take_clips(arguments, chosen)
            assert len(part) == len(arguments)
            taken = part[min(2, len(part) - 1)]
            assert read(taken) == chosen
            if kind not in ("range", "fixed", "own mapping"):
                assert type(taken) is type(batch)
            for before, after in zip(arguments, part, strict=True):
                if before is None or isinstance(before, (str, float)):
                    assert after is before
            assert read(batch) == list(range(n)), "the batch itself has changed"


ONE = torch.zeros(16, 3)  # a video of 16 frames
LAST_BATCHES: dict[str, tuple[Any, ...]] = {
    "a dict for each clip": ([{"video": ONE, "label": 3}],),
    "a tuple for each clip": ([(ONE, 3)],),
    "a list of videos and one of labels": ([ONE], [3]),
    "lists in a dict": ({"video": [ONE], "label": [3]},),
}


@pytest.mark.parametrize("batch", LAST_BATCHES.values(), ids=LAST_BATCHES.keys())
def test_the_only_clip_of_a_last_batch_keeps_its_frames(batch: tuple[Any, ...]) -> None:
    assert number_of_clips(batch) == 1
    torch.testing.assert_close(take_clips(batch, [0]), batch)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_what_belongs_to_no_clip_is_passed_through(n: int) -> None:
    batch = {"pixels": video(n), "size": 3, "loss": True, "scale": torch.tensor(2.0), "no": None}
    (part,) = take_clips((batch,), [0])
    assert {name: part[name] for name in part if name != "pixels"} == {
        name: batch[name] for name in batch if name != "pixels"
    }


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ((), "no tensors and no lists of clips"),
        ((3, None, "text", torch.tensor(1.0)), "no tensors and no lists of clips"),
        (({"a": 1},), "no tensors and no lists of clips"),
        ((torch.empty(0, 3),), "an empty batch"),
        (([],), "an empty batch"),
        ((torch.ones(4, 2), torch.ones(3)), "4 clips, but argument 2 has 3"),
        ((torch.ones(4, 2), ["a", "b"]), "4 clips, but argument 2 has 2"),
        ((torch.ones(4, 2), (224, 224)), "4 clips, but argument 2 has 2"),
        ((torch.ones(4), {"names": [torch.ones(3)]}), r"4 clips, but argument 2\['names'\]\[0\]"),
        (({"x": torch.ones(4), "y": np.ones(5)},), r"4 clips, but argument 1\['y'\] has 5"),
        (([torch.ones(4, 2), torch.ones(5)],), r"4 clips, but argument 1\[1\] has 5"),
    ],
)
def test_batches_without_a_number_of_clips_are_refused(batch: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        take_clips(batch, [0])


def test_the_memory_format_and_the_graph_are_kept() -> None:
    frames = torch.randn(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    (part,) = take_clips((frames,), [1, 4])
    assert part.is_contiguous(memory_format=torch.channels_last)
    leaf = torch.ones(3, 2, requires_grad=True)
    take_clips((leaf,), [2])[0].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 0].tolist() == [0, 0, 1]


@given(st.integers(1, 300), st.fractions(Fraction(1, 1000), 1))
def test_the_size_of_a_part_is_the_nearest_number_of_clips(clips: int, share: Fraction) -> None:
    size = part_size(float(share), clips)
    assert 1 <= size <= clips
    assert size == 1 or abs(size - float(share) * clips) <= 0.5 + 1e-9
    assert part_size(1.0, clips) == clips


def test_every_set_of_clips_is_equally_likely() -> None:
    """So the mean of a part is an unbiased estimate of the mean of the batch."""
    draws, calls = Draws(0), 4000
    counts = Counter(tuple(draws.part(5, 2)) for _ in range(calls))
    assert counts.keys() == set(combinations(range(5), 2))
    assert sum((count - calls / 10) ** 2 / (calls / 10) for count in counts.values()) < 27.9
    # 27.9 is the 0.999 quantile of chi squared with 9 degrees of freedom.


def test_the_random_state_does_not_depend_on_the_size_of_the_batch() -> None:
    """So processes with a smaller last batch still draw the same parts afterwards."""
    one, other, third = Draws(3), Draws(3), Draws(4)
    one.part(64, 16)
    other.part(5, 1)
    third.part(64, 16)
    assert one.part(64, 16) == other.part(64, 16) != third.part(64, 16)


def test_alphas_are_independent_of_the_parts() -> None:
    one, other = Draws(0), Draws(0)
    first = [one.alpha((0.0, 1.0)) for _ in range(3)]
    mixed = []
    for _ in range(3):
        other.part(8, 2)
        mixed.append(other.alpha((0.0, 1.0)))
    assert first == mixed
    assert not torch.equal(one.alphas.get_state(), Draws(0).parts.get_state())
