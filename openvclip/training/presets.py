"""The published recipes, as defaults of :mod:`examples.finetune` and :mod:`examples.accuracy`.

Source: the papers (Weng et al., ICML 2023; Rasheed et al. and Wasim et al., CVPR 2023). What they
leave open is as the releases have it: a cosine that ends at a hundredth of the learning rate
(ViFi-CLIP) or at zero (Vita-CLIP), 16 frames in supervised training, and a batch of 64 from base
to novel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A recipe as values of flags, by name; flags that it does not name keep their defaults.

    Attributes:
        about: what it is, in a few words.
        training: flags of :mod:`examples.finetune`.
        testing: flags of :mod:`examples.accuracy`.
    """

    about: str
    training: Mapping[str, Any]
    testing: Mapping[str, Any]

    def text(self) -> str:
        """The flags that it sets, as they are typed."""
        return " ".join(_flag(name, value) for name, value in self.training.items())


def _flag(name: str, value: Any) -> str:
    typed = "--" + name.replace("_", "-")
    if value is True:
        return typed
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f'{typed} "{shown}"' if isinstance(value, str) and " " in value else f"{typed} {shown}"


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
    trained = _vifi(
        "ViFi-CLIP on all videos of a data set, tested on 4 x 3 views",
        lr=2.2e-5,
        epochs=30,
        batch_size=512,
        frames=16,
    )
    # Of the three crops each is as high as the frame: the short side is the crop's.
    views = {"frames": 16, "short_side": None, "views": 4, "crops": 3}
    return Preset(trained.about, trained.training, {**trained.testing, **views})


PRESETS: dict[str, Preset] = {
    "open-vclip": Preset("the paper's Open-VCLIP: the defaults", {}, {"views": 3}),
    "vifi-zero-shot": _vifi(
        "ViFi-CLIP on Kinetics-400, for classes of other data sets",
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
        "prompts for a fine-tuned model, on few videos of each class",
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
        "Vita-CLIP: all its prompts for a frozen CLIP",
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
    """What each preset sets, for the help."""
    lines = []
    for name, preset in PRESETS.items():
        lines += [f"  {name}: {preset.about}"]
        lines += [f"      {preset.text()}"] if preset.training else []
    return "presets, and what they set; a flag that is given has the last word:\n" + "\n".join(
        lines
    )
