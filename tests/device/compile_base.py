"""Compile ViT-B/16 once, so that the group ``compiled_towers`` finds its code in the cache."""

from tests.device.checks import Check, Checks
from tests.device.compiled_towers import VARIANTS, compare

CHECKS = Checks(
    [
        Check(f"compiled_tower[{variant}]", compare, ("ViT-B/16", variant), small=False)
        for variant in VARIANTS
    ]
)
