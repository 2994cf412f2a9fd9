"""Arguments of a wrong type or range: each class says what was given and what is expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from openvclip.errors import OpenVCLIPError
from openvclip.training import FeatureDistillation, OriginalCLIP, Recipe, TextEnergy
from openvclip.weights import (
    EMATracker,
    GaussianTracker,
    InterpolatedWeightRegularizer,
    L2ToAnchor,
    LAWATracker,
    LowRank,
    SWATracker,
)
from tests.helpers import tiny_clip
from tests.training.regulariser_models import words

MODEL = nn.Linear(3, 3)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), 0.1)
NO_NUMBERS = ["1", None, math.nan, True, [1], object(), torch.zeros(3), 1j]
NUMBERS = [*NO_NUMBERS, math.inf, -1, 10**400]
WHOLE = [*NUMBERS, 1.5, 0, 2**64]
SEEDS = ["1", None, 1.5, True, [1], torch.zeros(3), 2**64]
DEVICES = ["gpu", "cuda:-1", 1.5, True, [1], object()]
OBJECTS = ["1", 1, [1], torch.zeros(3), object()]


def energy(**changes: Any) -> TextEnergy:
    return TextEnergy(
        **{"original": OriginalCLIP(tiny_clip()), "tokenizer": words, "weight": 1, **changes}
    )


def made(cls: Callable[..., Any], **needed: Any) -> Callable[..., Any]:
    return lambda **changes: cls(**{**needed, **changes})


iwr = made(InterpolatedWeightRegularizer, model=MODEL, optimizer=OPTIMIZER)
distillation = made(FeatureDistillation, width=4)
gaussian = made(GaussianTracker, model=MODEL, mu=1, sigma=1)
MAKERS: list[tuple[Callable[..., Any], dict[str, list[Any]]]] = [
    (
        made(L2ToAnchor, model=MODEL, weight=1.0),
        {
            "model": OBJECTS,
            "anchor": OBJECTS,
            "weight": NUMBERS,
            "missing": ["warn", None],
        },
    ),
    (
        distillation,
        {"width": WHOLE, "weight": NUMBERS, "residual": NUMBERS, "seed": SEEDS},
    ),
    (
        energy,
        {
            "original": [*OBJECTS, MODEL],
            "tokenizer": [1, "1"],
            "weight": NUMBERS,
            "n_texts": WHOLE,
            "n_tokens": WHOLE,
            "seed": SEEDS,
            "vocabulary": [
                [],
                "abc",
                [1.5],
                [-1],
                [10**6],
                [True],
                [None],
                object(),
                [[1], [1, 2]],
            ],
        },
    ),
    (
        iwr,
        {
            "model": OBJECTS,
            "optimizer": OBJECTS,
            "wrapper": OBJECTS,
            "anchor": OBJECTS,
            "anchor_device": DEVICES,
            "interval": [*NUMBERS, (0.5, 0.1), (0, "1"), (0, 2), (False, True)],
            "weight": NUMBERS,
            "share": [*NUMBERS, 0, 1.1],
            "every": WHOLE,
            "seed": SEEDS,
            "missing": ["warn", None],
        },
    ),
    (
        gaussian,
        {
            "model": OBJECTS,
            "mu": [*NO_NUMBERS, math.inf, 10**400],
            "sigma": [*NO_NUMBERS, -1, 0],
            "start": [*NUMBERS, 1.5, 2**64],
            "every": WHOLE,
            "device": [*DEVICES, ""],
            "dtype": [torch.int64, torch.complex64, "float32", None],
        },
    ),
    (made(EMATracker, model=MODEL), {"decay": [*NUMBERS, 1], "every": WHOLE}),
    (made(LowRank, up=torch.zeros(2, 1), down=torch.zeros(1, 2)), {"scale": ["1", None, math.nan]}),
    (made(LAWATracker, model=MODEL), {"k": WHOLE}),
    (
        Recipe,
        {
            "method": ["x", None, 1],
            "distill": NUMBERS,
            "text_energy": NUMBERS,
            "averages_per_epoch": WHOLE,
        },
    ),
]
CASES = [
    (make, name, value)
    for make, all_ in MAKERS
    for name, values in all_.items()
    for value in values
]


def test_every_wrong_argument_has_an_error_of_the_library_that_names_it() -> None:
    raw = []
    for make, name, value in CASES:
        try:
            make(**{name: value})
            raw.append(f"{name}={value!r} of {make} is accepted")
        except OpenVCLIPError as error:
            if name not in ("model", "anchor") and name not in str(error):
                raw.append(f"{name}={value!r}: {error}")
        except Exception as error:
            raw.append(f"{name}={value!r}: {type(error).__name__}: {error}")
    assert not raw, "\n".join(raw)


STATES = [iwr(), gaussian(), SWATracker(MODEL), EMATracker(MODEL), energy(weight=1)]
DAMAGED = ["1", None, math.nan, -1, [1], object(), torch.zeros(3)]


@pytest.mark.parametrize("owner", STATES, ids=lambda owner: type(owner).__name__)
def test_a_wrong_state_is_refused(owner: Any) -> None:
    good = owner.state_dict()
    for state in (*OBJECTS, None, {}, {"x": 1}, {**good, "x": 1}, {**good, 1: 1}):
        with pytest.raises(
            OpenVCLIPError, match=rf"state(_dict\(\))? of an? {type(owner).__name__}"
        ):
            owner.load_state_dict(state)


@pytest.mark.parametrize("cls", [SWATracker, LAWATracker])
def test_whole_numbers_of_numpy_are_saved_as_those_of_python(cls: Any, tmp_path: Path) -> None:
    more = {"k": np.int64(2)} if cls is LAWATracker else {}
    tracker = cls(MODEL, start=np.int64(0), every=np.int64(1), **more)
    tracker.update(MODEL)
    regulariser = iwr(every=np.int64(2))
    torch.save([tracker.state_dict(), regulariser.state_dict()], tmp_path / "state.pt")
    saved, of_regulariser = torch.load(tmp_path / "state.pt", weights_only=True)
    tracker.load_state_dict(saved)
    regulariser.load_state_dict(of_regulariser)


def averages() -> list[Any]:
    trackers = [SWATracker(MODEL), gaussian(), EMATracker(MODEL, decay=0.5)]
    for tracker in trackers:
        tracker.update(MODEL)
    return trackers


@pytest.mark.parametrize(
    "owner", [iwr(), energy(weight=1), *averages()], ids=lambda owner: type(owner).__name__
)
def test_a_damaged_state_changes_nothing(owner: Any) -> None:
    def plain(state: Any) -> Any:
        if isinstance(state, dict):
            return {name: plain(value) for name, value in state.items()}
        return state.tolist() if isinstance(state, torch.Tensor) else state

    good = owner.state_dict()
    for name in good:
        for value in DAMAGED:
            if isinstance(good[name], float) and isinstance(value, int):
                continue  # of these settings, only the kind is checked
            with pytest.raises(OpenVCLIPError, match="state"):
                owner.load_state_dict({**good, name: value})
            assert plain(owner.state_dict()) == plain(good)
    owner.load_state_dict(good)


def test_features_that_are_no_tensors() -> None:
    x = torch.randn(2, 4)
    one, two = distillation(), energy(weight=1)
    for wrong in ("1", 1, [1], object(), x.long()):
        with pytest.raises(OpenVCLIPError, match=r"^images is .*; expected features"):
            one.loss(wrong, x)
        with pytest.raises(OpenVCLIPError, match=r"^original_texts is .*; expected features"):
            one.loss(x, x, x, wrong)
        with pytest.raises(OpenVCLIPError, match=r"^original_images is .*; expected features"):
            two.loss(x, wrong, x)
        with pytest.raises(OpenVCLIPError, match=r"^texts is .*; expected features"):
            two.loss(x, x, wrong)
    with pytest.raises(OpenVCLIPError, match=r"texts \[4\]; expected"):
        two.loss(x, x, x[0])


def test_numbers_of_other_libraries_are_numbers() -> None:
    import numpy as np

    assert iwr(seed=np.int64(3))._draws.alpha((0, 1)) == iwr(seed=3)._draws.alpha((0, 1))
    assert iwr(weight=np.float32(0.5), every=np.int64(2), share=torch.tensor(0.5)).weight == 0.5
    assert L2ToAnchor(MODEL, weight=torch.tensor(0.5)).weight == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-(2**63), 2**63, 2**64 - 1])
def test_every_seed_of_pytorch_is_a_seed(seed: int) -> None:
    """``torch.initial_seed()`` is often above 2**63."""
    uniform = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert iwr(seed=seed)._draws.alpha((0.0, 1.0)) == uniform.item()
