"""Models on disk that are read in parts. Names and sizes are read first, values on request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from openvclip.checkpoints.formats import SAFETENSORS, kind_of, read_weights
from openvclip.checkpoints.layout import fill, read_errors
from openvclip.checkpoints.sharding import open_model
from openvclip.weights.hashing import WeightsHash
from openvclip.weights.names import canonical_names, require_match
from openvclip.weights.numerics import bytes_of


class WeightInput(ABC):
    """The weights of one model on disk.

    Attributes:
        path: the path of the file, or of the index of a sharded model.
        files: the files that hold the weights, without the index.
        sizes: canonical names to tensors on the meta device, in the order of the files.
        metadata: the texts that the files hold beside the weights.
    """

    def __init__(
        self, path: Path, files: list[Path], sizes: dict[str, Tensor], metadata: dict[str, str]
    ) -> None:
        self.path, self.files, self.sizes, self.metadata = path, files, sizes, metadata
        self._hash = WeightsHash(sizes)

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fill ``into`` with consecutive elements of an entry, in memory order.

        The parts of an entry must be read in order, because :meth:`weights_hash` needs a checksum.

        Args:
            name: canonical name of the entry.
            start: index of the first element to read.
            into: tensor of one dimension and of the dtype of the entry.
        """
        self._fill(name, start, into)
        self._hash.update(name, into)

    @abstractmethod
    def _fill(self, name: str, start: int, into: Tensor) -> None: ...

    def weights_hash(self) -> str:
        """Return :func:`openvclip.weights.weights_hash` of the weights, after all parts were read.

        The hash does not depend on how the weights are distributed over files.
        """
        return self._hash.hexdigest()


def open_inputs(paths: list[Path], stack: ExitStack) -> list[WeightInput]:
    """Open models whose names and shapes are the same.

    Args:
        paths: the files of the models.
        stack: closes the files.

    Raises:
        CheckpointError, UnsafeCheckpointError: a file is missing, incomplete or of another kind.
        StateMismatchError: the names or shapes of a model differ from those of the first model.
    """
    inputs: list[WeightInput] = []
    for path in paths:
        if kind_of(path) == SAFETENSORS:
            inputs.append(_SafetensorsInput(path, stack))
        else:
            inputs.append(_MappedInput(path))
        require_match(
            inputs[0].sizes,
            inputs[-1].sizes,
            f"The files do not fit together. Expected: the names and shapes in {paths[0]}. "
            f"Given: {path}.",
            "All files must come from the same architecture. `openvclip convert` renames the "
            "entries of released checkpoints, so that different families have the same names.",
        )
    return inputs


class _SafetensorsInput(WeightInput):
    """A model in a safetensors file, or in several shards."""

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

    def _fill(self, name: str, start: int, into: Tensor) -> None:
        file, begin = self._places[name]
        with read_errors(self.path):
            file.seek(begin + start * into.itemsize)
            fill(file, bytes_of(into))


class _MappedInput(WeightInput):
    """A model in a PyTorch file, which is mapped into memory, or in a TorchScript archive."""

    def __init__(self, path: Path) -> None:
        file = read_weights(path, mapped=True)
        sizes = {
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in file.weights.items()
        }
        super().__init__(path, [path], sizes, file.metadata)
        self._flat = {name: value.reshape(-1) for name, value in file.weights.items()}

    def _fill(self, name: str, start: int, into: Tensor) -> None:
        into.copy_(self._flat[name][start : start + len(into)])
