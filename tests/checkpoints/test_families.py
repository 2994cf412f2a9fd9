"""The table of checkpoint families: a new family needs one entry and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import openvclip
from openvclip.checkpoints import families
from openvclip.checkpoints.families import FAMILIES, Family
from openvclip.checkpoints.translation import Source
from openvclip.errors import ActivationWarning
from tests.checkpoints.test_conversion import clip_state, prefixed, same_entries
from tests.helpers import tiny_clip


def _translate(names: Collection[str]) -> dict[str, Source]:
    return {name.removeprefix("backbone."): Source((name,)) for name in names}


NEW = Family(
    "A new family",
    lambda names, torchscript: "backbone.visual.conv1.weight" in names,
    _translate,
    quick_gelu=True,
    ignored=("*.step",),
)


def test_a_new_family_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, file = clip_state(), tmp_path / "w"
    save_file({**prefixed(state, "backbone."), "backbone.step": torch.tensor(3)}, file)
    assert openvclip.inspect_checkpoint(file).family == "unknown"
    monkeypatch.setattr(families, "FAMILIES", (NEW, *FAMILIES))
    info = openvclip.inspect_checkpoint(file)
    assert (info.family, info.converted, info.ignored) == (NEW.name, True, ("backbone.step",))
    assert (info.left_over, info.missing, info.vision_layers) == ((), (), 3)
    same_entries(openvclip.load_checkpoint(file), state)
    openvclip.convert_checkpoint(file, tmp_path / "out.safetensors")
    for path in (file, tmp_path / "out.safetensors"):
        with pytest.warns(ActivationWarning, match="A new family"):
            openvclip.load_checkpoint(path, tiny_clip())


def test_every_family_has_its_own_name_and_the_last_one_accepts_all_names() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert FAMILIES[-1].recognise(frozenset(), False)
    assert not FAMILIES[-1].converted
