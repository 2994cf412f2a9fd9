"""Which tensors are the same values in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from openvclip.weights.memory import is_one_view, view_of

MEMORY = torch.arange(24.0)
PARAMETER = nn.Parameter(MEMORY.view(4, 6))
COMPLEX = torch.randn(3, dtype=torch.complex64)
TENSORS: dict[str, Tensor] = {
    "parameter": PARAMETER,
    "the same values": PARAMETER.data,
    "another parameter of the memory": nn.Parameter(MEMORY.view(4, 6)),
    "another shape": MEMORY.view(6, 4),
    "another stride": MEMORY.view(6, 4).t(),
    "other dtype": MEMORY.view(torch.int32).view(4, 6),
    "a part": MEMORY[:6],
    "a later part": MEMORY[6:12],
    "a copy": MEMORY.clone().view(4, 6),
    "complex": COMPLEX,
    "conjugate": COMPLEX.conj(),
    "imaginary": COMPLEX.imag,
    "negative": COMPLEX.conj().imag,
    "empty": MEMORY[:0],
    "empty, other memory": torch.empty(0),
    "meta": torch.empty(4, 6, device="meta"),
    "other meta": torch.empty(4, 6, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
    "other sparse": torch.eye(3).to_sparse(),
    "lazy": nn.LazyLinear(3).weight,
}
SAME = {"parameter", "the same values", "another parameter of the memory"}


@pytest.mark.parametrize("second", TENSORS)
@pytest.mark.parametrize("first", TENSORS)
def test_only_the_same_values_in_memory_are_one_view(first: str, second: str) -> None:
    a, b = TENSORS[first], TENSORS[second]
    expected = first == second or {first, second} <= SAME
    assert is_one_view(a, b) == expected
    assert (view_of(a) == view_of(b)) == expected
