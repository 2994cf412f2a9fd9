"""Hashes of weights: one of all values, and a fingerprint of a few values of each entry.

* :func:`weights_hash` reads all values. The hash is stored in the header of each merged file and in
  the settings of each evaluation. :class:`WeightsHash` computes the same hash from values that
  arrive in parts.
* :func:`fingerprint` reads 64 values of each entry, and each process reads its own shards. The
  state of a regulariser holds the fingerprint of its anchor.

Both identify weights. Neither protects against forgery.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from openvclip.weights.kinds import kind_of, refuse, require_values
from openvclip.weights.names import canonical_model
from openvclip.weights.numerics import bytes_of
from openvclip.weights.shards import backend_device, is_sharded, mesh_groups, own_slices, whole

_SAMPLES = 64  # values of each entry in a fingerprint


class WeightsHash:
    """The hash of a state dict whose values are given in parts.

    The hash is the SHA-256 of one line ``name dtype shape crc32`` for each entry, sorted by name.
    The CRC-32 of the values takes a fifth of the time of their SHA-256.

    Args:
        sizes: tensors with the names, shapes and dtypes of the entries, on any device. Their
            values are not read.
    """

    def __init__(self, sizes: Mapping[str, Tensor]) -> None:
        self._sizes = sizes
        self._checksums = dict.fromkeys(sizes, 0)
        self._runs: dict[str, list[tuple[int, int, int]]] = {name: [] for name in sizes}

    def update(self, name: str, flat: Tensor) -> None:
        """Add the next elements of an entry.

        Args:
            name: name of the entry. Different entries can be updated in different threads.
            flat: the next elements in the order of a contiguous tensor, one-dimensional, on the
                CPU.
        """
        self._checksums[name] = zlib.crc32(bytes_of(flat), self._checksums[name])

    def add_checksum(self, name: str, start: int, count: int, checksum: int) -> None:
        """Add the CRC-32 of some bytes of an entry, in any order, in place of :meth:`update`.

        Args:
            name: name of the entry. Several threads can add checksums.
            start: index of the first byte in the entry.
            count: number of bytes.
            checksum: CRC-32 of the bytes.
        """
        self._runs[name].append((start, count, checksum))

    def hexdigest(self) -> str:
        """Return the hash of all values that were added, as 64 hexadecimal digits."""
        for name, runs in self._runs.items():
            for _, count, checksum in sorted(runs):
                self._checksums[name] = joined_checksum(self._checksums[name], checksum, count)
            runs.clear()
        lines = [
            f"{name} {str(size.dtype).removeprefix('torch.')} {list(size.shape)} "
            f"{self._checksums[name]:08x}\n"
            for name, size in sorted(self._sizes.items())
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def joined_checksum(first: int, second: int, count: int) -> int:
    """Return the CRC-32 of two byte strings, one after the other, from the CRC-32 of each.

    Args:
        first: CRC-32 of the first bytes.
        second: CRC-32 of the second bytes.
        count: number of the second bytes.
    """
    return _product(_power_of_x(8 * count), first) ^ second


# A CRC-32 is a polynomial over GF(2) modulo the polynomial of the CRC. The coefficient of x^0 is
# the highest bit. Bytes that follow multiply the CRC of the first bytes by x^(number of bits).
_POLYNOMIAL = 0xEDB88320
_ONE, _X = 1 << 31, 1 << 30


def _product(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=1024)
def _power_of_x(exponent: int) -> int:
    power, square = _ONE, _X
    while exponent:
        if exponent & 1:
            power = _product(square, power)
        square = _product(square, square)
        exponent >>= 1
    return power


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return a hash of all names, dtypes, shapes and values of a state dict.

    The hash depends on the weights alone. It does not depend on the order of the entries, on their
    devices, on the prefixes of wrappers, on extra state that is not a tensor, or on the file in
    which the weights are stored. It equals the ``weights_hash`` in the recipe of a merged file (see
    :func:`openvclip.interpolate_files`).

    Args:
        state: mapping from names to tensors. Sharded entries are gathered, so every process must
            call this function.

    Returns:
        64 hexadecimal digits: see :class:`WeightsHash` for the definition.

    Raises:
        WeightTypeError: ``state`` is not a mapping from names to tensors, or an entry is sparse,
            on the meta device, or of a quantised dtype.
        StateMismatchError: two names have the same canonical form.
    """
    entries, extra_state = canonical_model(state)
    entries |= {name: value for name, value in extra_state.items() if isinstance(value, Tensor)}
    require_values(entries, "state")
    refuse("quantized", [n for n, v in entries.items() if kind_of(v) == "quantized"], "state")
    hashed = WeightsHash(entries)
    for name, value in entries.items():
        plain = whole(value).resolve_conj().resolve_neg()
        hashed.update(name, plain.cpu().contiguous().reshape(-1))
    return hashed.hexdigest()


def fingerprint(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> str:
    """Return a hash of the names, the shapes and up to 64 evenly spaced values of each entry.

    This distinguishes original from fine-tuned weights without reading all values. The fingerprint
    of a sharded model equals that of the same model on one device. The processes exchange only the
    64 values, so every process must call this function.

    Args:
        values: this process's part of each entry, as a plain tensor.
        parameters: the model's parameters, plain or sharded, which define the whole shapes and the
            shards. They include all names of ``values``.

    Returns:
        32 hexadecimal digits.
    """
    names = sorted(values)
    samples = [_samples(values[name], parameters[name]) for name in names]
    joined = torch.cat(samples)
    for group in mesh_groups(parameters.values()):
        joined = joined.to(backend_device(parameters.values()))
        distributed.all_reduce(joined, distributed.ReduceOp.MAX, group)
    counts = [len(sample) for sample in samples]
    digest = hashlib.blake2b(digest_size=16)
    for name, sample in zip(names, joined.cpu().split(counts), strict=True):
        digest.update(f"{name} {list(parameters[name].shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _samples(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the sampled values in float64 on the CPU. Each complex value gives two of them.

    The samples that other processes hold are ``-inf``. All other numbers are larger than ``-inf``,
    so a maximum over the processes restores them.
    """
    numel = parameter.numel()
    if value.is_floating_point() and value.dtype.itemsize == 1:
        value = value.float()  # PyTorch 2.7 has no indexing of float8
    index = torch.arange(0, numel, max(1, numel // _SAMPLES), device=value.device)[:_SAMPLES]
    if not is_sharded(parameter):
        return _as_doubles(value.reshape(-1)[index]).reshape(-1)
    coordinates = torch.stack(torch.unravel_index(index, parameter.shape))
    start = coordinates.new_tensor([part.start for part in own_slices(parameter)])
    local_coordinates = coordinates - start[:, None]
    size = local_coordinates.new_tensor(value.shape)[:, None]
    is_local = ((local_coordinates >= 0) & (local_coordinates < size)).all(dim=0)
    own = _as_doubles(value[tuple(local_coordinates[:, is_local])])
    samples = own.new_full((len(index), *own.shape[1:]), -torch.inf)
    samples[is_local.cpu()] = own
    return samples.reshape(-1)


def _as_doubles(values: Tensor) -> Tensor:
    values = values.detach().cpu()
    if values.is_complex():
        return torch.view_as_real(values.resolve_conj().to(torch.complex128))
    return values.double()
