"""The sizes in which the experiment runs. Hyper-parameters were chosen on development shapes."""

from __future__ import annotations

from dataclasses import replace

from examples.finetune import Recipe
from examples.shapes.clips import ClipSettings
from examples.shapes.experiment import Settings

RECIPE = Recipe(
    epochs=13,
    warmup_epochs=1,
    lr=5e-4,
    end_lr=5e-6,
    batch_size=32,
    averages_per_epoch=4,
    l2_weight=0.5,
)

QUICK = Settings(ClipSettings(train=1024, test=512), RECIPE)
FULL = replace(QUICK, runs=("swa", "openvclip", "l2"))
SMOKE = Settings(
    ClipSettings(train=64, test=64), replace(RECIPE, epochs=2, warmup_epochs=1), QUICK.runs
)
