"""Few-bit tensors in the layouts of ggml and bitnet.cpp, decoded to codes and scales.

W is (N, K), a code c stands for (c - 1) * d, d is the scale of its block, and blocks follow one another.

    TQ2_0   256   qs[64], d   byte m of half h of qs holds elements 128 h + 32 n + m in bits 2n and 2n + 1
    TQ1_0   256   qs[48], qh[4], d   five trits to a byte as a fraction of 256, the first most significant:
                  elements m + 32 n in qs[m] for m < 32, 160 + m + 16 n in qs[32 + m], 240 + m + 4 n in qh[m]
    Q2_0     64   d, qs[16]   four elements to a byte, lowest bits first
    PQ2_0   128   d, qs[32]   the same
    I2_S    128   qs[32]   element 32 n + m of a block in bits 6 - 2n and 7 - 2n of byte m; after all blocks
                  32 bytes that begin with the one float32 scale of the tensor

d is float16. Sources: ggml-common.h and gguf/quants.py of llama.cpp, ggml-bitnet-mad.cpp of bitnet.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_TAIL = 32


@dataclass(frozen=True)
class Layout:
    """A type of few-bit tensors.

    Args:
        name: as its makers call it.
        block: elements of a block, of which K must be a multiple.
        block_bytes: bytes of a block.
        decode: from bytes (blocks, block_bytes) to codes uint8 (blocks, block) and, where blocks have them,
            scales float16 (blocks,).
        tail: bytes after the last block.
        ternary: code 3 cannot be.
    """

    name: str
    block: int
    block_bytes: int
    decode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
    tail: int = 0
    ternary: bool = False

    def nbytes(self, n: int, k: int) -> int:
        """Return the bytes of a tensor (n, k)."""
        return n * k // self.block * self.block_bytes + self.tail


def _fields(qs: np.ndarray, shifts: tuple[int, ...]) -> np.ndarray:
    """Return the 2-bit fields of bytes (..., m) as (..., shifts, m)."""
    return np.stack([qs >> shift & 3 for shift in shifts], axis=-2)


def _float16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2")[:, 0].astype(np.float16)


def _tq2_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    halves = blocks[:, :64].reshape(-1, 2, 32)
    return _fields(halves, (0, 2, 4, 6)).reshape(len(blocks), 256), _float16(blocks[:, 64:])


def _tq1_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    parts = (blocks[:, :32], powers), (blocks[:, 32:48], powers), (blocks[:, 48:52], powers[:4])
    digits = [(qs[:, None] * power).reshape(len(blocks), -1) for qs, power in parts]  # modulo 256
    codes = np.concatenate(digits, axis=1).astype(np.uint16) * 3 >> 8
    return codes.astype(np.uint8), _float16(blocks[:, 52:])


def _q2_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = _fields(blocks[:, 2:], (0, 2, 4, 6)).swapaxes(1, 2)
    return codes.reshape(len(blocks), -1), _float16(blocks[:, :2])


def _i2_s(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    return _fields(blocks, (6, 4, 2, 0)).reshape(len(blocks), 128), None


LAYOUTS = {
    34: Layout("TQ1_0", 256, 54, _tq1_0),
    35: Layout("TQ2_0", 256, 66, _tq2_0),
    36: Layout("I2_S", 128, 32, _i2_s, tail=_TAIL, ternary=True),
    42: Layout("Q2_0", 64, 18, _q2_0),
    142: Layout("PQ2_0", 128, 34, _q2_0),
}
UNDEFINED = {38: "TL1", 39: "TL2"}
"""Types of bitnet.cpp whose bytes are in the order of one build's kernels, which the file does not say."""

PLAIN = {0: "<f4", 1: "<f2", 24: "<i1", 25: "<i2", 26: "<i4", 27: "<i8", 28: "<f8", 30: "<u2"}
"""Types that NumPy reads; 30 is bfloat16."""

BFLOAT16 = 30
