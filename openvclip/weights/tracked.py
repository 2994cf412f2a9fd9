"""What a weight average reads from a model: the entries, their ties, and the averaged names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from openvclip.errors import UsageError, listed
from openvclip.weights.adapters import mixed_factors, refuse_factors
from openvclip.weights.kinds import kind_of, quantized_names, refuse, require_values
from openvclip.weights.memory import require_no_overlap, tied_names
from openvclip.weights.names import live_model, named_parameters, state_names
from openvclip.weights.numerics import is_interpolable

_ADVICE = (
    "Train one factor of each adapter only, for example with lora_A frozen: the average of lora_B "
    "is then exact. Or use openvclip.weights.AdapterSWATracker or AdapterEMATracker, which average "
    "the products."
)


class TrackedModel(NamedTuple):
    """The live entries of a model.

    Attributes:
        state: live parameters and buffers under canonical names, each memory once.
        aliases: ``{other name: name in state}`` of tied entries.
        extra_state: what ``get_extra_state`` of the modules returns, by name.
    """

    state: dict[str, Tensor]
    aliases: dict[str, str]
    extra_state: dict[str, Any]


def tracked_model(model: nn.Module) -> TrackedModel:
    """Return the live entries of a model without the additional names of ties."""
    entries, extra_state = live_model(model)
    aliases = tied_names(entries)
    state = {name: value for name, value in entries.items() if name not in aliases}
    return TrackedModel(state, aliases, extra_state)


def averaged_names(model: nn.Module, state: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the names in the state dict of the parameters that are averaged.

    These are the parameters that require gradients, or all parameters if none requires gradients.

    Raises:
        UsageError: the state dict does not hold a parameter that requires gradients.
    """
    parameters = named_parameters(model)
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    names = state_names(
        trained or {name: v for name, v in parameters.items() if is_interpolable(v)}, state
    )
    hidden = [name for name, other in names.items() if other is None]
    if hidden and trained:
        raise UsageError(
            f"The state dict of the model does not hold {len(hidden)} trained parameters "
            f"({listed(hidden)}): a state-dict hook hides or copies them, so they can't be "
            "averaged. Remove the hook before you create the tracker, or freeze these parameters."
        )
    return frozenset(name for name in names.values() if name is not None)


def require_trackable(
    model: nn.Module, state: Mapping[str, Tensor], averaged: frozenset[str]
) -> None:
    """Raise an error if the entries of the model can't be averaged one by one.

    Raises:
        WeightTypeError: averaged entries are quantised, sparse or factors of adapters, or the
            weights are offloaded.
        UsageError: an averaged entry shares a part of its memory with an entry that is not
            averaged.
    """
    kinds = {name: kind_of(value) for name, value in state.items()}
    is_offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    unusable = {"uninitialized", "sparse"} | ({"meta"} if is_offloaded else set())
    require_values({n: v for n, v in state.items() if kinds[n] in unusable}, "The model")
    # A model on the meta device can get its values later.
    own = {n: v for n, v in state.items() if n in averaged and kinds[n] != "meta"}
    require_values(own, "The model")
    if not any(value.requires_grad for value in state.values()):
        refuse("quantized", quantized_names(state), "The model")
    refuse_factors(mixed_factors(state, averaged.__contains__), "The model", advice=_ADVICE)
    require_no_overlap(state, averaged, unless_both=True)
