"""A CLIP inside another module: its prefix is removed, and nothing is claimed of its activation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import openvclip
from openvclip.errors import CheckpointError, StateMismatchError
from tests.checkpoints.test_conversion import (
    averaged,
    clip_state,
    hugging_face,
    openai_state,
    prefixed,
    quick_clip,
    same_entries,
    training,
    with_settings,
)
from tests.helpers import snapshot, tiny_clip

PREFIXES = (
    *("model.", "clip.", "net.", "student.", "ema_model.", "backbone.clip."),
    *("_forward_module.model.", "model.module.", "module.model._orig_mod."),
)


def lightning(state: dict[str, Any]) -> dict[str, Any]:
    return {"epoch": 3, "pytorch-lightning_version": "2.6.6", "state_dict": state, "callbacks": {}}


# Report 05 (open_clip#771): the prefix `model.` says nothing about the activation.
@pytest.mark.parametrize(
    ("prefix", "form"), [(prefix, lightning) for prefix in PREFIXES] + [("model.", dict)]
)
def test_a_prefix_is_removed_and_the_activation_is_unknown(
    tmp_path: Path, prefix: str, form: Any
) -> None:
    state, file = clip_state(), tmp_path / "w"
    torch.save(form(prefixed(state, prefix)), file)
    info = openvclip.inspect_checkpoint(file)
    assert (info.quick_gelu, info.left_over, info.missing) == (False, (), ())
    assert (info.vision_layers, info.embed_dim) == (3, 8)
    assert "Open-VCLIP" not in str(info)
    assert "activation   unknown: GELU or QuickGELU" in str(info)
    model = tiny_clip(seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_entries(openvclip.load_checkpoint(file), state)
        openvclip.load_checkpoint(file, model)
        converted = openvclip.convert_checkpoint(file, tmp_path / "out.safetensors")
        openvclip.load_checkpoint(tmp_path / "out.safetensors", tiny_clip(seed=9))
    same_entries(dict(model.state_dict()), state)
    assert not converted.quick_gelu
    assert not openvclip.inspect_checkpoint(tmp_path / "out.safetensors").quick_gelu


@pytest.mark.parametrize("content", [averaged, training])
def test_the_layout_of_the_released_trainer_has_a_known_activation(
    tmp_path: Path, content: Any
) -> None:
    torch.save(content(clip_state()), tmp_path / "w")
    assert openvclip.inspect_checkpoint(tmp_path / "w").quick_gelu
    torch.save({**averaged(clip_state()), "epoch": 3, "seed": 1}, tmp_path / "w")
    info = openvclip.inspect_checkpoint(tmp_path / "w")
    assert (info.quick_gelu, info.prefix) == (False, "model.")


def test_settings_of_openai_show_quickgelu_under_a_prefix_too(tmp_path: Path) -> None:
    torch.save(lightning(prefixed(with_settings(openai_state()), "clip.")), tmp_path / "w")
    assert openvclip.inspect_checkpoint(tmp_path / "w").quick_gelu
    same_entries(openvclip.load_checkpoint(tmp_path / "w"), openai_state())


@pytest.mark.parametrize("quick", [True, False])
def test_the_code_of_an_archive_shows_its_activation(tmp_path: Path, quick: bool) -> None:
    model = quick_clip() if quick else tiny_clip(seed=3)
    inputs = torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        torch.jit.trace(model, inputs, check_trace=False).save(tmp_path / "w")
    info = openvclip.inspect_checkpoint(tmp_path / "w")
    assert (info.format, info.quick_gelu) == ("TorchScript", quick)
    same_entries(openvclip.load_checkpoint(tmp_path / "w"), dict(model.state_dict()))


def test_hugging_face_names_under_a_prefix(tmp_path: Path) -> None:
    state = clip_state()
    save_file(prefixed(hugging_face(state), "model."), tmp_path / "w")
    info = openvclip.inspect_checkpoint(tmp_path / "w")
    assert (info.family, info.prefix) == ("Hugging Face CLIP", "model.")
    same_entries(openvclip.load_checkpoint(tmp_path / "w"), state)


def test_several_models_are_chosen_by_name(tmp_path: Path) -> None:
    student, teacher, file = clip_state(), dict(tiny_clip(seed=4).state_dict()), tmp_path / "w"
    both = {**prefixed(student, "student."), **prefixed(teacher, "teacher.")}
    torch.save({"state_dict": both}, file)
    info = openvclip.inspect_checkpoint(file)
    assert (info.family, info.prefixes) == ("unknown", ("student.", "teacher."))
    model = tiny_clip(seed=9)
    before = snapshot(model)
    for call in (
        lambda: openvclip.load_checkpoint(file, model),
        lambda: openvclip.load_checkpoint(file, model, allow_unexpected="*"),
        lambda: openvclip.convert_checkpoint(file, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=r"2 models, .*'student\.', 'teacher\.'"):
            call()
    same_entries(dict(model.state_dict()), before)
    for pattern, expected in (("teacher.*", student), ("student.*", teacher)):
        openvclip.load_checkpoint(file, model, allow_unexpected=pattern)
        same_entries(dict(model.state_dict()), expected)
        same_entries(openvclip.load_checkpoint(file, allow_unexpected=pattern), expected)
    same_entries(openvclip.load_checkpoint(file), both)  # a module of its own keeps its names


def test_a_model_that_has_the_prefix_itself_keeps_it(tmp_path: Path) -> None:
    for prefix in ("model", "module"):
        module = nn.ModuleDict({prefix: tiny_clip(seed=3), "head": nn.Linear(8, 2)})
        openvclip.save_checkpoint(module.state_dict(), tmp_path / "w")
        other = nn.ModuleDict({prefix: tiny_clip(seed=9), "head": nn.Linear(8, 2)})
        openvclip.load_checkpoint(tmp_path / "w", other)
        same_entries(dict(other.state_dict()), dict(module.state_dict()))


def test_a_file_for_a_submodule_names_the_submodule(tmp_path: Path) -> None:
    openvclip.save_checkpoint(clip_state(), tmp_path / "w")
    module = nn.ModuleDict({"clip": tiny_clip(), "head": nn.Linear(8, 2)})
    with pytest.raises(StateMismatchError, match=r"Pass the submodule .* model\.clip\."):
        openvclip.load_checkpoint(tmp_path / "w", module)


def test_a_file_without_any_entry_of_the_model_is_not_loaded(tmp_path: Path) -> None:
    save_file({"other.w": torch.zeros(1)}, tmp_path / "w")
    for missing in ((), "*"):
        with pytest.raises(StateMismatchError, match="No entry of the file has a name of the"):
            openvclip.load_checkpoint(
                tmp_path / "w", tiny_clip(), allow_missing=missing, allow_unexpected="*"
            )


def test_what_stands_beside_the_prefix_is_left_over(tmp_path: Path) -> None:
    state = clip_state()
    for prefix in ("model.", "clip."):
        torch.save({**prefixed(state, prefix), "head.weight": torch.zeros(2)}, tmp_path / "w")
        with pytest.raises(StateMismatchError) as caught:
            openvclip.load_checkpoint(tmp_path / "w", tiny_clip(seed=9))
        assert (caught.value.missing, caught.value.unexpected) == ([], ["head.weight"])
        same_entries(openvclip.load_checkpoint(tmp_path / "w", allow_unexpected="head.*"), state)


def test_any_model_is_found_under_its_prefix(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(lightning(prefixed(dict(net.state_dict()), "net.")), tmp_path / "w")
    other = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    openvclip.load_checkpoint(tmp_path / "w", other)
    same_entries(dict(other.state_dict()), dict(net.state_dict()))


class Compiled(nn.Module):
    """A wrapper with the attribute of ``torch.compile``, whose import takes seconds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


# Report 30 (OpenTAD#44): AveragedModel stores a counter beside names that start with `module.`.
@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (nn.Module.eval, nn.Module.eval),  # no wrapper
        (Compiled, nn.DataParallel),
        (nn.DataParallel, Compiled),
        (nn.DataParallel, nn.Module.eval),
    ],
)
def test_the_state_of_an_averaged_model_is_the_state_of_its_model(
    tmp_path: Path, inside: Any, outside: Any
) -> None:
    model, other = tiny_clip(seed=3), tiny_clip(seed=4)
    average = AveragedModel(inside(model))
    average.update_parameters(model)
    average.update_parameters(other)
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    expected = {name: (a.double() + b.double()) / 2 for (name, a), b in pairs}
    raw = outside(average).state_dict()
    assert any(name.endswith("n_averaged") for name in raw)
    torch.save({"model_state_dict": raw, "epoch": 3}, tmp_path / "w")
    states = [
        openvclip.load_checkpoint(tmp_path / "w"),
        openvclip.load_checkpoint(tmp_path / "w", tiny_clip(seed=9)),
        openvclip.interpolate(model.state_dict(), raw, 0.0),
    ]
    for state in states:
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name].double(), value, atol=1e-6, rtol=1e-6)
    # The average is a wrapper of its model, so its weights have the names of the model.
    target, start = outside(AveragedModel(inside(tiny_clip(seed=9)))), snapshot(model)
    openvclip.interpolate_into(target, start, snapshot(other), 0.5)
    expected = openvclip.interpolate(start, snapshot(other), 0.5)
    same_entries(openvclip.interpolate(start, target.state_dict(), 0.0), expected)


def test_a_counter_of_ones_own_is_an_entry() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model.head = nn.Linear(2, 2)
    model.register_buffer("n_averaged", torch.tensor(3))
    assert "n_averaged" in openvclip.interpolate(snapshot(model), snapshot(model), 0.5)
    wrapped = nn.DataParallel(nn.Linear(2, 2))
    wrapped.module.register_buffer("n_averaged", torch.tensor(3))
    assert "n_averaged" in openvclip.interpolate(snapshot(wrapped), snapshot(wrapped), 0.5)
