"""The bytes of each format: golden, the same everywhere, and equal to the oracle; and bytes that are not."""

from __future__ import annotations

import numpy as np
import packed
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_bitnet import _native, reference
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.recipe import FORMATS as RECIPE_FORMATS

LEVELS = [[0, 1, 2, 3, 0, 1, 2, 3, 0], [1, 2, 3, 0, 1, 2, 3, 0, 1]]
TRITS = [[0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 2], [2] * 11]
GOLDEN = {
    # The last byte holds one code and three pads of 1.
    "i2s": (LEVELS, ["e4e454", "393955"]),
    # Pairs 0 1, 4 8, 6 and 2 with a pad; 8 8, 8 8, 8 and 2 with a pad.
    "tl1": (TRITS, ["108476", "888878"]),
    # Triples -13 0, 13 and 0 2 with a pad = -6, then the signs; 13 13, 13 and 2 2 with a pad = 12.
    "tl2": (TRITS, ["0d6d09", "ddcd00"]),
    # 27 + 81, 1 + 6 + 18 + 54, 2 with four pads of 3^i; 242 twice and the same.
    "t5": (TRITS, ["6c4f7a", "f2f27a"]),
}


def codes_of(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(
        0, 4 if FORMATS[name].four_levels else 3, shape, dtype=np.uint8
    )


@pytest.mark.parametrize("name", FORMATS)
def test_golden_bytes(name):
    codes, golden = GOLDEN[name]
    codes = np.array(codes, np.uint8)
    assert [row.tobytes().hex() for row in FORMATS[name].pack(codes)] == golden
    assert [row.tobytes().hex() for row in reference.PACK[name](codes)] == golden


def test_recipe_oracle_and_c_core_name_the_same_formats():
    assert ("auto", *FORMATS) == RECIPE_FORMATS
    assert FORMATS.keys() == reference.PACK.keys() == reference.UNPACK.keys()
    assert _native.formats() == [(form.name, form.op_type, form.four_levels) for form in FORMATS.values()]


@pytest.mark.parametrize("name", FORMATS)
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 130)), seed=st.integers(0, 99))
def test_packs_as_the_oracle_and_unpacks_any_k(name, shape, seed):
    form, codes = FORMATS[name], codes_of(name, shape, seed)
    row = form.pack(codes)
    assert row.shape[-1] == form.row_bytes(shape[-1])
    assert np.array_equal(row, reference.PACK[name](codes))
    assert np.array_equal(form.unpack(row, shape[-1]), codes)
    assert np.array_equal(reference.UNPACK[name](row, shape[-1]), codes)


@pytest.mark.parametrize("name", FORMATS)
@given(k=st.integers(1, 60), seed=st.integers(0, 999))
def test_bytes_are_refused_or_the_only_ones_of_their_codes(name, k, seed):
    form = FORMATS[name]
    rng = np.random.default_rng(seed)
    row = form.pack(codes_of(name, (1, k), seed))
    row[0, rng.integers(row.size)] ^= 1 << rng.integers(8)
    try:
        codes = form.unpack(row, k)
    except ValueError:
        with pytest.raises(ValueError, match=r"^weight: "):
            reference.UNPACK[name](row, k)
        with pytest.raises(ValueError, match=r"^weight: "):
            _native.panels(row, k, 0, name)
    else:
        assert np.array_equal(form.pack(codes), row)
        assert np.array_equal(reference.UNPACK[name](row, k), codes)


@pytest.mark.parametrize("kind", packed.INVALID)
def test_bytes_that_no_codes_give_are_refused(kind):
    name, k, text, reason = packed.INVALID[kind]
    row = np.frombuffer(bytes.fromhex(text), np.uint8)[None]
    assert row.shape[1] == FORMATS[name].row_bytes(k)
    for read in (FORMATS[name].unpack, lambda row, k: _native.panels(row, k, 0, name)):
        with pytest.raises(ValueError, match=f"^weight: {reason}"):
            read(row, k)
    with pytest.raises(ValueError, match=r"^weight: "):
        reference.UNPACK[name](row, k)


@pytest.mark.parametrize("name", [form.name for form in FORMATS.values() if not form.four_levels])
def test_ternary_formats_refuse_a_fourth_level(name):
    for pack in (FORMATS[name].pack, reference.PACK[name]):
        with pytest.raises(ValueError, match="a code is not 0, 1 or 2"):
            pack(np.array([[0, 1, 2, 3]], np.uint8))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("k", [1, 5, 16, 63, 200])
@pytest.mark.parametrize("block_size", [0, 16])
def test_all_formats_become_the_same_panels(name, k, block_size):
    codes = codes_of("tl1", (128, k), k)
    panels, sums = _native.panels(FORMATS[name].pack(codes), k, block_size, name)
    of_i2s = _native.panels(FORMATS["i2s"].pack(codes), k, block_size)
    assert np.array_equal(panels, of_i2s[0])
    assert np.array_equal(sums, of_i2s[1])


@pytest.mark.parametrize("name", FORMATS)
def test_unpacks_rows_that_are_not_contiguous(name):
    form, codes = FORMATS[name], codes_of(name, (4, 33), 0)
    assert np.array_equal(form.unpack(form.pack(codes)[::-2], 33), codes[::-2])


@pytest.mark.parametrize("name", FORMATS)
def test_refuses_bytes_of_another_k(name):
    with pytest.raises(ValueError, match="K = 99 needs"):
        FORMATS[name].unpack(np.zeros((2, 4), np.uint8), 99)


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="no format 'tl3'; there are i2s, tl1, tl2, t5"):
        _native.row_bytes("tl3", 4)
