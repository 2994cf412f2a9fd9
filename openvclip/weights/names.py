"""Names of state dicts: canonical forms, comparison, and the named weights of a model.

A *state dict* maps names to tensors. Wrappers add parts to the names: ``module.`` (data
parallelism), ``_orig_mod.`` (``torch.compile``) and others. All of openvclip compares *canonical*
names, which are the names without these parts. Entries are never matched by position.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from openvclip.errors import StateMismatchError, UsageError, WeightTypeError, listed
from openvclip.weights.memory import view_of, without_ties
from openvclip.weights.relative import RelativeWeights
from openvclip.weights.shards import reshard

# Any submodule can be wrapped, so these parts can occur at any position of a name.
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


_HAS_WRAPPER_PART = re.compile("|".join(sorted(_WRAPPER_PARTS)))


def _without_wrappers(name: str) -> str:
    if _HAS_WRAPPER_PART.search(name) is None:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Return a dict from the canonical form of each name to the original name.

    The parts that ``torch.compile``, FSDP and activation checkpointing add are removed at any
    position. A leading ``module.`` is removed, repeatedly, only if all names have it. Data
    parallelism wraps the whole model. If only some names start with ``module.``, then ``module`` is
    a submodule of the model, and the names are kept. The counter ``n_averaged`` of
    ``torch.optim.swa_utils.AveragedModel`` beside names that all start with ``module.`` is left
    out.

    Raises:
        StateMismatchError: two names have the same canonical form.
    """
    raw_names = _without_counter(list(names))
    short_names = [_without_wrappers(name) for name in raw_names]
    while short_names and all(name.startswith("module.") for name in short_names):
        short_names = [name.removeprefix("module.") for name in short_names]
    pairs = list(zip(short_names, raw_names, strict=True))
    canonical = dict(pairs)
    if len(canonical) < len(raw_names):
        repeated = {name for name in short_names if short_names.count(name) > 1}
        raise StateMismatchError(
            "Several names become the same once the names of wrappers are removed.",
            unexpected=[raw for short, raw in pairs if short in repeated],
            hint="Keep one entry for each weight, under the name of the model without wrappers.",
        )
    return canonical


def _without_counter(names: list[str]) -> list[str]:
    """Leave out the counter of ``AveragedModel``, which is not part of the averaged model."""
    counters = [name for name in names if name.rpartition(".")[2] == "n_averaged"]
    if len(counters) != 1 or len(names) == 1:
        return names
    prefix = _without_wrappers(counters[0]).removesuffix("n_averaged")
    others = [name for name in names if name != counters[0]]
    under_module = all(_without_wrappers(name).startswith(f"{prefix}module.") for name in others)
    return others if under_module and set(prefix.split(".")) <= {"module", ""} else names


def canonical_state(
    state: Mapping[str, Tensor], what: str = "state", *, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a state dict under canonical names, in the same order.

    The tensors are not copied.

    Args:
        state: mapping from names to tensors.
        what: name of the argument, for the error text.
        like: entries of the target model. If all their names start with ``module.``, the names of
            the result start with this prefix too.

    Raises:
        WeightTypeError: ``state`` is not a mapping from names to tensors.
        StateMismatchError: two names have the same canonical form.
    """
    require_mapping(state, what)
    _require_tensors(state, what)
    return _with_canonical_names(state, like)


def canonical_model(
    state: Mapping[str, Any], what: str = "state", *, like: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of a state dict and its extra state, both under canonical names.

    Extra state is what ``torch.nn.Module.get_extra_state`` returns: tensors, bytes or other
    objects. Extra state belongs to one model, so no arithmetic is done on it. Nothing is copied.

    Args:
        state: mapping from names to tensors, and to objects for extra state.
        what: name of the argument, for the error text.
        like: as in :func:`canonical_state`.

    Raises:
        WeightTypeError: ``state`` is not a mapping from names to tensors.
        StateMismatchError: two names have the same canonical form.
    """
    require_mapping(state, what)
    _require_tensors({n: v for n, v in state.items() if not is_extra_state(n)}, what)
    entries = _with_canonical_names(state, like)
    extra = {name: entries.pop(name) for name in list(entries) if is_extra_state(name)}
    return entries, extra


def _with_canonical_names(
    state: Mapping[str, Any], like: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    prefix = _module_prefix(like) if like is not None else ""
    return {prefix + name: state[raw] for name, raw in canonical_names(state).items()}


def is_extra_state(name: str) -> bool:
    """Return whether a name of a state dict is that of the extra state of a module."""
    return isinstance(name, str) and name.rpartition(".")[2] == "_extra_state"


def require_mapping(state: object, what: str) -> None:
    """Raise a :class:`WeightTypeError` if ``state`` is not a mapping."""
    if isinstance(state, RelativeWeights):
        raise WeightTypeError(
            f"{what} is an {type(state).__name__}, which is a change of a base model. Here a state "
            "dict is expected; merge the adapter with its base model: adapter.merged(base)."
        )
    if isinstance(state, nn.Module):
        raise WeightTypeError(
            f"{what}: expected a state dict, got a {type(state).__name__}; pass its .state_dict()."
        )
    if not isinstance(state, Mapping):
        raise WeightTypeError(
            f"{what}: expected a mapping of names to tensors, got {type(state).__name__}."
        )


def _require_tensors(state: Mapping[str, object], what: str) -> None:
    non_tensors = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if non_tensors:
        first = non_tensors[0]
        raise WeightTypeError(
            f"{what}: expected names mapped to tensors, but {first!r} holds a "
            f"{type(state[first]).__name__} ({len(non_tensors)} such entries). If this is a "
            "training checkpoint, pass its weights, for example ckpt['state_dict']."
        )


def _module_prefix(live: Mapping[str, Tensor]) -> str:
    prefix = ""
    while live and all(name.startswith(prefix + "module.") for name in live):
        prefix += "module."
    return prefix


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of data parallelism and ``torch.compile``.

    ``torch.optim.swa_utils.AveragedModel`` is such a wrapper too.

    Raises:
        WeightTypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise WeightTypeError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the live parameters of a model under canonical names.

    A shared parameter appears once, under its first name. Two parameters that are the same values
    in memory appear once too, under the first name that requires gradients. Under ``fully_shard``
    the parameters are the shards that the optimizer updates.
    """
    plain_model = unwrap(model)
    reshard(plain_model)
    parameters = without_ties(dict(plain_model.named_parameters()))
    return {_without_wrappers(name): value for name, value in parameters.items()}


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the live parameters and buffers of a model's state dict under canonical names.

    Extra state that is a tensor is included. :func:`live_model` leaves it out.
    """
    state = unwrap(model).state_dict(keep_vars=True)
    return {
        _without_wrappers(name): value for name, value in state.items() if isinstance(value, Tensor)
    }


def live_model(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the live entries of a model's state dict, and its extra state.

    The names are canonical. A state-dict hook can rename entries, hide them or replace them by
    copies: see :func:`state_names`.
    """
    state = unwrap(model).state_dict(keep_vars=True)
    entries = {_without_wrappers(name): value for name, value in state.items()}
    extra = {name: entries.pop(name) for name in list(entries) if is_extra_state(name)}
    return {name: value for name, value in entries.items() if isinstance(value, Tensor)}, extra


def require_live(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise an error if an entry of the state dict is a copy of the model's weights.

    Raises:
        UsageError: a state-dict hook replaces weights by copies, so a write to the state dict does
            not change the model.
    """
    # Faster than parameters() and buffers(), which make names.
    registries = ((module._parameters, module._buffers) for module in model.modules())
    own = {id(value) for pair in registries for registry in pair for value in registry.values()}
    strangers = {name: value for name, value in state.items() if id(value) not in own}
    if strangers:
        views = {view_of(value) for value in itertools.chain(model.parameters(), model.buffers())}
        copies = [name for name, value in strangers.items() if view_of(value) not in views]
        if copies:
            raise UsageError(
                f"The state dict of the model holds {len(copies)} copies ({listed(copies)}), which "
                "a state-dict hook makes. Remove the hook first: a write to a copy does not change "
                "the model."
            )


def set_extra_state(model: nn.Module, extra_state: Mapping[str, Any]) -> None:
    """Give each extra state to the module that it belongs to, as ``load_state_dict`` does.

    Args:
        model: a model with or without wrappers.
        extra_state: from :func:`canonical_model`. The modules get copies. Extra state of modules
            that the model lacks is ignored.
    """
    if extra_state:
        modules = {_without_wrappers(name): m for name, m in unwrap(model).named_modules()}
        for name, value in extra_state.items():
            module = modules.get(name.rpartition(".")[0])
            if module is not None and has_extra_state(module):
                module.set_extra_state(copy.deepcopy(value))


def has_extra_state(module: nn.Module) -> bool:
    """Return whether the module accepts extra state."""
    return type(module).set_extra_state is not nn.Module.set_extra_state


def state_names(
    parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, str | None]:
    """Return the name in the state dict of each parameter.

    State-dict hooks can give parameters other names, hide them or replace them by copies. The
    result is None for hidden and copied parameters.

    Args:
        parameters: from :func:`named_parameters`.
        state: live entries of the same model, from :func:`live_model`.
    """
    names: dict[str, str | None] = {}
    by_view: dict[Hashable, str] | None = None
    for name, parameter in parameters.items():
        if state.get(name) is parameter:  # the usual case
            names[name] = name
            continue
        if by_view is None:
            by_view = {}
            for other, value in state.items():
                by_view.setdefault(view_of(value), other)
        names[name] = by_view.get(view_of(parameter))
    return names


def mismatches(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield ``(name, expected shape, given shape)`` of shared names whose shapes differ."""
    for name in expected.keys() & given.keys():
        if expected[name].shape != given[name].shape:
            yield name, tuple(expected[name].shape), tuple(given[name].shape)


def require_match(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, hint: str = ""
) -> None:
    """Raise one :class:`StateMismatchError` with all differences of names and shapes, if any.

    Args:
        expected: entries under canonical names.
        given: entries under canonical names.
        what: first line of the error text.
        hint: second line of the error text: what to do.
    """
    missing = expected.keys() - given.keys()
    unexpected = given.keys() - expected.keys()
    mismatched = list(mismatches(expected, given))
    if missing or unexpected or mismatched:
        raise StateMismatchError(
            what, missing=missing, unexpected=unexpected, mismatched=mismatched, hint=hint
        )
