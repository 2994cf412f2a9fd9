"""Compile ViT-L/14 once, so that the group ``compiled_towers`` finds its code in the cache."""

from tests.device.checks import Check, Checks
from tests.device.compiled_towers import VARIANTS, compare

CHECKS = Checks(
    [
        Check(f"compiled_tower[{variant}]", compare, ("ViT-L/14", variant), small=False)
        for variant in VARIANTS
    ]
)
