"""Files of weights that are read in parts: names and sizes at once, values when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from openvclip.checkpoints.formats import SAFETENSORS, kind_of, read_weights
from openvclip.checkpoints.layout import read_shards
from openvclip.errors import CheckpointError
from openvclip.weights.hashing import WeightsHash
from openvclip.weights.names import canonical_names, require_match
from openvclip.weights.numerics import bytes_of


class WeightInput(ABC):
    """The weights of one model on the disk.

    Attributes:
        path: the file, or the index of a sharded model.
        files: the files that make it up, without the index.
        sizes: canonical names to tensors on the meta device, in the order of the files.
        metadata: texts that came with the weights.
    """

    def __init__(
        self, path: Path, files: list[Path], sizes: dict[str, Tensor], metadata: dict[str, str]
    ) -> None:
        self.path, self.files, self.sizes, self.metadata = path, files, sizes, metadata
        self._hash = WeightsHash(sizes)

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fill ``into`` with the elements of an entry from ``start`` on, in memory order.

        The parts of an entry must be read one after the other, for :meth:`weights_hash`.
        """
        self._fill(name, start, into)
        self._hash.update(name, into)

    @abstractmethod
    def _fill(self, name: str, start: int, into: Tensor) -> None: ...

    def weights_hash(self) -> str:
        """Return :func:`openvclip.weights.weights_hash` of the weights, after all parts were read.

        The hash does not depend on the files in which the weights are stored.
        """
        return self._hash.hexdigest()


def open_inputs(paths: list[Path], stack: ExitStack) -> list[WeightInput]:
    """Open files whose names and shapes agree; ``stack`` closes them.

    Raises:
        CheckpointError, UnsafeCheckpointError: a file is missing, not whole or of another kind.
        StateMismatchError: names or shapes differ from those of the first file.
    """
    inputs: list[WeightInput] = []
    for path in paths:
        if kind_of(path) == SAFETENSORS:
            inputs.append(_TensorFiles(path, stack))
        else:
            inputs.append(_MappedFile(path))
        require_match(
            inputs[0].sizes,
            inputs[-1].sizes,
            f"{path} does not fit together with {paths[0]} (which is expected).",
            "All files must come from the same architecture; `openvclip convert` brings released "
            "checkpoints of different families under the same names.",
        )
    return inputs


class _TensorFiles(WeightInput):
    """A safetensors file, or the shards of a model."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        shards, metadata = read_shards(path)
        sizes: dict[str, Tensor] = {}
        places: dict[str, tuple[FileIO, int]] = {}
        for file, header in shards.items():
            with _read_errors(path):
                opened = stack.enter_context(file.open("rb", buffering=0))
            sizes.update(header.sizes)
            places.update((name, (opened, start)) for name, start in header.starts.items())
        names = canonical_names(sizes)
        super().__init__(
            path, list(shards), {name: sizes[raw] for name, raw in names.items()}, metadata
        )
        self._places = {name: places[raw] for name, raw in names.items()}

    def _fill(self, name: str, start: int, into: Tensor) -> None:
        file, begin = self._places[name]
        data, filled = bytes_of(into), 0
        with _read_errors(self.path):
            file.seek(begin + start * into.itemsize)
            while filled < len(data):
                count = file.readinto(data[filled:])
                if not count:
                    raise OSError("it ends earlier than it did when it was opened")
                filled += count


class _MappedFile(WeightInput):
    """A PyTorch file whose entries are mapped into memory, or a TorchScript archive."""

    def __init__(self, path: Path) -> None:
        found = read_weights(path, mapped=True)
        sizes = {
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in found.weights.items()
        }
        super().__init__(path, [path], sizes, found.metadata)
        self._flat = {name: value.reshape(-1) for name, value in found.weights.items()}

    def _fill(self, name: str, start: int, into: Tensor) -> None:
        into.copy_(self._flat[name][start : start + len(into)])


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"Can't read {path}: {error}.") from error
