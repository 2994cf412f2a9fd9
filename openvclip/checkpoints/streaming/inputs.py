"""Models on disk that are read in parts. Names and sizes are read first, values on request."""

from __future__ import annotations

import os
import threading
import zlib
from abc import ABC, abstractmethod
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from openvclip.checkpoints.adapter_files import is_adapter, read_adapter, require_whole
from openvclip.checkpoints.extra_state import EXTRA_STATE_KEY, encode, names_of_objects
from openvclip.checkpoints.file_kinds import SAFETENSORS, kind_of_file
from openvclip.checkpoints.formats import read_weights
from openvclip.checkpoints.layout import fill, map_entries, read_errors
from openvclip.checkpoints.sharding import open_model
from openvclip.checkpoints.task_vectors import (
    TASK_VECTOR_KEY,
    base_hash_of,
    is_task_vector,
    require_model,
)
from openvclip.errors import CheckpointError
from openvclip.weights.adapters import factor_names
from openvclip.weights.averageable import require_combinable
from openvclip.weights.hashing import WeightsHash
from openvclip.weights.kinds import quantized_names, require_values
from openvclip.weights.names import canonical_names, is_extra_state, require_match
from openvclip.weights.numerics import bytes_of, compute_dtype, is_interpolable


class WeightInput(ABC):
    """The weights of one model on disk.

    Attributes:
        path: the path of the file, or of the index of a sharded model.
        files: the files that hold the weights, without the index.
        sizes: canonical names to tensors on the meta device, in the order of the files.
        metadata: the texts that the files hold beside the weights.
        extra_state: the extra state of modules, as safetensors files store it.
        base_hash: the hash of the original model, if the file is a task vector and the hash is
            known.
        threads_can_read: whether several threads can call :meth:`read_part` at the same time.
    """

    base_hash: str | None = None
    threads_can_read = False

    def __init__(
        self, path: Path, files: list[Path], sizes: dict[str, Tensor], metadata: dict[str, str]
    ) -> None:
        self.path, self.files, self.metadata = path, files, metadata
        self.sizes = {name: size for name, size in sizes.items() if not is_extra_state(name)}
        self.extra_state: dict[str, Tensor] = {}
        self._hash = WeightsHash(self.sizes)

    @abstractmethod
    def mapped(self) -> dict[str, Tensor]:
        """Return all weights, mapped into memory. Values are read when they are first used."""

    def _set_own_extra_state(self, extra: dict[str, Tensor]) -> None:
        # The hash is that of openvclip.weights.weights_hash: with tensors, without objects.
        objects = set(names_of_objects(self.metadata))
        tensors = {name: value for name, value in extra.items() if name not in objects}
        self.extra_state = extra
        self._hash = WeightsHash({**self.sizes, **tensors})
        for name, value in tensors.items():
            self._hash.update(name, value.contiguous().reshape(-1))

    def take_extra_state(self, other: WeightInput) -> None:
        """Give the extra state of another model, which is not merged, instead of one's own."""
        extra = {name: _size_of(value) for name, value in other.extra_state.items()}
        self.sizes = {**self.sizes, **extra}  # a new dict: the hash is of the weights alone
        self.extra_state = dict(other.extra_state)
        texts = {EXTRA_STATE_KEY: other.metadata.get(EXTRA_STATE_KEY)}
        known = {**self.metadata, **texts}
        self.metadata = {key: text for key, text in known.items() if text is not None}

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fill ``into`` with consecutive elements of an entry, in memory order.

        The parts of an entry must be read in order, because :meth:`weights_hash` needs a checksum.

        Args:
            name: canonical name of the entry.
            start: index of the first element to read.
            into: tensor of one dimension and of the dtype of the entry.
        """
        if name in self.extra_state:
            into.copy_(self.extra_state[name].reshape(-1)[start : start + len(into)])
            return
        self._fill(name, start, into)
        self._hash.update(name, into)

    def read_part(self, name: str, start: int, into: Tensor, checksum: int) -> int:
        """Fill ``into`` as :meth:`read` does, and return the checksum of a run of parts.

        Several threads can read different runs. In a run, each part begins at the end of the part
        before. Call :meth:`add_checksum` after the last part.

        Args:
            name: canonical name of the entry.
            start: index of the first element to read.
            into: tensor of one dimension and of the dtype of the entry.
            checksum: result for the part before, 0 for the first part.
        """
        if name in self.extra_state:
            self.read(name, start, into)
            return 0
        self._fill(name, start, into)
        return zlib.crc32(bytes_of(into), checksum)

    def add_checksum(self, name: str, start: int, count: int, checksum: int) -> None:
        """Keep the checksum of ``count`` elements of an entry for :meth:`weights_hash`."""
        if name not in self.extra_state:
            itemsize = self.sizes[name].itemsize
            self._hash.add_checksum(name, start * itemsize, count * itemsize, checksum)

    @abstractmethod
    def _fill(self, name: str, start: int, into: Tensor) -> None: ...

    def weights_hash(self) -> str:
        """Return :func:`openvclip.weights.weights_hash` of the weights, after all parts were read.

        The hash does not depend on how the weights are distributed over files.
        """
        return self._hash.hexdigest()


def _size_of(value: Tensor) -> Tensor:
    # torch.empty_like on the meta device would import sympy, which takes half a second.
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def open_inputs(paths: list[Path], stack: ExitStack) -> list[WeightInput]:
    """Open models whose names and shapes are the same.

    The extra state of modules is not merged. All inputs give the extra state of the last model.

    Args:
        paths: the files of the models. Folders of LoRA adapters are fine-tunes of the first model,
            and task vectors are changes of the first model.
        stack: closes the files.

    Raises:
        CheckpointError, UnsafeCheckpointError: a file is missing, incomplete or of another kind, or
            the first file is an adapter or a task vector.
        StateMismatchError: the names or shapes of a model differ from those of the first model.
        WeightTypeError: the entries can't be merged one by one.
    """
    inputs: list[WeightInput] = []
    for path in paths:
        if inputs and is_adapter(path):
            # Inputs are read in several threads, so the base is opened once more.
            inputs.append(_AdapterInput(path, _whole_input(paths[0], stack)))
        else:
            require_whole(path)
            source = _whole_input(path, stack)
            if inputs and is_task_vector(source.metadata):
                source = _VectorInput(source, _whole_input(paths[0], stack))
            require_model(source.metadata, path)
            inputs.append(source)
        require_match(
            inputs[0].sizes,
            inputs[-1].sizes,
            f"The files do not fit together. Expected: the names and shapes in {paths[0]}. "
            f"Given: {path}.",
            "All files must come from the same architecture. `openvclip convert` renames the "
            "entries of released checkpoints, so that different families have the same names.",
        )
    _require_mergeable(inputs)
    for source in inputs:
        source.take_extra_state(inputs[-1])
    return inputs


def entry_names(path: Path) -> list[str]:
    """Return the canonical names of the entries of a model on disk, without extra state.

    Args:
        path: the file of the model, or the index of a sharded model.

    Raises:
        CheckpointError, UnsafeCheckpointError: the file is missing, incomplete or of another kind.
    """
    with ExitStack() as stack:
        return list(_whole_input(path, stack).sizes)


def require_own_base(inputs: list[WeightInput]) -> None:
    """Check that task vectors are added to their original model, after all parts were read.

    Raises:
        CheckpointError: the first input is another model than the original of a task vector.
    """
    for source in inputs:
        if source.base_hash not in (None, inputs[0].weights_hash()):
            raise CheckpointError(
                f"{source.path} is the change of another model than {inputs[0].path}: the weights "
                "of its original model have another hash. Give its original model, or give "
                "--override (override=True) to add the change all the same."
            )


def _whole_input(path: Path, stack: ExitStack) -> WeightInput:
    if kind_of_file(path) == SAFETENSORS:
        return _SafetensorsInput(path, stack)
    return _MappedInput(path)


def _require_mergeable(inputs: list[WeightInput]) -> None:
    """Check that the merge of the entries, one by one, is the merge of the models.

    Values are read only if there are quantised weights or factors of adapters.
    """
    special = any(quantized_names(source.sizes) for source in inputs)
    if special or factor_names(inputs[0].sizes):
        states = [source.mapped() for source in inputs]
        require_combinable(states, [str(source.path) for source in inputs], "merge the files")


class _SafetensorsInput(WeightInput):
    """A model in a safetensors file, or in several shards."""

    threads_can_read = True

    def __init__(self, path: Path, stack: ExitStack) -> None:
        files, metadata = open_model(path, stack)
        sizes: dict[str, Tensor] = {}
        places: dict[str, tuple[FileIO, int]] = {}
        for opened in files:
            sizes.update(opened.header.sizes)
            starts = opened.header.starts
            places.update((name, (opened.file, start)) for name, start in starts.items())
        names = canonical_names(sizes)
        super().__init__(
            path,
            [opened.path for opened in files],
            {name: sizes[file_name] for name, file_name in names.items()},
            metadata,
        )
        self._places = {name: places[file_name] for name, file_name in names.items()}
        self._opened, self._file_names = files, names
        self._lock = threading.Lock()
        if any(map(is_extra_state, names)):
            values = self._map()
            self._set_own_extra_state({n: values[n] for n in names if is_extra_state(n)})

    def _map(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for opened in self._opened:
            values.update(map_entries(opened))
        return {name: values[file_name] for name, file_name in self._file_names.items()}

    def mapped(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._map().items() if name in self.sizes}

    def _fill(self, name: str, start: int, into: Tensor) -> None:
        file, begin = self._places[name]
        with read_errors(self.path):
            position, target = begin + start * into.itemsize, bytes_of(into)
            if hasattr(os, "preadv"):
                fill(file, target, position)
            else:  # Windows: a file has one position for all threads
                with self._lock:
                    file.seek(position)
                    fill(file, target)


class _MappedInput(WeightInput):
    """A model in a PyTorch file, which is mapped into memory, or in a TorchScript archive."""

    threads_can_read = True

    def __init__(self, path: Path) -> None:
        file = read_weights(path, mapped=True)
        require_values(file.weights, str(path))
        encoded, texts = encode(file.extra)
        sizes = {name: _size_of(value) for name, value in file.weights.items()}
        super().__init__(path, list(file.files), sizes, {**file.metadata, **texts})
        self._set_own_extra_state(encoded)
        self._weights = file.weights
        self._flat = {name: value.reshape(-1) for name, value in self._weights.items()}

    def mapped(self) -> dict[str, Tensor]:
        return self._weights

    def _fill(self, name: str, start: int, into: Tensor) -> None:
        into.copy_(self._flat[name][start : start + len(into)])


class _AdapterInput(WeightInput):
    """A LoRA fine-tune: the weights of its base model, to which the products are added in parts.

    Args:
        path: the folder of the adapter.
        base: the base model, which no other thread reads.
    """

    def __init__(self, path: Path, base: WeightInput) -> None:
        read = read_adapter(path)
        objects = {k: text for k, text in base.metadata.items() if k == EXTRA_STATE_KEY}
        sizes = {name: size for name, size in base.sizes.items() if name not in base.extra_state}
        super().__init__(read.file.path, [read.file.path], sizes, {**read.file.metadata, **objects})
        self._base, self._adapter = base, read.adapter
        self._model = read.adapter.on(base.mapped())  # checks that the adapter fits
        self._set_own_extra_state(dict(base.extra_state))

    def mapped(self) -> dict[str, Tensor]:
        return dict(self._model)

    def _fill(self, name: str, start: int, into: Tensor) -> None:
        value = self._adapter.values.get(name)
        update = self._adapter.updates.get(name)
        if value is None:
            self._base._fill(name, start, into)
        else:
            into.copy_(value.reshape(-1)[start : start + len(into)])
        if update is not None and len(into):
            columns = update.down.shape[1]
            first, last = start // columns, -(-(start + len(into)) // columns)
            change = update.rows(first, last).reshape(-1)
            change = change[start - first * columns :][: len(into)]
            dtype = torch.promote_types(compute_dtype(into.dtype), change.dtype)
            into.copy_(into.to(dtype).add_(change))


class _VectorInput(WeightInput):
    """A task vector: the weights of the original model, to which the changes are added in parts.

    Args:
        vector: the file of the task vector.
        base: the original model, which no other thread reads.
    """

    def __init__(self, vector: WeightInput, base: WeightInput) -> None:
        not_kept = (TASK_VECTOR_KEY, EXTRA_STATE_KEY)  # the vector has no extra state of its own
        kept = {key: text for key, text in vector.metadata.items() if key not in not_kept}
        objects = {k: text for k, text in base.metadata.items() if k == EXTRA_STATE_KEY}
        sizes = {name: size for name, size in base.sizes.items() if name not in base.extra_state}
        super().__init__(vector.path, vector.files, sizes, {**kept, **objects})
        require_match(
            {name: size for name, size in sizes.items() if is_interpolable(size)},
            vector.sizes,
            f"The task vector {vector.path} does not fit the model {base.path}. Expected: the "
            "names and shapes of the floating-point entries of the model.",
        )
        self._base, self._vector = base, vector
        self.base_hash = base_hash_of(vector.metadata)
        self._set_own_extra_state(dict(base.extra_state))

    def mapped(self) -> dict[str, Tensor]:
        changes = self._vector.mapped()
        return {
            name: (value + changes[name]).to(value.dtype) if name in changes else value
            for name, value in self._base.mapped().items()
        }

    def _fill(self, name: str, start: int, into: Tensor) -> None:
        self._base._fill(name, start, into)
        if name in self._vector.sizes and len(into):
            change = torch.empty(len(into), dtype=self._vector.sizes[name].dtype)
            self._vector._fill(name, start, change)
            dtype = torch.promote_types(compute_dtype(into.dtype), compute_dtype(change.dtype))
            into.copy_(into.to(dtype).add_(change.to(dtype)))
