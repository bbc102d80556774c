"""The oracle's bytes against bytes worked out by hand."""

from __future__ import annotations

import numpy as np

from onnx_bitnet import reference


def test_pack_puts_the_first_code_in_the_lowest_bits_and_pads_with_one():
    assert reference.pack_i2s(np.array([[0, 1, 2, 3, 2]])).tolist() == [[0b11100100, 0b01010110]]


def test_unpack_returns_the_codes():
    packed = np.array([[0b11100100, 0b01010110]], np.uint8)
    assert reference.unpack_i2s(packed, 5).tolist() == [[0, 1, 2, 3, 2]]
