"""Refusing compiled models that keep copies of their old weights."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from openvclip.errors import UsageError


def require_live_weights(model: nn.Module) -> None:
    """Check that a compiled model reads its parameters in each call.

    With Inductor's option ``freezing=True``, a compiled model copies its parameters into constants
    at the first call without gradients. New weights then have no effect.

    Args:
        model: a model. It or some of its modules may be compiled.

    Raises:
        UsageError: the model, or a module in it, is compiled with ``freezing=True``.
    """
    if any(_is_frozen(module) for module in model.modules()):
        raise UsageError(
            "The model is compiled with Inductor's option freezing=True. It would keep its old "
            "weights at each interpolation weight. Compile the model without this option, or pass "
            "the model that is not compiled."
        )


def _is_frozen(module: nn.Module) -> bool:
    for compiled in (module, module._compiled_call_impl):
        config_of: Any = getattr(compiled, "__dict__", {}).get("get_compiler_config")
        if config_of is not None:
            options = config_of() or {}
            inductor = sys.modules.get("torch._inductor.config")
            return bool(options.get("freezing") or getattr(inductor, "freezing", False))
    return False
