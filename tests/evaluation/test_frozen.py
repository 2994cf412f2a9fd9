"""Compiled models that keep their old weights are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn

from openvclip.errors import UsageError
from openvclip.evaluation import Mixture, sweep
from openvclip.evaluation.frozen import require_live_weights


class Classifier(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


# Report 18 (pytorch#103990): with freezing=True a sweep saw the same old weights at each lambda.
@pytest.mark.parametrize("where", ["options", "model.compile", "global"])
def test_a_frozen_model_is_refused(where: str) -> None:
    plain: Any = nn.Linear(2, 2)
    state = {name: value.detach().clone() for name, value in plain.state_dict().items()}
    compiled = plain
    if where == "options":
        compiled = torch.compile(plain, options={"freezing": True})
    elif where == "model.compile":
        plain.compile(options={"freezing": True})
    else:
        compiled = torch.compile(plain)
        require_live_weights(compiled)
    with torch._inductor.config.patch(freezing=where == "global"):
        with pytest.raises(UsageError, match="Compile the model without this option"):
            sweep(Classifier(compiled), state, state, [])
        with pytest.raises(UsageError, match="freezing=True"):
            Mixture(state).setters(compiled).__enter__()
    with Mixture().setters(compiled) as setters:
        assert len(setters) == 1


def test_other_models_are_not_refused() -> None:
    linear = nn.Linear(2, 2)
    require_live_weights(torch.compile(linear))  # type: ignore[arg-type]
    require_live_weights(torch.compile(linear, backend="eager"))  # type: ignore[arg-type]
    linear.compile(mode="max-autotune-no-cudagraphs")
    require_live_weights(linear)
    with torch._inductor.config.patch(freezing=True):
        require_live_weights(nn.Linear(2, 2))
