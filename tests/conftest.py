"""Settings of the whole suite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# No law depends on the time an example takes; the machines that run the suite are shared.
settings.register_profile(
    "openvclip", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("openvclip")

# The models are tiny: threads that wait for each other on shared cores cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
