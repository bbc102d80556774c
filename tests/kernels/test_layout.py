"""Panels hold the codes where ext/layout.h draws them, and corrupt padding is refused."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from onnx_bitnet import _native, reference


def panel_bytes(codes: np.ndarray, block_size: int) -> np.ndarray:
    """Compute the panels of one plane (N, K) from the picture in ext/layout.h, code by code."""
    n, k = codes.shape
    blocks = []
    for start in reference.group_starts(k, block_size):
        block = codes[:, start : start + (block_size or k)]
        blocks.append(np.pad(block, [(0, -n % 16), (0, -block.shape[1] % 16)], constant_values=1))
    padded = np.concatenate(blocks, axis=1)
    out = []
    for first in range(0, padded.shape[0], 64):
        # (panels, 16 outputs, steps, 4 fields, 4 inputs) to (steps, panels, 16 outputs, 4 inputs, 4 fields)
        fields = (
            padded[first : first + 64].reshape(-1, 16, padded.shape[1] // 16, 4, 4).transpose(2, 0, 1, 4, 3)
        )
        out.append((fields << np.array([0, 2, 4, 6], np.uint8)).sum(axis=-1, dtype=np.uint8).reshape(-1))
    return np.concatenate(out)


ISAS = [
    pytest.param(name, marks=pytest.mark.skipif(not runs_here, reason=f"this CPU lacks {name}"))
    for name, runs_here in _native.isas()
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block_size", [0, 1, 5, 16, 32, 100])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (16, 16), (17, 15), (64, 33), (65, 130), (130, 257), (200, 7), (192, 384), (70, 200)]
)
def test_panels_are_as_drawn(n: int, k: int, block_size: int, isa: str) -> None:
    codes = np.random.default_rng(n * k).integers(0, 4, (n, k), np.uint8)
    panels, code_sum = _native.panels(reference.pack_i2s(codes), k, block_size, isa=isa)
    assert np.array_equal(panels, panel_bytes(codes, block_size))
    for g, start in enumerate(reference.group_starts(k, block_size)):
        block = codes[:, start : start + (block_size or k)]
        expected = block.sum(axis=1) + -block.shape[1] % 16
        assert np.array_equal(code_sum[:, g].reshape(-1)[:n], expected)


def test_panels_are_the_same_bytes_everywhere() -> None:
    codes = (np.arange(70 * 300).reshape(70, 300) * 7 // 5 % 4).astype(np.uint8)
    panels, _ = _native.panels(reference.pack_i2s(codes), 300, 48)
    assert hashlib.sha256(panels.tobytes()).hexdigest() == (
        "62fe0e7a920cd551cf3511ee92a2f62285569d50153c026e49ce65c938b0c08f"
    )


def merged_bytes(codes: np.ndarray, block_size: int, bits: int) -> np.ndarray:
    """Compute the panels of codes (N, K) of 4 or 8 bits from the picture in ext/layout.h, code by code."""
    n, k = codes.shape
    blocks = []
    for start in reference.group_starts(k, block_size):
        block = codes[:, start : start + (block_size or k)]
        blocks.append(np.pad(block, [(0, -n % 16), (0, -block.shape[1] % 16)]))
    padded = np.concatenate(blocks, axis=1)
    out = []
    for first in range(0, padded.shape[0], 64):
        # (panels, 16 outputs, steps, 4 fields, 4 inputs) to (steps, panels, 4 fields, 16 outputs, 4 inputs)
        fields = (
            padded[first : first + 64].reshape(-1, 16, padded.shape[1] // 16, 4, 4).transpose(2, 0, 3, 1, 4)
        )
        if bits == 4:
            fields = fields[:, :, 0::2] | fields[:, :, 1::2] << 4
        out.append(fields.reshape(-1))
    return np.concatenate(out)


@pytest.mark.parametrize("block_size", [0, 1, 5, 16, 100])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 16), (17, 15), (65, 130), (130, 257)])
@pytest.mark.parametrize(("bits", "ratio"), [(4, (4, 1)), (4, (3, 1)), (8, (9, 3, 1)), (8, (64, 16, 4, 1))])
def test_merged_panels_are_as_drawn(
    n: int, k: int, block_size: int, bits: int, ratio: tuple[int, ...]
) -> None:
    planes = np.random.default_rng(n * k).integers(0, 4, (len(ratio), n, k), np.uint8)
    codes = np.tensordot(ratio, planes, 1).astype(np.uint8)
    panels, code_sum = _native.merged_panels(reference.pack_i2s(planes), ratio, k, block_size, bits=bits)
    assert np.array_equal(panels, merged_bytes(codes, block_size, bits))
    for g, start in enumerate(reference.group_starts(k, block_size)):
        expected = codes[:, start : start + (block_size or k)].sum(axis=1)
        assert np.array_equal(code_sum[:, g].reshape(-1)[:n], expected)


def squeezed_bytes(panels: np.ndarray, n: int, k: int, block_size: int) -> np.ndarray:
    """Compute panels of t5 from those of i2s by the picture in ext/layout.h."""
    out = []
    steps = [-(-min(block_size or k, k - start) // 16) for start in reference.group_starts(k, block_size)]
    for width in [4] * (n // 64) + [-(-(n % 64) // 16)] * (n % 64 > 0):
        for count in steps:
            group, panels = np.split(panels, [count * width * 64])
            group = group.reshape(count, width * 64)
            fives, rest = group[: count // 5 * 5].reshape(-1, 5, width * 64), group[count // 5 * 5 :]
            fields = fives[:, :4, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
            fifth = fives[:, 4:, :] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
            out.append((fields @ np.array([1, 3, 9, 27], np.uint8) + 85 * fifth).reshape(-1))
            out.append(rest.reshape(-1))
    return np.concatenate(out)


@pytest.mark.parametrize("block_size", [0, 16, 80, 100])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 80), (17, 79), (65, 130), (130, 257), (100, 2049)])
def test_squeezed_panels_are_as_drawn(n: int, k: int, block_size: int) -> None:
    codes = np.random.default_rng(n * k).integers(0, 3, (n, k), np.uint8)
    panels, _ = _native.panels(reference.pack_i2s(codes), k, block_size)
    expected = squeezed_bytes(panels, n, k, block_size)
    assert np.array_equal(_native.squeezed(panels, n, k, block_size), expected)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 30])
def test_padding_other_than_one_is_refused(k: int) -> None:
    packed = reference.pack_i2s(np.ones((3, k), np.uint8))
    packed[1, -1] ^= 0x80
    with pytest.raises(ValueError, match="a code past K is not 1"):
        _native.panels(packed, k)
    with pytest.raises(ValueError, match="a code past K is not 1"):
        _native.merged_panels(packed[None], [1], k, bits=4)


def test_wrong_row_length_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 2 bytes, K = 9 needs 3"):
        _native.panels(np.full((4, 2), 0x55, np.uint8), 9)
