"""The rooms of the package: which room may import which, and nothing private of another room.

docs/contributing.md shows the same table to readers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import REPO

PACKAGE = REPO / "openvclip"
FILES = sorted(PACKAGE.rglob("*.py"))

# The key may import the values, and the rooms that these may import.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "processes": {"errors"},
    "commands": {"errors"},
    "weights": {"processes"},
    "merging": {"weights"},
    "integrations": {"checkpoints"},
    "checkpoints": {"weights", "commands"},
    "video": {"processes"},
    "towers": {"processes"},
    "models": {"towers", "video", "checkpoints"},
    "prompting": {"models"},
    "evaluation": {"models"},
    "search": {"models"},
    "training": {"evaluation", "prompting"},
    "cli": {"training", "merging", "search"},
    "__main__": {"cli"},
}
WEIGHT_SPACE = {"weights", "merging", "checkpoints"}
FOUNDATION = {"errors", "processes", "commands"}

# Installed with extras, or slow to import: a module of these names is imported inside functions.
IMPORTED_ON_USE = {
    "PIL",
    "accelerate",
    "av",
    "fsspec",
    "gradio",
    "huggingface_hub",
    "lightning",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "open_clip",
    "peft",
    "pyarrow",
    "pytorch_lightning",
    "starlette",
    "timm",
    "torchao",
    "torchcodec",
    "torchvision",
    "tqdm",
    "transformers",
    "uvicorn",
    "vl_convert",
    "webdataset",
}
# One file for each library; the registry of families imports a file when its library is in use.
LIBRARY_FILES = {
    "towers/open_clip.py",
    "towers/open_clip_text.py",
    "towers/timm.py",
    "towers/timm_naflex.py",
    "towers/hf.py",
    "towers/hf_clip_like.py",
    "towers/hf_siglip2.py",
    "models/hugging_face.py",
}


def room_of(file: Path) -> str:
    """The room that a file of the package belongs to; ``__init__`` for the public face."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source: str) -> Iterator[tuple[str, str]]:
    """``(module, name)`` for each name that a source imports from openvclip, also in functions.

    ``from openvclip.video import sampling`` and ``import openvclip.video.sampling`` both name the
    module ``openvclip.video.sampling``, with an empty name in the second case.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("openvclip."):
                    yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            if module == "openvclip":
                yield from ((f"openvclip.{alias.name}", "") for alias in node.names)
            elif module.startswith("openvclip."):
                yield from ((module, alias.name) for alias in node.names)


def rooms_imported(source: str) -> set[str]:
    """The rooms of openvclip that a source imports."""
    return {module.split(".")[1] for module, _ in imports(source)} - {"__version__"}


def private_imports(source: str, room: str) -> list[str]:
    """Private modules and names of other rooms that a source imports or reads as attributes."""
    foreign = [pair for pair in imports(source) if pair[0].split(".")[1] != room]
    private = [
        f"{module}.{name}".rstrip(".")
        for module, name in foreign
        if any(part.startswith("_") and not part.startswith("__") for part in module.split("."))
        or (name.startswith("_") and not name.startswith("__"))
    ]
    modules = {name or module.rpartition(".")[2] for module, name in foreign}
    attributes = [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in {"_asdict", "_fields", "_replace"}  # public in named tuples
    ]
    return private + attributes


def reachable(start: str) -> set[str]:
    """All rooms that a room may import."""
    reached: set[str] = set()
    todo = set(ARROWS[start])
    while todo:
        room = todo.pop()
        reached.add(room)
        todo |= ARROWS[room] - reached
    return reached


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports, read from the sources."""
    result: dict[str, set[str]] = {}
    for file in FILES:
        room = room_of(file)
        if room != "__init__":
            result.setdefault(room, set()).update(rooms_imported(file.read_text()) - {room})
    return result


def test_only_the_foundation_lies_beside_the_rooms() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "errors.py",
        "processes.py",
    }
    assert arrows().keys() == ARROWS.keys()


def test_each_room_imports_only_the_rooms_below() -> None:
    for room, imported in arrows().items():
        assert imported <= reachable(room), room


def test_there_is_no_circle() -> None:
    left = arrows()
    while left:
        free = {room for room, imported in left.items() if not imported & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {room: imported for room, imported in left.items() if room not in free}


def test_the_weight_space_half_never_imports_the_video_half() -> None:
    for room in WEIGHT_SPACE:
        assert reachable(room) <= WEIGHT_SPACE | FOUNDATION, room


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_room_uses_private_names_of_another(file: Path) -> None:
    assert private_imports(file.read_text(), room_of(file)) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_optional_dependencies_are_imported_on_use(file: Path) -> None:
    if str(file.relative_to(PACKAGE)) in LIBRARY_FILES:
        return
    imported = set()
    for node in ast.parse(file.read_text()).body:  # the module level alone
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported & IMPORTED_ON_USE == set()


def test_the_readers_of_imports_see_every_form() -> None:
    source = (
        "import openvclip.video.decode\nfrom openvclip import towers\n"
        "def f():\n    from openvclip.weights.names import listed\n    import json, torch\n"
    )
    assert rooms_imported(source) == {"video", "towers", "weights"}
    source = (
        "from openvclip.video._stream import Stream\nfrom openvclip.video.decoding import _decode\n"
        "from openvclip.video import decoding\ndecoding._SECRET\nimport openvclip.towers._x\n"
        "from openvclip.models._own import fine\n"
    )
    assert sorted(private_imports(source, "models")) == [
        "decoding._SECRET",
        "openvclip.towers._x",
        "openvclip.video._stream.Stream",
        "openvclip.video.decoding._decode",
    ]
