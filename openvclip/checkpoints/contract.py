"""The contract of a model: the settings that the model was trained with and must be used with.

This module needs no video and no tower. ``openvclip.models.usage`` turns a contract into a
sampling, a transform and an expanded model. :mod:`openvclip.checkpoints.contract_files` reads
contracts from folders and from files of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from openvclip.checkpoints.contract_sections import (
    COUNT,
    NUMBER,
    OBJECT,
    TEXT,
    Base,
    Checked,
    Confidence,
    Expansion,
    Frames,
    Pixels,
    Rule,
)
from openvclip.errors import ContractError, listed

__all__ = [
    "Base",
    "Confidence",
    "Contract",
    "Expansion",
    "Frames",
    "Library",
    "Pixels",
]

VERSION = 1
"""The newest version of the contract that this version of openvclip reads and writes."""

Library = Literal["open_clip", "transformers"]
"""The library that defines the class of a model."""

_MARK = "openvclip"

_SECTIONS: dict[str, type] = {
    "expansion": Expansion,
    "frames": Frames,
    "pixels": Pixels,
    "base": Base,
    "confidence": Confidence,
}
# How a model is used. Two models whose contracts differ here can't be merged without a choice.
USAGE = ("library", "model", "expansion", "frames", "pixels", "templates", "pooling", "text")


def _one_of(literal: Any) -> Rule:
    choices = get_args(literal)
    return Rule(" or ".join(map(repr, choices)), lambda value: value in choices)


def _section(kind: type) -> Rule:
    """Return the rule of a section that can be left out."""
    text = f"openvclip.checkpoints.{kind.__name__}(...), or null"
    return Rule(text, lambda value: value is None or isinstance(value, kind))


def _is_lam(value: Any) -> bool:
    if OBJECT.allows(value):
        return all(map(NUMBER.allows, value.values()))
    return NUMBER.allows(value)


_LAM = Rule("a number, or an object of numbers", _is_lam)
_FILE_NAME = Rule(
    "the name of a file in the folder",
    lambda value: TEXT.allows(value) and Path(value).name == value,
)
_PIXELS = Rule("an object", lambda value: isinstance(value, Pixels))
_FRAMES = Rule("an object", lambda value: isinstance(value, Frames))
_UNKNOWN = Rule("an object", lambda value: isinstance(value, Mapping))
_TEMPLATES = Rule(
    "a list of texts with {} for the class name",
    lambda value: (
        TEXT.list("").allows(value) and len(value) > 0 and all("{}" in text for text in value)
    ),
)


@dataclass(frozen=True)
class Contract(Checked):
    """The settings that a model was trained with and must be used with.

    Attributes:
        library: the library that defines the class of the model.
        model: name of the architecture in this library.
        pixels: the pixels of a frame that the model is given.
        templates: the texts of a class, with ``{}`` for its name.
        expansion: the temporal attention; ``None`` if the model sees each frame alone.
        frames: the frames of a video that the model is given.
        pooling: how the features of frames become the feature of a clip; see
            :func:`openvclip.encode_video`.
        text: the weights that encode the class names: ``"own"`` or ``"original"``.
        weights: name of the file of weights in the folder; ``None`` for the usual name.
        method: name of the method that trained the model.
        lam: weight of the original CLIP in the weights, or such a weight for each pattern of names;
            ``None`` if it is not known.
        base: the original CLIP.
        confidence: the calibration of the model.
        data: facts about the training videos, by name.
        results: accuracies in [0, 1], by name.
        licence: identifier of the licence of the weights, such as ``"mit"``.
        versions: versions of the packages that wrote the model, by name.
        unknown: fields that this version of openvclip does not know. They are written again.

    Raises:
        ContractError: a field has a value of another kind.
    """

    library: Annotated[Library, _one_of(Library)]
    model: Annotated[str, TEXT]
    pixels: Annotated[Pixels, _PIXELS]
    templates: Annotated[tuple[str, ...], _TEMPLATES]
    expansion: Annotated[Expansion | None, _section(Expansion)] = None
    frames: Annotated[Frames, _FRAMES] = field(default_factory=Frames)
    pooling: Annotated[str, TEXT] = "unit_frames"
    text: Annotated[str, TEXT] = "own"
    weights: Annotated[str | None, _FILE_NAME.or_none()] = None
    method: Annotated[str | None, TEXT.or_none()] = None
    lam: Annotated[float | dict[str, float] | None, _LAM.or_none()] = None
    base: Annotated[Base | None, _section(Base)] = None
    confidence: Annotated[Confidence | None, _section(Confidence)] = None
    data: Annotated[Mapping[str, Any], OBJECT] = field(default_factory=dict)
    results: Annotated[Mapping[str, Any], OBJECT] = field(default_factory=dict)
    licence: Annotated[str | None, TEXT.or_none()] = None
    versions: Annotated[Mapping[str, Any], OBJECT] = field(default_factory=dict)
    unknown: Annotated[Mapping[str, Any], _UNKNOWN] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Contract:
        """Return a copy with some attributes changed."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """Return the contract as JSON, with the format and the version first.

        Raises:
            ContractError: a fact is NaN or infinite, or a text is not valid Unicode. JSON can't
                hold either.
        """
        content = asdict(self)
        unknown = content.pop("unknown")
        ordered = {"format": _MARK, "version": VERSION, **_with_unknown(content, unknown)}
        try:
            text = json.dumps(
                ordered, indent=1, ensure_ascii=False, allow_nan=False, default=_plain
            )
            text.encode()
        except (ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
            raise ContractError(
                f"The contract can't be written as JSON ({error}). Look for NaN, infinities and "
                "broken texts in data, results and the other facts."
            ) from error
        return text

    @classmethod
    def from_json(cls, text: str, source: str) -> Contract:
        """Return the contract that a text holds.

        Args:
            text: JSON, as :meth:`to_json` returns it.
            source: the file of the text, for errors.

        Raises:
            ContractError: the text is not JSON, is no contract, was written by a newer version of
                openvclip, or a field has a value of another kind.
        """
        content = _parse(text, source)
        for name in ("format", "version"):
            content.pop(name)
        try:
            known, unknown = _split(cls, content)
            for name, section in _SECTIONS.items():
                if known.get(name) is not None:
                    known[name], more = _read_section(section, name, known[name])
                    unknown |= {name: more} if more else {}
            contract = cls(**known, unknown=unknown)
            contract.to_json()  # Python reads NaN, which JSON does not have
            return contract
        except ContractError as error:
            raise ContractError(f"{source}: {error}") from error

    def difference(self, other: Contract) -> tuple[str, Any, Any] | None:
        """Return the first setting that differs: its name, and its value in each contract.

        Args:
            other: the contract of another model.
        """
        first, second = asdict(self), asdict(other)
        for name in USAGE:
            if first[name] == second[name]:
                continue
            if isinstance(first[name], dict) and isinstance(second[name], dict):
                for key, value in first[name].items():
                    if value != second[name][key]:
                        return f"{name}.{key}", value, second[name][key]
            return name, first[name], second[name]
        return None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContractError(
            f"{source}: is not JSON ({error}); expected the contract of a model, as "
            "VideoCLIP.save_pretrained writes it. Copy the folder again."
        ) from error
    if not isinstance(content, dict) or content.get("format") != _MARK:
        raise ContractError(
            f'{source}: is no contract of openvclip; expected a JSON object with "format": '
            f'"{_MARK}".'
        )
    version: Any = content.get("version")
    if not COUNT.allows(version):
        raise ContractError(f"{source}: version is {version!r}; expected {COUNT.expected}.")
    if version > VERSION:
        raise ContractError(
            f"{source}: the contract has version {version}; this openvclip reads version {VERSION} "
            "and older. Update openvclip: pip install -U openvclip."
        )
    return content


def _read_section(section: type, name: str, content: Any) -> tuple[Any, dict[str, Any]]:
    """Return a section, and its fields that are not known."""
    values, more = _split(section, content, f"{name}.")
    try:
        return section(**values), more
    except ContractError as error:
        raise ContractError(f"{name}.{error}") from error


def _split(section: type, content: Any, prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a section that are known, and the others."""
    if not isinstance(content, dict):
        raise ContractError(f"{prefix.rstrip('.')} is {content!r}; expected an object.")
    known = {entry.name: entry for entry in fields(section) if entry.name != "unknown"}
    required = [n for n, e in known.items() if e.default is e.default_factory is MISSING]
    missing = [prefix + name for name in required if name not in content]
    if missing:
        raise ContractError(f"{listed(missing, 10)} is missing in the contract.")
    values = {key: value for key, value in content.items() if key in known}
    return values, {key: value for key, value in content.items() if key not in known}


def _plain(value: Any) -> Any:
    """Return what JSON stores for an object: a scalar of NumPy or PyTorch is a number."""
    is_scalar = callable(getattr(value, "item", None)) and getattr(value, "shape", None) == ()
    return value.item() if is_scalar else str(value)


def _with_unknown(content: dict[str, Any], unknown: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in unknown.items():
        section = content.get(name)
        if name not in content:
            content[name] = value
        elif isinstance(section, dict) and isinstance(value, Mapping):
            content[name] = {**section, **value}
    return content
