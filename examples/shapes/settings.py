"""The sizes of the experiment. The hyper-parameters were chosen on the development shapes."""

from __future__ import annotations

from dataclasses import replace

from examples.shapes.clips import ClipSettings
from examples.shapes.experiment import Settings
from openvclip.training.recipe import Recipe

RECIPE = Recipe(
    epochs=20,
    warmup_epochs=1,
    lr=2e-3,
    warmup_start_lr=2e-5,
    end_lr=2e-5,
    batch_size=32,
    average_after=10,
    averages_per_epoch=4,
    l2_weight=0.01,
)

FULL = Settings(ClipSettings(train=512, test=512), RECIPE)
SMOKE = Settings(ClipSettings(train=64, test=16), replace(RECIPE, epochs=2, average_after=1))
