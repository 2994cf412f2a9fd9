"""The random numbers of a regulariser, which do not touch the global random state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openvclip.weights.arguments import restore_generator, seeded_generator

_OWNER = "an InterpolatedWeightRegularizer"


class Draws:
    """Draws the alphas and the parts of the batches of a regulariser.

    Each has a generator of its own. Alphas are therefore the same with and without parts, and
    independent of the parts.

    Args:
        seed: seed of both generators.
    """

    def __init__(self, seed: int) -> None:
        self.alphas = seeded_generator(seed)
        # With the same seed, equal random bits would give the alpha and the part of a step.
        digest = hashlib.blake2b(f"parts {seed}".encode(), digest_size=8).digest()
        self.parts = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def alpha(self, interval: tuple[float, float]) -> float:
        """Return an alpha, uniformly from an interval.

        Args:
            interval: lower and upper end.
        """
        low, high = interval
        uniform = torch.rand((), generator=self.alphas, dtype=torch.float64).item()
        return low + (high - low) * uniform

    def part(self, clips: int, size: int) -> list[int]:
        """Return the numbers of ``size`` different clips in ascending order.

        Every set of clips has the same probability. All calls use equally many random numbers.
        Processes with batches of different sizes therefore stay at the same random state.

        Args:
            clips: number of clips to choose from.
            size: number of clips to choose.
        """
        seed = int(torch.randint(2**63 - 1, (), generator=self.parts))
        order = torch.randperm(clips, generator=torch.Generator().manual_seed(seed))
        return sorted(order[:size].tolist())

    def state(self) -> dict[str, Tensor]:
        """Return the states of the generators, under the names that they have in saved states."""
        return {
            "generator": self.alphas.get_state(),
            "part_generator": self.parts.get_state(),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the states of the generators.

        Args:
            state: has the entries of :meth:`state`, and others.

        Raises:
            StateMismatchError: an entry is not the state of a generator. Nothing changes then.
        """
        alphas, parts = torch.Generator(), torch.Generator()
        restore_generator(alphas, state["generator"], "generator", _OWNER)
        restore_generator(parts, state["part_generator"], "part_generator", _OWNER)
        self.alphas, self.parts = alphas, parts

    def __getstate__(self) -> dict[str, Any]:
        """Return plain numbers. A process that is started by "spawn" can't take a generator."""
        return {name: value.tolist() for name, value in self.state().items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle."""
        self.alphas, self.parts = torch.Generator(), torch.Generator()
        self.load({n: torch.tensor(value, dtype=torch.uint8) for n, value in state.items()})
