"""Prompts into a model and out of it again, shared by ViFi-CLIP and Vita-CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from openvclip.errors import PromptingError, UsageError
from openvclip.prompting.text import TextPrompts
from openvclip.towers.prompted import PromptedTower, VisionPrompts, find_tower
from openvclip.weights.names import canonical_state, require_match, unwrap

Model = TypeVar("Model", bound=nn.Module)

NAMESPACE = "openvclip_prompts"
"""The attribute of a model that holds its prompts, and so the first part of their names."""


class Prompts(nn.Module):
    """The prompts of one model.

    Attributes:
        method: ``"vifi"`` or ``"vita"``.
        settings: the arguments that the method's attach function was called with, as far as they
            decide on names and shapes; texts, numbers and lists of texts alone.
        vision: the prompts of the image tower, None where it has none.
        text: the prompts of the text tower, None where it has none.
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
    """Raise unless prompts can be attached to ``model`` as it is.

    Raises:
        PromptingError: it holds prompts already.
        UsageError: it is wrapped for data parallelism.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UsageError(
            f"The model is wrapped in {type(model).__name__}, which would not know of the new "
            "parameters. Attach prompts first and wrap the model then."
        )
    held = [module for module in model.modules() if isinstance(module, Prompts)]
    prompted = any(isinstance(module, PromptedTower) for module in model.modules())
    if held or prompted:
        kind = f" ({held[0].method})" if held else ""
        raise PromptingError(
            f"The model has prompts already{kind}. Call openvclip.prompting.detach(model) first "
            "to attach others."
        )


def attach(model: nn.Module, prompts: Prompts) -> None:
    """Give ``model`` its prompts, which alone are trained from then on."""
    root = unwrap(model)
    like = next(root.parameters())
    prompts.to(like.device, like.dtype).train(root.training)
    prompts.trained_before = frozenset(
        name for name, parameter in root.named_parameters() if parameter.requires_grad
    )
    root.requires_grad_(False)
    if prompts.vision is not None:
        tower = find_tower(root)
        tower.module.__class__ = tower.prompted  # type: ignore[assignment]
        # Not as a submodule: all prompts have their names in one place, under the model's own.
        tower.module.__dict__["vision_prompts"] = prompts.vision
    root.add_module(NAMESPACE, prompts)


def detach(model: Model) -> Model:
    """Take the prompts out again, in place: the model is exactly what it was.

    Its parameters ask for gradients again where they did before the prompts came.

    Returns:
        ``model`` itself, with the backbone's weights as they are now.

    Raises:
        PromptingError: it has no prompts.
    """
    _, root = _holder(model)
    prompts = prompts_of(root)
    for tower in root.modules():
        if isinstance(tower, PromptedTower):
            tower.__class__ = tower.plain  # type: ignore[assignment]
            del tower.__dict__["vision_prompts"]
    delattr(root, NAMESPACE)
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in prompts.trained_before)
    return model


def prompts_of(model: nn.Module) -> Prompts:
    """The prompts in ``model``, itself or a module that holds it.

    Raises:
        PromptingError: it has none.
    """
    return cast(Prompts, getattr(_holder(model)[1], NAMESPACE))


def has_prompts(model: nn.Module) -> bool:
    """Whether ``model`` holds prompts."""
    return any(isinstance(module, Prompts) for module in model.modules())


def _holder(model: nn.Module) -> tuple[str, nn.Module]:
    """The module that prompts were attached to, and what stands before its names."""
    for name, module in unwrap(model).named_modules():
        if isinstance(getattr(module, NAMESPACE, None), Prompts):
            return (f"{name}." if name else ""), module
    raise PromptingError(
        f"This {type(model).__name__} has no prompts. Attach some with "
        "openvclip.prompting.attach_vifi(model) or attach_vita(model)."
    )


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters: those of the prompts, for the optimizer.

    Args:
        model: a model with prompts, or a module that holds one, such as a classifier.

    Raises:
        PromptingError: it has no prompts.
    """
    return [p for p in prompts_of(model).parameters() if p.requires_grad]


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The prompts' entries of ``model.state_dict()``, with the same names and live tensors.

    Two of these can be interpolated or averaged like any weights, and :func:`load_state_dict`
    takes the result.

    Raises:
        PromptingError: the model has no prompts.
    """
    prefix, _ = _holder(model)
    state: dict[str, Tensor] = prompts_of(model).state_dict(prefix=f"{prefix}{NAMESPACE}.")
    return state


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the prompts of a model that has prompts of the same sizes; the backbone stays.

    Args:
        model: where the values go; in its own dtypes and on its own devices.
        state: what :func:`state_dict` gives, or a mixture of several.

    Raises:
        PromptingError: the model has no prompts.
        StateMismatchError: names or shapes differ; nothing is changed then.
    """
    live = canonical_state(state_dict(model), "model")
    given = canonical_state(state, "state")
    require_match(live, given, "The prompts do not fit those of the model.")
    with torch.no_grad():
        for name, value in given.items():
            live[name].copy_(value)
