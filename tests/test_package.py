"""The package as a whole: what importing costs, who imports whom, docstrings, the error family."""

from __future__ import annotations

import builtins
import doctest
import importlib
import importlib.metadata
import inspect
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import openvclip
from openvclip import errors
from tests.helpers import GOLDEN, REPO

PACKAGE = REPO / "openvclip"
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))


def source(module: Path) -> str:
    """The text of one of the ``MODULES``."""
    return (PACKAGE / module.with_suffix(".py")).read_text(encoding="utf-8")


NOT_AT_IMPORT = (
    "open_clip",
    "timm",
    "transformers",
    "torchvision",
    "torchcodec",
    "av",
    "matplotlib",
    "tqdm",
    "webdataset",
    "tensorboard",
    "accelerate",
    "lightning",
    "huggingface_hub",
    "PIL",
)


@pytest.fixture(scope="module")
def loaded_modules() -> list[set[str]]:
    """The modules of a fresh process after torch, after openvclip, and after use of all rooms."""
    names = ", ".join(f"openvclip.{room}" for room in sorted(ROOMS))
    report = "print(json.dumps(sorted(sys.modules)))"
    codes = ("import torch", "import openvclip", names)
    code = "\n".join(["import json, sys", *(f"{code}\n{report}" for code in codes)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO
    )
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def test_importing_openvclip_costs_little_beyond_torch(loaded_modules: list[set[str]]) -> None:
    bare, full, _ = loaded_modules
    heavy = {name for name in full - bare if name.split(".")[0] in NOT_AT_IMPORT}
    assert heavy == set()
    assert "openvclip.towers.open_clip" not in full
    foreign = {name for name in full - bare if not name.startswith("openvclip")}
    assert len(foreign) < 30, sorted(foreign)


# --- the public face ---------------------------------------------------------------------------


PUBLIC = {
    "VIDEO_TEMPLATES",
    "Boundary",
    "CheckpointInfo",
    "EMATracker",
    "GaussianTracker",
    "InterpolatedWeightRegularizer",
    "L2ToAnchor",
    "LAWATracker",
    "Lambda",
    "OpenVCLIPError",
    "Prediction",
    "SWATracker",
    "VideoCLIP",
    "ZeroShotClassifier",
    "average_files",
    "checkpoints",
    "convert_checkpoint",
    "encode_video",
    "evaluation",
    "expand_temporal_attention",
    "inspect_checkpoint",
    "integrations",
    "interpolate",
    "interpolate_files",
    "interpolate_into",
    "load_checkpoint",
    "merge_files",
    "merging",
    "models",
    "predict",
    "prompting",
    "restore_spatial_attention",
    "save_checkpoint",
    "search",
    "towers",
    "training",
    "update_statistics",
    "video",
    "weights",
}
FOLDERS = {m.parts[0] for m in MODULES if m.name == "__init__" and len(m.parts) == 2}
ROOMS = FOLDERS - {"cli", "commands"}


def test_the_public_names() -> None:
    assert set(openvclip.__all__) == PUBLIC
    assert len(set(openvclip.__all__)) == len(openvclip.__all__)


def test_rooms_load_on_first_use(loaded_modules: list[set[str]]) -> None:
    """``import openvclip`` alone is enough for ``openvclip.video.read_clip``."""
    bare, _, loaded = loaded_modules
    assert {f"openvclip.{room}" for room in ROOMS} <= loaded
    assert {name.split(".")[0] for name in loaded - bare}.isdisjoint(NOT_AT_IMPORT)


def test_every_room_is_a_public_name() -> None:
    assert ROOMS <= PUBLIC
    assert set(dir(openvclip)) >= ROOMS
    with pytest.raises(AttributeError, match="module 'openvclip' has no attribute 'attic'"):
        openvclip.attic  # noqa: B018


def public_names() -> list[tuple[str, str]]:
    """``(package, name)`` for each ``__all__`` of openvclip and of its rooms."""
    packages = [".".join(("openvclip", *m.parts[:-1])) for m in MODULES if m.name == "__init__"]
    return [
        (package, name)
        for package in packages
        for name in getattr(importlib.import_module(package), "__all__", ())
    ]


def documented(name: str, thing: Any) -> Iterator[tuple[str, Any, str | None]]:
    """``(name, function or class, docstring)`` of a public object and of its public members."""
    yield name, thing, thing.__doc__
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            function = value.fget if isinstance(value, property) else value
            function = getattr(function, "__func__", function)
            if not member.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{member}", function, function.__doc__


@pytest.mark.parametrize(("package", "name"), public_names())
def test_public_names_have_docstrings(package: str, name: str) -> None:
    thing = getattr(importlib.import_module(package), name)
    if inspect.ismodule(thing):
        assert thing.__doc__
    elif inspect.isclass(thing) or inspect.isfunction(thing):
        assert thing.__module__.startswith("openvclip.")
        for full_name, _, text in documented(name, thing):
            assert text, f"{package}.{full_name}"


@pytest.mark.parametrize(("package", "name"), public_names())
def test_docstrings_of_functions_name_every_parameter(package: str, name: str) -> None:
    thing = getattr(importlib.import_module(package), name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    for full_name, function, text in documented(name, thing):
        if not inspect.isfunction(function):
            continue
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = {
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind not in variadic and parameter.name not in ("self", "cls")
        }
        unnamed = {p for p in parameters if not re.search(rf"\b{p}\b", text or "")}
        assert not unnamed, f"{package}.{full_name}"


WITH_EXAMPLES = [module for module in MODULES if ">>> " in source(module)]


def a_released_file(folder: Path) -> dict[str, Any]:
    """The file and the video of the example of ``load_released``."""
    tensors = load_file(GOLDEN / "vifi_vision_prompt_T4.safetensors")
    prefix = "weights."
    weights = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    torch.save({"model": weights}, folder / "vifi_clip.pth")
    return {"torch": torch, "video": tensors["input"]}


NEEDS: dict[str, Callable[[Path], dict[str, Any]]] = {"prompting/released": a_released_file}


@pytest.mark.parametrize("module", WITH_EXAMPLES, ids=lambda module: module.as_posix())
def test_the_examples_in_docstrings_run(
    module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = NEEDS[module.as_posix()](tmp_path) if module.as_posix() in NEEDS else {}
    loaded = importlib.import_module(".".join(("openvclip", *module.parts)))
    result = doctest.testmod(loaded, extraglobs=names)
    assert result.attempted == source(module).count(">>> ")
    assert result.failed == 0


def test_there_are_examples_in_docstrings() -> None:
    assert {"weights/interpolation", "weights/lambdas", "towers/temporal"} <= {
        module.as_posix() for module in WITH_EXAMPLES
    }


def test_the_version_is_written_once() -> None:
    """setuptools reads ``__version__`` without importing the package, and torch with it."""
    project = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^dynamic = \["version"\]', project, re.MULTILINE)
    assert 'version = { attr = "openvclip.__version__" }' in project
    read = (
        "import sys\nsys.modules['torch'] = None\n"
        "from setuptools.config.expand import read_attr\n"
        "print(read_attr('openvclip.__version__', root_dir='.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", read], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert done.stdout.strip() == openvclip.__version__
    assert importlib.metadata.version("openvclip") == openvclip.__version__


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


# --- errors ------------------------------------------------------------------------------------

FAMILY = [
    thing
    for thing in vars(errors).values()
    if inspect.isclass(thing)
    and issubclass(thing, BaseException)
    and thing.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", FAMILY)
def test_errors_are_of_one_family_and_built_in_ones_too(kind: type[BaseException]) -> None:
    assert kind.__doc__
    if issubclass(kind, Warning):
        assert issubclass(kind, UserWarning)
        return
    assert issubclass(kind, errors.OpenVCLIPError)
    if kind is not errors.OpenVCLIPError:
        of_python = [base for base in kind.__mro__ if base.__module__ == builtins.__name__]
        assert of_python[0] is not Exception


@pytest.mark.parametrize("kind", FAMILY)
def test_errors_come_through_pickle(kind: type[BaseException]) -> None:
    """Worker processes send their errors that way."""
    copied = pickle.loads(pickle.dumps(kind("what went wrong")))
    assert type(copied) is kind
    assert "what went wrong" in str(copied)


def test_a_mismatch_comes_through_pickle_with_all_it_says() -> None:
    error = errors.StateMismatchError(
        "They differ.",
        missing=["b", "a"],
        unexpected={"c"},
        mismatched=[("d", [2], (3, 1))],
        hint="Look.",
    )
    text = (
        "They differ.\nLook.\n  missing (2): a, b\n  unexpected (1): c\n"
        "  shape of d: expected [2], given [3, 1]"
    )
    copied = pickle.loads(pickle.dumps(error))
    for one in (error, copied):
        assert str(one) == text
        assert (one.missing, one.unexpected) == (["a", "b"], ["c"])
        assert one.mismatched == [("d", (2,), (3, 1))]
        assert isinstance(one, KeyError)
