"""The packed weight formats: what the bytes of a row mean, and who reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_bitnet import _native


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
