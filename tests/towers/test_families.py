"""The registry of tower families: a new family is one file and one entry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from openvclip import encode_video, expand_temporal_attention
from openvclip.errors import UnsupportedModelError
from openvclip.towers import families
from openvclip.towers.families import REGISTRY, RegistryEntry
from openvclip.towers.family import Family
from tests.helpers import REPO, random_video, tiny_tower
from tests.prompting import towers as prompt_laws
from tests.towers import tower_laws
from tests.towers.tower_laws import Case

FAMILIES = {entry.load.__name__: entry.load() for entry in REGISTRY}


def load_toy() -> Family:
    from tests.towers.toy_family import FAMILY

    return FAMILY


TOY = RegistryEntry("tests", load_toy, "the toy tower")


def make_toy() -> Any:
    from tests.towers.toy_family import make_tower

    return make_tower()


def call(model: Any, x: Tensor) -> Tensor:
    features: Tensor = model(x)
    return features


def checkpoint(model: Any) -> None:
    model.checkpointing = True


CASE = Case("toy", make_toy, call, checkpoint)


@pytest.fixture
def toy_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "REGISTRY", (*REGISTRY, TOY))


def test_a_tower_of_no_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="is a ToyTower, which can't be expanded"):
        expand_temporal_attention(make_toy())


@pytest.mark.usefixtures("toy_family")
@pytest.mark.parametrize("law", tower_laws.LAWS, ids=lambda law: law.__name__)
def test_one_entry_makes_a_new_family_expandable(law: Callable[[Case], None]) -> None:
    law(CASE)


@pytest.mark.usefixtures("toy_family")
@pytest.mark.parametrize("law", prompt_laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "expanded"])
def test_one_entry_makes_a_new_family_take_prompts(
    expanded: bool, law: Callable[[Case, bool], None]
) -> None:
    law(CASE, expanded)


@pytest.mark.usefixtures("toy_family")
def test_the_error_text_names_the_towers_of_each_entry() -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        expand_temporal_attention(nn.Linear(2, 2))
    for entry in (*REGISTRY, TOY):
        assert entry.towers in str(raised.value)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_tower_can_be_prompted_plain_and_expanded(family: Family) -> None:
    assert family.prompted.keys() == {*family.towers.keys(), *family.towers.values()}
    changed = [*family.towers.values(), *family.attentions.values(), *family.prompted.values()]
    assert len(set(changed)) == len(changed)


def test_models_without_frames_are_refused_by_name() -> None:
    """Report 51: open_clip 4 has models for audio; whatever holds one is refused, too."""
    family = replace(FAMILIES["_open_clip"], refused={nn.Linear: "is a model for audio"})
    for model in (nn.Linear(2, 2), nn.Sequential(tiny_tower(), nn.Linear(2, 2))):
        with pytest.raises(UnsupportedModelError, match="Linear is a model for audio, so it can't"):
            family.find_towers(model)


def test_a_library_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error text says why its towers can't be expanded. Other towers can be expanded."""

    def load() -> Family:
        import openvclip.none  # type: ignore[import-not-found]

        return openvclip.none.FAMILY

    entry = RegistryEntry("old", load, "towers of an old library", modules=("timm",))
    monkeypatch.setattr(families, "REGISTRY", (*REGISTRY, entry))
    assert expand_temporal_attention(tiny_tower())(random_video(1, 2)).shape == (1, 2, 8)
    assert encode_video(tiny_tower(), random_video(1, 2)).shape == (1, 8)
    with pytest.raises(UnsupportedModelError, match=r"of old can't be used .* No module"):
        expand_temporal_attention(nn.Linear(2, 2))


def test_importing_the_rooms_imports_no_library() -> None:
    code = (
        "import sys\n"
        "import openvclip.towers, openvclip.prompting\n"
        "libraries = {'open_clip', 'timm', 'transformers', 'torchvision'}\n"
        "assert not libraries & sys.modules.keys(), libraries & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
