"""The methods, the settings and the sizes of the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from examples.shapes.clips import ClipSettings
from examples.shapes.world import class_names
from openvclip.prompting.vifi import Trained
from openvclip.training.recipe import Recipe

LAMBDAS = (0.0, 0.3, 0.5, 0.7)
"""The interpolation weights λ of the fine-tuned models."""

Family = Literal["fine-tune", "vifi", "vifi-prompts", "vita"]
"""A family of methods that share a learning rate."""

RATES: dict[Family, float] = {"fine-tune": 5e-4, "vifi": 1e-3, "vifi-prompts": 4e-3, "vita": 1.6e-2}
"""The learning rates: the best of :data:`CANDIDATES` on data of another seed."""

CANDIDATES: dict[Family, tuple[float, ...]] = {
    "fine-tune": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "vifi": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "vifi-prompts": (1e-3, 4e-3, 1.6e-2, 4e-2),
    "vita": (1e-3, 4e-3, 1.6e-2, 4e-2),
}
"""The learning rates to try, with the first method of each family in :data:`METHODS`."""

TUNING_SEED = 100
"""Seed of the clips, their order and the prompts when learning rates are tried."""


@dataclass(frozen=True)
class Method:
    """A method that turns CLIP into a video model.

    Attributes:
        family: family of the method, which has a learning rate. ``None`` for a method without
            training.
        expanded: whether the attention is expanded to neighbouring frames.
        templates: whether the classifier is the classifier of Open-VCLIP: the mean of normalised
            frame features, and several templates. Otherwise the mean is normalised, and the texts
            are ``"a photo of a {}."`` or text prompts, as in ViFi-CLIP and Vita-CLIP.
        train: towers to fine-tune, for :func:`openvclip.prompting.fine_tune`.
        regularised: whether IWR is used, and the average of SWA instead of the last weights.
        bridged: whether the second half of the steps trains the prompts of ViFi-CLIP.
        vita: arguments of :func:`openvclip.prompting.attach_vita`.
        interpolated: whether interpolations of the result with CLIP are evaluated too.
    """

    family: Family | None
    expanded: bool = False
    templates: bool = False
    train: Trained | None = None
    regularised: bool = False
    bridged: bool = False
    vita: Mapping[str, Any] | None = None
    interpolated: bool = False


_ALL = {"global_prompts": 8, "local_prompts": True, "summary_prompt": True}
_ALL |= {"time_embedding": True, "text_prompts": 8}
_NONE = {"global_prompts": 0, "local_prompts": False, "summary_prompt": False}
_NONE |= {"time_embedding": False, "text_prompts": 0}


def _only(part: str) -> Method:
    return Method("vita", vita={**_NONE, part: _ALL[part]})


def _regularised(family: Family, **options: Any) -> Method:
    return Method(family, regularised=True, interpolated=True, **options)


_OPEN_VCLIP: dict[str, Any] = {"expanded": True, "templates": True, "train": "image"}

METHODS: dict[str, Method] = {
    "CLIP": Method(None, templates=True),
    "CLIP, pooled as in ViFi-CLIP": Method(None),
    "FINE-TUNE": Method("fine-tune", **_OPEN_VCLIP, interpolated=True),
    "Open-VCLIP": _regularised("fine-tune", **_OPEN_VCLIP),
    "ViFi-CLIP": Method("vifi", train="both", interpolated=True),
    "ViFi-CLIP, image tower": Method("vifi", train="image"),
    "ViFi-CLIP, text tower": Method("vifi", train="text"),
    "bridge and prompt": Method("vifi-prompts", train="both", bridged=True),
    "ViFi-CLIP + IWR + SWA": _regularised("vifi", train="both"),
    "Vita-CLIP": Method("vita", vita=_ALL),
    "Vita-CLIP, global prompts": _only("global_prompts"),
    "Vita-CLIP, local prompts": _only("local_prompts"),
    "Vita-CLIP, summary prompt": _only("summary_prompt"),
    "Vita-CLIP, time embedding": _only("time_embedding"),
    "Vita-CLIP, text prompts": _only("text_prompts"),
}
"""The methods by name, in the order of the tables."""

VIFI_PROMPTS = {"vision_prompts": 8, "text_prompts": 8, "vision_depth": 4, "text_depth": 3}
"""The prompts of "bridge and prompt": in every layer of both towers, as in the few-shot recipe."""


def base_and_novel() -> tuple[list[str], list[str]]:
    """Return the base and the novel classes: the seen classes, divided by the rule of ViFi-CLIP.

    If all classes have the same number of training clips, as here and in HMDB-51, the first half in
    alphabetical order is novel. Here the rule divides the shapes, so both halves have all actions.
    """
    names = class_names("seen")
    novel = set(sorted(names)[: len(names) // 2])
    return [n for n in names if n not in novel], [n for n in names if n in novel]


@dataclass(frozen=True)
class Setting:
    """The training clips, the number of steps, and the test clips.

    Attributes:
        steps: number of optimizer steps, the same for all methods.
        tests: names of the test clips: ``seen``, ``base``, ``novel`` (all from the list
            ``seen_test``) and ``unseen``.
        shots: number of training clips of each class; ``None`` for all clips.
        base: whether to train on the base classes instead of all seen classes.
    """

    steps: int
    tests: tuple[str, ...]
    shots: int | None = None
    base: bool = False


@dataclass(frozen=True)
class Training:
    """The values of :class:`openvclip.training.recipe.Recipe` that all methods share."""

    batch_size: int = 16
    weight_decay: float = 0.01
    clip_grad_norm: float = 1.0
    alpha_max: float = 0.6
    iwr_weight: float = 0.5

    def recipe(self, lr: float, seed: int) -> Recipe:
        """Return the recipe for a learning rate, which falls to a hundredth of its value."""
        return Recipe(lr=lr, warmup_start_lr=lr / 100, end_lr=lr / 100, seed=seed, **asdict(self))


@dataclass(frozen=True)
class Sizes:
    """The size of the comparison.

    Attributes:
        clips: the data set; each run sets the seed.
        settings: the settings by name, in the order of the runs.
        training: values that all methods share; the learning rates are in :data:`RATES`.
        methods: names of the methods.
        tuning: setting in which learning rates are tried.
    """

    clips: ClipSettings
    settings: dict[str, Setting]
    training: Training = field(default_factory=Training)
    methods: tuple[str, ...] = tuple(METHODS)
    tuning: Setting = field(default_factory=lambda: Setting(160, ("seen", "development")))


def _settings(closed: int, base: int, few: int, shots: tuple[int, ...]) -> dict[str, Setting]:
    return {
        "closed-set and zero-shot": Setting(closed, ("seen", "unseen")),
        "base-to-novel": Setting(base, ("base", "novel"), shots=max(shots), base=True),
        **{f"{n} shots": Setting(few, ("seen",), shots=n) for n in shots},
    }


FULL = Sizes(ClipSettings(train=1024, test=512), _settings(320, 160, 80, (2, 4, 8, 16)))
SMOKE = Sizes(
    ClipSettings(train=64, test=64),
    _settings(2, 2, 2, (1,)),
    methods=("CLIP", "Open-VCLIP", "bridge and prompt", "Vita-CLIP"),
    tuning=Setting(2, ("seen", "development")),
)
