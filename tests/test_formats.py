"""The bytes of each format: golden, the same everywhere, and equal to the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_bitnet import reference
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.recipe import FORMATS as RECIPE_FORMATS

GOLDEN = {
    # Codes 0..3 in turn, two rows of 9: the last byte holds one code and three pads of 1.
    "i2s": ["e4e454", "393955"],
}


@pytest.mark.parametrize("name", FORMATS)
def test_golden_bytes(name):
    codes = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 0], [1, 2, 3, 0, 1, 2, 3, 0, 1]], np.uint8)
    assert [row.tobytes().hex() for row in FORMATS[name].pack(codes)] == GOLDEN[name]


def test_the_recipe_names_the_formats():
    assert ("auto", *FORMATS) == RECIPE_FORMATS
    assert all(name == form.name for name, form in FORMATS.items())


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70)), seed=st.integers(0, 99))
def test_i2s_packs_as_the_oracle_and_unpacks_any_k(shape, seed):
    codes = np.random.default_rng(seed).integers(0, 4, shape, dtype=np.uint8)
    packed = FORMATS["i2s"].pack(codes)
    assert packed.shape[-1] == FORMATS["i2s"].row_bytes(shape[-1])
    assert np.array_equal(packed, reference.pack_i2s(codes))
    assert np.array_equal(FORMATS["i2s"].unpack(packed, shape[-1]), codes)
    assert np.array_equal(reference.unpack_i2s(packed, shape[-1]), codes)


def test_i2s_unpacks_rows_that_are_not_contiguous():
    codes = np.random.default_rng(0).integers(0, 4, (4, 33), dtype=np.uint8)
    form = FORMATS["i2s"]
    assert np.array_equal(form.unpack(form.pack(codes)[::-2], 33), codes[::-2])


def test_i2s_refuses_bytes_of_another_k():
    with pytest.raises(ValueError, match="K is 9"):
        FORMATS["i2s"].unpack(np.zeros((2, 4), np.uint8), 9)
