"""The published recipes, as defaults of ``examples/finetune.py`` and ``examples/accuracy.py``.

Source: the papers (Weng et al., ICML 2023; Rasheed et al. and Wasim et al., CVPR 2023). Three
settings are not in the papers and come from the releases: the cosine ends at a hundredth of the
learning rate (ViFi-CLIP) or at zero (Vita-CLIP), supervised training has 16 frames, and base to
novel has a batch of 64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A recipe as values of flags, by name. Other flags keep their defaults.

    Attributes:
        about: a description of the recipe.
        training: flags of ``examples/finetune.py``.
        testing: flags of ``examples/accuracy.py``.
    """

    about: str
    training: Mapping[str, Any]
    testing: Mapping[str, Any]

    def text(self) -> str:
        """Return the flags for training as they are typed on a command line."""
        return " ".join(_flag(name, value) for name, value in self.training.items())


def _flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    if value is True:
        return flag
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f'{flag} "{text}"' if isinstance(value, str) and " " in value else f"{flag} {text}"


_VIFI_CLIPS = {"frames": 32, "sampler": "uniform", "short_side": 256}
_VIFI_OPTIMIZER = {"warmup_epochs": 5, "weight_decay": 0.001, "betas": (0.9, 0.98)}


def _rates(lr: float) -> dict[str, float]:
    return {"lr": lr, "warmup_start_lr": lr / 100, "end_lr": lr / 100}


def _vifi(about: str, *, lr: float, epochs: int, batch_size: int, **more: Any) -> Preset:
    recipe = {**_rates(lr), "epochs": epochs, "batch_size": batch_size}
    words = {"lam": 0.0, "template": "a photo of a {}."}
    training = {"method": "vifi", **recipe, **_VIFI_OPTIMIZER, **_VIFI_CLIPS, **words, **more}
    return Preset(about, training, {"method": "vifi", **_VIFI_CLIPS, "template": words["template"]})


def _bridge(about: str, *, lr: float, epochs: int, prompts: int, depth: int) -> Preset:
    recipe = {**_rates(lr), "epochs": epochs, "batch_size": 64}
    learned = {
        "vision_prompts": prompts,
        "text_prompts": prompts,
        "vision_depth": depth,
        "text_depth": depth,
    }
    training = {"method": "bridge", **recipe, **_VIFI_OPTIMIZER, **_VIFI_CLIPS, **learned}
    return Preset(about, training, {"method": "bridge", **_VIFI_CLIPS})


def _supervised() -> Preset:
    preset = _vifi(
        "ViFi-CLIP on all videos of a data set, tested on 4 x 3 views",
        lr=2.2e-5,
        epochs=30,
        batch_size=512,
        frames=16,
    )
    # Each of the three crops is as high as the frame: the short side has the size of a crop.
    views = {"frames": 16, "short_side": None, "views": 4, "crops": 3}
    return Preset(preset.about, preset.training, {**preset.testing, **views})


PRESETS: dict[str, Preset] = {
    "open-vclip": Preset("the paper's Open-VCLIP: the defaults", {}, {"views": 3}),
    "froster": Preset(
        "FROSTER: both towers, with the features distilled from CLIP's",
        {"method": "swa", "text_tower": True, "distill": 2.0, "lam": 0.0},
        {"method": "swa", "views": 3},
    ),
    "vifi-zero-shot": _vifi(
        "ViFi-CLIP on Kinetics-400, for the classes of other data sets",
        lr=8e-6,
        epochs=10,
        batch_size=256,
    ),
    "vifi-supervised": _supervised(),
    "vifi-few-shot": _vifi(
        "ViFi-CLIP on 2, 4, 8 or 16 videos of each class", lr=2e-6, epochs=50, batch_size=64
    ),
    "vifi-base-to-novel": _vifi(
        "ViFi-CLIP on 16 videos of each base class", lr=2e-6, epochs=11, batch_size=64
    ),
    "bridge-few-shot": _bridge(
        "prompts for a fine-tuned model, on a few videos of each class",
        lr=8e-3,
        epochs=50,
        prompts=10,
        depth=12,
    ),
    "bridge-base-to-novel": _bridge(
        "prompts for a fine-tuned model, on 16 videos of each base class",
        lr=4e-2,
        epochs=11,
        prompts=16,
        depth=9,
    ),
    "vita": Preset(
        "Vita-CLIP: prompts for a frozen CLIP",
        {
            "method": "vita",
            "lr": 4e-4,
            "end_lr": 0.0,
            "steps": 30_000,
            "warmup_epochs": 0,
            "batch_size": 256,
            "weight_decay": 0.05,
            "frames": 8,
            "sampling_rate": 16,
            "vision_prompts": 8,
            "text_prompts": 8,
            "class_prompts": True,
        },
        {
            "method": "vita",
            "frames": 8,
            "sampling_rate": 16,
            "views": 3,
            "average": "probabilities",
        },
    ),
}
"""The recipes by name."""


def overview() -> str:
    """Return the flags that each preset sets, for the help text."""
    lines = []
    for name, preset in PRESETS.items():
        lines += [f"  {name}: {preset.about}"]
        lines += [f"      {preset.text()}"] if preset.training else []
    return "presets and the flags that they set; a flag on the command line wins:\n" + "\n".join(
        lines
    )
