"""Weights in the layout of onnxruntime's own ops: the block that pads least."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_bitnet.quantization.nbits import Integers, NBits


def packed(k: int, bits: int, block_size: int = 0) -> NBits:
    rng = np.random.default_rng(k)
    half = 1 << (bits - 1)
    q = rng.integers(-half, half, (3, k)).astype(np.int8)
    groups = -(-k // block_size) if block_size else 1
    scale = rng.uniform(0.1, 1, (3, groups)).astype(np.float32)
    found = NBits.pack(Integers(q, scale, block_size, bits))
    by_input = np.repeat(scale, block_size or k, axis=1)[:, :k]
    np.testing.assert_array_equal(found.dequantize(), q * by_input)
    return found


@pytest.mark.parametrize(
    ("k", "bits", "block_size"),
    [
        (64, 8, 64),
        (64, 2, 64),
        (96, 8, 32),
        (96, 4, 32),
        (192, 8, 64),
        (16, 8, 16),
        (16, 4, 16),
        (16, 2, 32),
        (100, 8, 128),
        (1, 8, 16),
        (600, 2, 128),
        (600, 8, 128),
        (80, 8, 16),
        (80, 4, 32),
        (48, 4, 64),
        *((k, bits, 128) for k in (128, 256, 576 * 2, 4096) for bits in (2, 4, 8)),
    ],
)
def test_the_block_that_stores_least_and_then_the_largest(k, bits, block_size):
    found = packed(k, bits)
    assert found.block_size == block_size
    for size in (32, 64, 128):
        blocks = -(-k // size)
        assert found.nbytes <= 3 * (blocks * (size * bits // 8 + 4))


def test_blocks_that_share_a_scale_are_cut_where_that_pads_less():
    assert packed(320, 8, 256).block_size == 64
    assert packed(512, 8, 256).block_size == 128
    assert packed(320, 8, 96).block_size == 32
    assert packed(64, 2, 16).block_size == 16
    assert packed(96, 4, 48).block_size == 16
