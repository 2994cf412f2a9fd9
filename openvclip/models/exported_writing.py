"""Write exported programs to files with the texts that belong to them, and check the files."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvclip.checkpoints import Contract, atomic_path, write_errors
from openvclip.checkpoints.contract_files import CONTRACT_KEY
from openvclip.checkpoints.exported_files import EXTRA_FILE, read_exported_texts
from openvclip.errors import (
    CheckpointError,
    MissingDependencyError,
    UnsupportedModelError,
    reason_of,
)
from openvclip.models.building import building
from openvclip.models.exported_graph import weight_bytes
from openvclip.models.versions import package_versions

FACTS_KEY = "openvclip_export"
"""The name of :class:`ExportFacts` among the texts of an exported model."""

# A protobuf message holds less than 2 GiB; the graph needs some of this.
_MOST_INLINE = 2**31 - 2**26
_TOLERANCE = 1e-4
_PACKAGES = {".onnx": ("onnx", "onnxscript"), ".pt2": ()}

Check = Callable[[Callable[[Tensor], Tensor]], None]
"""A function that compares a function of the inputs with PyTorch."""


@dataclass(frozen=True)
class ExportFacts:
    """What an exported model is, beside its contract.

    Attributes:
        part: the part of the model; see :data:`openvclip.models.exported_parts.Part`.
        pixels: the frames that it takes: ``"float"`` or ``"uint8"``.
        weights: the numbers in which it stores its weights: ``"float32"`` or ``"int8"``.
        frames: the number of frames of a clip that it takes; ``None`` for any number.
        labels: the labels of its logits; ``None`` if it returns features.
        logit_scale: the factor of the cosines in the logits; ``None`` if the model has none.
        versions: the packages that wrote it.
    """

    part: str
    pixels: str = "float"
    weights: str = "float32"
    frames: int | None = None
    labels: tuple[str, ...] | None = None
    logit_scale: float | None = None
    versions: Mapping[str, str] | None = None

    def texts(self, contract: Contract | None) -> dict[str, str]:
        """Return the texts of a file that has these facts and a contract, by key."""
        content = {**asdict(self), "versions": dict(package_versions())}
        texts = {FACTS_KEY: json.dumps(content, ensure_ascii=False)}
        if contract is not None:
            # The field names a file of weights, which stays where it is.
            texts[CONTRACT_KEY] = contract.with_(weights=None).to_json()
        return texts


def read_export(path: str | os.PathLike[str]) -> ExportFacts:
    """Return what an exported model is: its part, its pixels and its labels.

    :func:`openvclip.checkpoints.read_contract` returns the contract of the model. Neither function
    reads the weights or needs the packages that run the file.

    Args:
        path: a file that :func:`openvclip.models.export_model` wrote.

    Raises:
        CheckpointError: the file can't be read, or was not written by ``export_model``.
    """
    return facts_of_texts(read_exported_texts(path), path)


def facts_of_texts(texts: Mapping[str, str], path: str | os.PathLike[str]) -> ExportFacts:
    """Return what an exported model is, from the texts that the file carries.

    Args:
        texts: the texts by key.
        path: the file, for errors.

    Raises:
        CheckpointError: see :func:`read_export`.
    """
    text = texts.get(FACTS_KEY)
    if text is None:
        raise CheckpointError(
            f"{os.fspath(path)}: has no text {FACTS_KEY!r}; expected a file that "
            "openvclip.models.export_model wrote."
        )
    known = {field.name for field in fields(ExportFacts)}
    try:
        values = {name: value for name, value in json.loads(text).items() if name in known}
        if values.get("labels") is not None:
            values["labels"] = tuple(values["labels"])
        return ExportFacts(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{os.fspath(path)}: its text {FACTS_KEY!r} is damaged ({error}). Export the model "
            "again, or copy the file again."
        ) from error


@dataclass(frozen=True)
class Program:
    """A program that PyTorch exported.

    Attributes:
        program: the ``torch.export.ExportedProgram``.
        names: the name of the input and the name of the output.
        axes: the names of the open axes of the input.
        expected: inputs, and what the model returns for them.
    """

    program: Any
    names: tuple[str, str]
    axes: dict[int, str]
    expected: list[tuple[Tensor, Tensor]]


def require_packages(suffix: str, weights: str) -> None:
    """Raise :class:`MissingDependencyError` if a package that the export needs is missing."""
    needed = {"export": _PACKAGES[suffix], "int8": ("torchao",) if weights == "int8" else ()}
    for extra, packages in needed.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependencyError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed, "
                f'but needed for this export. Install with: pip install "openvclip[{extra}]"'
            )


def write_pt2(program: Program, path: Path, texts: Mapping[str, str], check: Check | None) -> None:
    """Write an archive of ``torch.export`` atomically.

    Args:
        program: the program.
        path: the file.
        texts: the texts that the file carries, by key.
        check: compares the file with PyTorch before it gets its name.
    """
    extra = {EXTRA_FILE.format(key): text for key, text in texts.items()}
    with write_errors(path), atomic_path(path) as temporary, _folder(path) as folder, quiet():
        written = folder / path.name  # torch.export.save wants the ending .pt2
        torch.export.save(program.program, written, extra_files=extra)
        if check is not None:
            check(torch.export.load(written).module())
        os.replace(written, temporary)


def write_onnx(
    program: Program,
    path: Path,
    texts: Mapping[str, str],
    check: Check | None,
    opset: int | None = None,
) -> None:
    """Write an ONNX file atomically.

    The weights of a large model are in a second file, whose name is new each time: the older ONNX
    file fits its older weights until the new ONNX file has taken its place.

    Args:
        program: the program.
        path: the file.
        texts: the texts that the file carries, by key.
        check: compares the file with PyTorch before it gets its name.
        opset: version of the operators.

    Raises:
        UnsupportedModelError: PyTorch can't translate the program.
    """
    converted = _converted(program, opset)
    converted.model.metadata_props.update(texts)
    large = weight_bytes(program.program) > _MOST_INLINE
    with write_errors(path), atomic_path(path) as temporary, _folder(path) as folder:
        stem = f"{path.stem}-{secrets.token_hex(4)}"
        written = folder / f"{stem}.onnx"
        data = written.with_name(f"{written.name}.data")
        with quiet():
            converted.save(written, external_data=large)
        if check is not None and importlib.util.find_spec("onnxruntime") is not None:
            check(_runnable(written, program.names[0]))
        os.replace(written, temporary)
        if data.exists():
            with atomic_path(path.with_name(data.name)) as place:
                os.replace(data, place)
    for older in path.parent.glob(f"{glob.escape(path.stem)}-{'[0-9a-f]' * 8}.onnx.data"):
        if older.name != data.name:
            older.unlink()


def require_same_results(program: Program, function: Callable[[Tensor], Tensor]) -> None:
    """Check that a function returns what the model returns.

    Raises:
        UnsupportedModelError: a value differs by more than 1e-4 of the largest value.
    """
    for given, expected in program.expected:
        result = function(given)
        difference = float((result - expected).abs().max())
        largest = max(1.0, float(expected.abs().max()))
        if not difference <= _TOLERANCE * largest:  # also NaN
            raise UnsupportedModelError(
                f"The exported model differs from the model by {difference:.2g} for an input of "
                f"shape {list(given.shape)}; expected at most {_TOLERANCE * largest:.2g}. The file "
                "was not written. Check the weights for NaN, or try another version of PyTorch."
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the notes of the exporters about constants and deprecated functions."""
    with building(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside a file."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder)


def _runnable(path: Path, name: str) -> Callable[[Tensor], Tensor]:
    """Return the function of an ONNX file.

    Raises:
        UnsupportedModelError: onnxruntime can't load the file.
    """
    try:
        return _onnx_function(path, name)
    except Exception as error:  # the errors of onnxruntime have no common class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModelError(
            f"onnxruntime can't load the exported model ({reason[0][:300]}). Leave opset out, or "
            "update onnxruntime."
        ) from error


def _converted(program: Program, opset: int | None) -> Any:
    """Return the ``torch.onnx.ONNXProgram``, without the source lines of the model."""
    with quiet():
        try:
            converted = torch.onnx.export(
                program.program,
                dynamo=True,
                optimize=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=(program.axes,),
                input_names=[program.names[0]],
                output_names=[program.names[1]],
            )
        except Exception as error:
            raise UnsupportedModelError(
                f"PyTorch can't translate the model to ONNX ({reason_of(error)}). Export a .pt2 "
                "file, or update torch and onnxscript."
            ) from error
        assert converted is not None
        version = converted.model.opset_imports.get("")
        if opset is not None and version != opset:
            raise UnsupportedModelError(
                f"opset={opset}: PyTorch writes the model with version {version}. Give "
                f"opset={version}, or leave opset out."
            )
        for node in _nodes(converted.model):
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
    return converted


def _nodes(model: Any) -> Iterator[Any]:
    from onnxscript import ir

    graphs: Sequence[Any] = [model.graph, *model.functions.values()]
    for graph in graphs:
        yield from ir.traversal.RecursiveGraphIterator(graph)


def _onnx_function(path: Path, name: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])
