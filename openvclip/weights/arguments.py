"""Checks of arguments that many classes have: numbers, seeds, devices and saved states."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from openvclip.errors import StateMismatchError, UsageError, WeightTypeError, reason_of

__all__ = [
    "A_DEVICE",
    "as_float",
    "is_whole",
    "require_device",
    "require_own_keys",
    "restore_generator",
    "seeded_generator",
]

A_DEVICE = "expected a device of this machine, such as 'cpu' or 'cuda'"
"""What an error about a device expects."""


def as_float(value: object) -> float:
    """Return a real number, or a tensor of one real number, as a float; NaN for all other values.

    Text and truth values are no numbers. Every comparison with NaN is false, so a check of the
    range refuses what is no number too.
    """
    is_number = isinstance(value, Real) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    )
    if isinstance(value, bool) or not is_number:
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf


def is_whole(value: object, least: int, below: int = 2**63) -> bool:
    """Return whether a value is a whole number from ``least`` on, below ``below``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return least <= int(value) < below


def seeded_generator(seed: int) -> torch.Generator:
    """Return a new generator on the CPU.

    Raises:
        UsageError: ``seed`` is no whole number of 64 bits, from -2**63 to 2**64 - 1 as in PyTorch.
    """
    if not is_whole(seed, -(2**63), 2**64):
        raise UsageError(
            f"seed={seed!r}: expected a whole number below 2**64, such as 0. Processes that train "
            "together need the same seed."
        )
    return torch.Generator().manual_seed(int(seed))


def require_device(device: object, what: str) -> torch.device:
    """Return a device of this machine, with the index of the current device.

    Args:
        device: a device, or its name such as ``"cuda"``.
        what: name of the argument, for the error text.

    Raises:
        UsageError: there is no such device, or this machine does not have it.
    """
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise UsageError(f"{what}={device!r}: {A_DEVICE}.")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        raise UsageError(
            f"{what}={device!r} can't be used here ({reason_of(error)}); {A_DEVICE}."
        ) from error


def require_own_keys(state: object, expected: Collection[str], owner: str) -> None:
    """Raise an error if a saved state has other entries than the state of its owner.

    Args:
        state: the saved state.
        expected: names of the entries.
        owner: name of the class that the state must come from, with its article.

    Raises:
        WeightTypeError: the state is not a mapping.
        StateMismatchError: an entry is missing or unknown.
    """
    if not isinstance(state, Mapping):
        raise WeightTypeError(
            f"Expected the result of state_dict() of {owner}, got a {type(state).__name__}."
        )
    if state.keys() != set(expected):
        raise StateMismatchError(
            f"This is not the state of {owner}.",
            missing=set(expected) - state.keys(),
            unexpected={str(name) for name in state.keys() - set(expected)},
            hint=f"Pass the result of state_dict() of {owner}.",
        )


def restore_generator(generator: torch.Generator, state: Any, entry: str, owner: str) -> None:
    """Set the state of a generator from an entry of a saved state.

    Args:
        generator: the generator.
        state: the entry, which the generator's ``get_state()`` returned.
        entry: name of the entry.
        owner: name of the class that the state must come from, with its article.

    Raises:
        StateMismatchError: the entry is not the state of a generator. The generator is unchanged.
    """
    try:
        generator.set_state(state.cpu())
    except (AttributeError, TypeError, RuntimeError) as error:
        raise StateMismatchError(
            f"The entry {entry!r} of the state is not that of a random generator "
            f"({reason_of(error)}).",
            hint=f"Pass the result of state_dict() of {owner}.",
        ) from error
