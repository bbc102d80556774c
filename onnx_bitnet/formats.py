"""The packed weight formats: what the bytes of a row mean, and who reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_bitnet import _native, reference


@dataclass(frozen=True)
class Format:
    """A canonical byte layout of codes. It is the same on every machine, and its name is what models carry.

    Args:
        name: what recipes, reports and the C core call it.
        op_type: the op of domain `onnx_bitnet` that multiplies with it.
        bits_per_weight: bits for one code of one plane, padding aside.
        four_levels: whether it holds code 3 and zero points other than 1; the op has an input for them then.
    """

    name: str
    op_type: str
    bits_per_weight: float
    four_levels: bool = False

    def row_bytes(self, k: int) -> int:
        """Return the bytes of one row of k codes."""
        return _native.row_bytes(self.name, k)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """Pack codes uint8 (..., K) to bytes uint8 (..., row_bytes(K)).

        Raises:
            ValueError: the format does not hold one of the codes.
        """
        rows = np.ascontiguousarray(codes, np.uint8).reshape(-1, codes.shape[-1])
        return _native.pack(self.name, rows).reshape(*codes.shape[:-1], self.row_bytes(codes.shape[-1]))

    def unpack(self, packed: np.ndarray, k: int) -> np.ndarray:
        """Unpack bytes uint8 (..., row_bytes(k)) to codes uint8 (..., k).

        Raises:
            ValueError: the bytes are not what `pack` makes of any codes, or not of rows of k.
        """
        rows = np.ascontiguousarray(packed).reshape(-1, packed.shape[-1])
        return _native.unpack(self.name, rows, k).reshape(*packed.shape[:-1], k)


FORMATS = {
    form.name: form
    for form in (
        Format("i2s", "MatMulI2S", 2.0, four_levels=True),
        Format("tl1", "MatMulTL1", 2.0),
        Format("tl2", "MatMulTL2", 5 / 3),
        Format("t5", "MatMulT5", 1.6),
    )
}

PANEL_OP = "MatMulPanel"
"""What `MatMulI2S` is called where its weight lies in the file as panels."""

_OUTPUTS, _STEP = 64, 16  # of a super-panel, see ext/layout.h
_SUPERS_AT_ONCE = 16


def panel_shape(n: int, k: int) -> tuple[int, int]:
    """Return the shape of one plane (N, k) as panels: ceil(N / 64), 16 * k rounded up to 16."""
    return -(-n // _OUTPUTS), _STEP * (k + -k % _STEP)


def to_panels(weight: np.ndarray, k: int) -> np.ndarray:
    """Bring i2s planes uint8 (P, N, ceil(k / 4)) into the order in which kernels read them.

    The library then reads them where the file is mapped and keeps no copy. The bytes are the same on every
    machine; `reference.pack_panels` defines them.

    Returns:
        uint8 (P, *panel_shape(N, k)), padded with code 1.
    """
    n = weight.shape[1]
    shape = panel_shape(n, k)
    whole = np.pad(weight, [(0, 0), (0, shape[0] * _OUTPUTS - n), (0, 0)], constant_values=0x55)
    return np.stack([_native.panels(plane, k)[0].reshape(shape) for plane in whole])


def from_panels(panels: np.ndarray, n: int, k: int) -> np.ndarray:
    """Undo `to_panels`, by the NumPy reference.

    Raises:
        ValueError: a code past N or K is not 1.
    """
    i2s = FORMATS["i2s"]
    weight = np.empty((panels.shape[0], n, i2s.row_bytes(k)), np.uint8)
    for first in range(0, panels.shape[1], _SUPERS_AT_ONCE):
        rows = slice(first * _OUTPUTS, min(n, (first + _SUPERS_AT_ONCE) * _OUTPUTS))
        part = panels[:, first : first + _SUPERS_AT_ONCE]
        weight[:, rows] = i2s.pack(reference.unpack_panels(part, rows.stop - rows.start, k))
    return weight
