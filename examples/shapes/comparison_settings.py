"""What the comparison compares: the methods, the settings, and the sizes of the runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from examples.shapes.clips import ClipSettings
from examples.shapes.world import class_names
from openvclip.prompting.vifi import Trained
from openvclip.training.recipe import Recipe

LAMBDAS = (0.0, 0.3, 0.5, 0.7)
"""Weights of CLIP with which the fine-tuned models are tried."""

Family = Literal["fine-tune", "vifi", "vifi-prompts", "vita"]
"""Methods that share a learning rate."""

RATES: dict[Family, float] = {"fine-tune": 5e-4, "vifi": 1e-3, "vifi-prompts": 4e-3, "vita": 1.6e-2}
"""The learning rates, the best of those that were tried on data of another seed."""

CANDIDATES: dict[Family, tuple[float, ...]] = {
    "fine-tune": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "vifi": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "vifi-prompts": (1e-3, 4e-3, 1.6e-2, 4e-2),
    "vita": (1e-3, 4e-3, 1.6e-2, 4e-2),
}
"""What was tried; the first of :data:`METHODS` in each family stands for it."""

TUNING_SEED = 100
"""Seed of the clips, order and prompts with which learning rates are tried."""


@dataclass(frozen=True)
class Method:
    """One way of making a video model of CLIP.

    Attributes:
        family: whose learning rate it takes; None where nothing is learned.
        expanded: with attention over neighbouring frames.
        templates: the mean of unit features, and the templates of the zero-shot classifier, as in
            Open-VCLIP. Otherwise the mean's direction, and ``"a photo of a {}."`` or text prompts,
            as in ViFi-CLIP and Vita-CLIP.
        train: what is fine-tuned, for :func:`openvclip.prompting.fine_tune`.
        regularised: with IWR, and with SWA's average in the place of the last weights.
        bridged: with the second half of the steps for ViFi-CLIP's prompts.
        vita: arguments of :func:`openvclip.prompting.attach_vita`.
        interpolated: the result is tried in mixtures with CLIP too.
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


def _alone(part: str) -> Method:
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
    "Vita-CLIP, global prompts": _alone("global_prompts"),
    "Vita-CLIP, local prompts": _alone("local_prompts"),
    "Vita-CLIP, summary prompt": _alone("summary_prompt"),
    "Vita-CLIP, time embedding": _alone("time_embedding"),
    "Vita-CLIP, text prompts": _alone("text_prompts"),
}
"""The methods by name, in the order of the tables."""

VIFI_PROMPTS = {"vision_prompts": 8, "text_prompts": 8, "vision_depth": 4, "text_depth": 3}
"""Bridge and prompt: fresh prompts in every layer of both towers, as in its few-shot recipe."""


def base_and_novel() -> tuple[list[str], list[str]]:
    """The seen classes in two halves, by the rule of ViFi-CLIP's base-to-novel lists.

    Where all classes have the same number of training clips, as here and in HMDB-51, it makes the
    first half in alphabetical order novel. Here this divides the shapes, and both halves have all
    actions.
    """
    names = class_names("seen")
    novel = set(sorted(names)[: len(names) // 2])
    return [n for n in names if n not in novel], [n for n in names if n in novel]


@dataclass(frozen=True)
class Setting:
    """What is trained on, for how long, and what the result is tried on.

    Attributes:
        steps: optimizer steps, the same for all methods.
        tests: what is tried: ``seen``, ``base`` and ``novel`` (from the list ``seen_test``) or
            ``unseen``.
        shots: clips of each class; None for all.
        base: train on the base classes, not on all seen ones.
    """

    steps: int
    tests: tuple[str, ...]
    shots: int | None = None
    base: bool = False


@dataclass(frozen=True)
class Training:
    """The numbers of :class:`openvclip.training.recipe.Recipe` that all methods share."""

    batch_size: int = 16
    weight_decay: float = 0.01
    clip_grad_norm: float = 1.0
    alpha_max: float = 0.6
    iwr_weight: float = 0.5

    def recipe(self, lr: float, seed: int) -> Recipe:
        """The recipe with a learning rate, which falls to a hundredth by the end."""
        return Recipe(lr=lr, warmup_start_lr=lr / 100, end_lr=lr / 100, seed=seed, **asdict(self))


@dataclass(frozen=True)
class Sizes:
    """The size of the comparison.

    Attributes:
        clips: the data, but for the seed.
        settings: by name, in the order in which they are run.
        training: the same for all methods; the learning rates are :data:`RATES`.
        methods: names of the methods.
        tuning: how learning rates are tried.
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
