"""Read the files of a decoder back and hold them against what was meant, before anyone gets them.

What was meant is kept as checksums, so memory holds no more than some rows, however large the model is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from onnx_bitnet import files, reference
from onnx_bitnet.errors import OutputError
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.report import Progress
from onnx_bitnet.rewrite.packed import PackedNode, packed_nodes

_WEIGHTS_AT_ONCE, _BYTES_AT_ONCE = 1 << 20, 1 << 26


class Fingerprint:
    """A checksum of a packed matrix by codes, scales and zero points, whatever form these are stored in.

    Args:
        k: inputs.
        block_size: inputs that share a scale; 0 means all.
    """

    def __init__(self, k: int, block_size: int) -> None:
        self._shape = k, len(reference.group_starts(k, block_size))
        self._hashes = [hashlib.sha256() for _ in range(3)]

    def add(self, codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> None:
        """Append rows: codes uint8 (P, rows, K), scale and zero point (P, rows or 1, G or 1)."""
        shape = *codes.shape[:2], self._shape[1]
        parameters = (np.broadcast_to(part.astype(np.float32), shape) for part in (scale, zero_point))
        for made, part in zip(self._hashes, (codes, *parameters), strict=True):
            made.update(np.ascontiguousarray(part.swapaxes(0, 1)).data)

    def digest(self) -> str:
        """Return what is equal for equal matrices."""
        return " ".join((*map(str, self._shape), *(made.hexdigest() for made in self._hashes)))


def meant(weight: Quantized) -> str:
    """Return the fingerprint of a weight, unpacked by the C core."""
    return _fingerprint(weight, FORMATS[weight.format].unpack)


def check(written: Path, layers: Mapping[str, str], tensors: Mapping[str, str], progress: Progress) -> None:
    """Read a model that was just written: packed layers through the NumPy reference, other tensors by bytes.

    Args:
        written: path of the model.
        layers: fingerprints of its packed layers, by name.
        tensors: SHA-256 of the bytes of its tensors, by name.
        progress: called as progress(done, total, what).

    Raises:
        OutputError: something differs or is missing.
    """
    file = files.read(written)
    nodes = {node.layer: node for node in packed_nodes(file.model)}
    values = file.model.graph.initializers
    for name, digest in tensors.items():
        tensor = values[name].const_value if name in values else None
        if tensor is None or _sha256(tensor.numpy(), file.release) != digest:
            raise OutputError(f"verification failed: tensor {name!r} holds other bytes than were written")
    for done, (name, digest) in enumerate(layers.items()):
        progress(done, len(layers), f"checking {name}")
        if name not in nodes or _decoded(nodes[name]) != digest:
            raise OutputError(f"verification failed: layer {name!r} decodes to other values than were meant")
        file.release()
    progress(len(layers), len(layers), "")


def _decoded(node: PackedNode) -> str:
    try:
        return _fingerprint(node.quantized(), reference.UNPACK[node.format])
    except ValueError as error:
        raise OutputError(f"verification failed: layer {node.layer!r}: {error}") from None


def _fingerprint(weight: Quantized, unpack: Callable[[np.ndarray, int], np.ndarray]) -> str:
    made = Fingerprint(weight.k, weight.block_size)
    for rows in _slices(weight):
        parameters = (
            part if part.shape[1] == 1 else part[:, rows] for part in (weight.scale, weight.zero_point)
        )
        made.add(unpack(weight.weight[:, rows], weight.k), *parameters)
    return made.digest()


def _slices(weight: Quantized) -> Iterator[slice]:
    step = max(1, _WEIGHTS_AT_ONCE // weight.k)
    return (slice(first, first + step) for first in range(0, weight.n, step))


def _sha256(array: np.ndarray, between: Callable[[], None]) -> str:
    data, made = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, hashlib.sha256()
    for first in range(0, len(data), _BYTES_AT_ONCE):
        made.update(data[first : first + _BYTES_AT_ONCE])
        between()
    return made.hexdigest()
