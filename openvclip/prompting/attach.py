"""Attaching prompts to a model and detaching them, for ViFi-CLIP and Vita-CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from openvclip.errors import PromptingError, UsageError
from openvclip.prompting.text import TextPrompts
from openvclip.towers.families import find_tower_for_prompts
from openvclip.towers.prompted import VisionPrompts, is_prompted
from openvclip.weights.names import canonical_state, require_match, unwrap

Model = TypeVar("Model", bound=nn.Module)

NAMESPACE = "openvclip_prompts"
"""Attribute of a model that holds its prompts. The names of all prompts begin with it."""


class Prompts(nn.Module):
    """The prompts of a model.

    Attributes:
        method: ``"vifi"`` or ``"vita"``.
        settings: the arguments of the attach function that determine the names and shapes of the
            prompts. The values can be written as JSON.
        vision: the prompts of the image tower, or None.
        text: the prompts of the text tower, or None.
        trained_before: names of the parameters of the model that required gradients before the
            prompts were attached.
    """

    vision: VisionPrompts | None
    text: TextPrompts | None

    def __init__(
        self,
        method: str,
        settings: Mapping[str, Any],
        vision: VisionPrompts | None,
        text: TextPrompts | None,
    ) -> None:
        super().__init__()
        self.method, self.settings = method, dict(settings)
        self.vision, self.text = vision, text
        self.trained_before: frozenset[str] = frozenset()


def require_unprompted(model: nn.Module) -> None:
    """Raise unless prompts can be attached to ``model``.

    Raises:
        PromptingError: if the model has prompts already.
        UsageError: if the model is wrapped for data parallelism.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UsageError(
            f"The model is wrapped in {type(model).__name__}, which would ignore new parameters. "
            "Attach prompts first, then wrap the model in DistributedDataParallel."
        )
    attached = [module for module in model.modules() if isinstance(module, Prompts)]
    if attached or is_prompted(model):
        method = f" ({attached[0].method})" if attached else ""
        raise PromptingError(
            f"The model has prompts already{method}. Call openvclip.prompting.detach(model) first "
            "to attach others."
        )


def attach(model: nn.Module, prompts: Prompts) -> None:
    """Attach prompts to ``model`` and freeze all its other parameters."""
    root = unwrap(model)
    parameter = next(root.parameters())
    prompts.to(parameter.device, parameter.dtype).train(root.training)
    prompts.trained_before = frozenset(
        name for name, parameter in root.named_parameters() if parameter.requires_grad
    )
    root.requires_grad_(False)
    if prompts.vision is not None:
        family, tower = find_tower_for_prompts(root)
        family.attach_prompts(tower, prompts.vision)
    root.add_module(NAMESPACE, prompts)


def detach(model: Model) -> Model:
    """Remove the prompts of a model, in place.

    Parameters that required gradients before the prompts were attached require gradients again. The
    weights of the backbone keep their current values.

    Args:
        model: a model with prompts, or a module that holds such a model.

    Returns:
        ``model``.

    Raises:
        PromptingError: if the model has no prompts.
    """
    _, root = _holder(model)
    prompts = prompts_of(root)
    if prompts.vision is not None:
        family, tower = find_tower_for_prompts(root)
        family.detach_prompts(tower)
    delattr(root, NAMESPACE)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in prompts.trained_before)
    return model


def prompts_of(model: nn.Module) -> Prompts:
    """Return the prompts of ``model``, or of the model that it holds.

    Raises:
        PromptingError: if the model has no prompts.
    """
    return cast(Prompts, getattr(_holder(model)[1], NAMESPACE))


def has_prompts(model: nn.Module) -> bool:
    """Return whether ``model`` has prompts."""
    return any(isinstance(module, Prompts) for module in model.modules())


def _holder(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the module that prompts were attached to, and the prefix of its names in ``model``."""
    for name, module in unwrap(model).named_modules():
        if isinstance(getattr(module, NAMESPACE, None), Prompts):
            return (f"{name}." if name else ""), module
    raise PromptingError(
        f"This {type(model).__name__} has no prompts. Attach some with "
        "openvclip.prompting.attach_vifi(model) or attach_vita(model)."
    )


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters of the prompts, for an optimizer.

    Args:
        model: a model with prompts, or a module that holds such a model, for example a classifier.

    Raises:
        PromptingError: if the model has no prompts.
    """
    return [p for p in prompts_of(model).parameters() if p.requires_grad]


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of ``model.state_dict()`` that belong to the prompts.

    Names are the same as in ``model.state_dict()``, and tensors share memory with the model. Two
    such state dicts can be interpolated or averaged. :func:`load_state_dict` loads the result.

    Args:
        model: a model with prompts, or a module that holds such a model.

    Raises:
        PromptingError: if the model has no prompts.
    """
    prefix, _ = _holder(model)
    state: dict[str, Tensor] = prompts_of(model).state_dict(prefix=f"{prefix}{NAMESPACE}.")
    return state


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy values into the prompts of a model. The backbone is not changed.

    Args:
        model: a model with prompts, or a module that holds such a model. Its dtypes and devices
            stay the same.
        state: the result of :func:`state_dict`, or a mixture of several results.

    Raises:
        PromptingError: if the model has no prompts.
        StateMismatchError: if names or shapes differ. The model is not changed then.
    """
    prompts = canonical_state(state_dict(model), "model")
    values = canonical_state(state, "state")
    require_match(prompts, values, "The prompts do not fit the prompts of the model.")
    with torch.no_grad():
        for name, value in values.items():
            prompts[name].copy_(value)
