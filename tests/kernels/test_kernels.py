"""Every row of ext/kernels.inc against the NumPy oracle: same bits, nothing touched outside the buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from onnx_bitnet import _native, reference
from onnx_bitnet.kernels import Kernel, kernels

Guarded = Callable[[np.ndarray], np.ndarray]

EDGES = [*range(1, 131), 159, 160, 161, 175, 176, 177, 255, 256, 257, 2047, 2048, 2049]


def every(op: str) -> pytest.MarkDecorator:
    """Run a test once for each kernel of an op; those that this CPU lacks are skipped."""
    rows = [
        pytest.param(
            kernel,
            id=str(kernel),
            marks=pytest.mark.skipif(not kernel.runs_here, reason=f"this CPU lacks {kernel.isa}"),
        )
        for kernel in kernels()
        if kernel.op == op
    ]
    return pytest.mark.parametrize("kernel", rows)


def blocks(array: np.ndarray, block_size: int) -> list[np.ndarray]:
    """Cut the last axis into groups."""
    k = array.shape[-1]
    return [array[..., start : start + (block_size or k)] for start in reference.group_starts(k, block_size)]


def pad_groups(array: np.ndarray, block_size: int) -> np.ndarray:
    """Pad each group of the last axis with zeros to a multiple of 16."""
    padded = [
        np.pad(block, [(0, 0)] * (block.ndim - 1) + [(0, -block.shape[-1] % 16)])
        for block in blocks(array, block_size)
    ]
    return np.ascontiguousarray(np.concatenate(padded, axis=-1))


TOP = {"i2s": 3, "t5": 2, "w4": 15, "w8": 255}  # the largest code


def pack_panels(form: str, codes: np.ndarray, block_size: int) -> np.ndarray:
    """Return the panels of codes (N, K); wide ones come as planes of their base-4 digits."""
    k = codes.shape[1]
    if form == "i2s":
        return _native.panels(reference.pack_i2s(codes), k, block_size)[0]
    if form == "t5":
        return _native.squeezed(pack_panels("i2s", codes, block_size), *codes.shape, block_size)
    ratio = {"w4": [4, 1], "w8": [64, 16, 4, 1]}[form]
    digits = np.stack([codes // r % 4 for r in ratio])
    return _native.merged_panels(reference.pack_i2s(digits), ratio, k, block_size, bits=int(form[1]))[0]


def run_dot(
    guarded: Guarded,
    entry: Callable[..., None],
    kernel: Kernel,
    codes: np.ndarray,
    x: np.ndarray,
    block_size: int,
) -> np.ndarray:
    """Multiply rows x (M, K) with codes (N, K), super-panel by super-panel; return (M, N, groups)."""
    n, k = codes.shape
    panels = pack_panels(kernel.format, codes, block_size)
    column = len(panels) // -(-n // 16)
    form = {} if kernel.op == "dotf" else {"format": kernel.format}
    groups = len(reference.group_starts(k, block_size))
    x = guarded(pad_groups(x, block_size))
    dtype = np.int32 if x.dtype == np.int8 else np.float32
    out = []
    for first in range(0, n, 64):
        width = min(4, -(-(n - first) // 16))
        panel = guarded(panels[first // 16 * column : (first // 16 + width) * column])
        acc = guarded(np.full((x.shape[0], groups, 64), 77, dtype))
        group_steps = -(-min(block_size or k, k) // 16)
        entry(panel, x, acc, panels=width, group_steps=group_steps, isa=kernel.isa, **form)
        assert (acc[:, :, width * 16 :] == 77).all()
        out.append(acc[:, :, : width * 16].transpose(0, 2, 1))
    return np.concatenate(out, axis=1)[:, :n]


def expected_dot(codes: np.ndarray, x: np.ndarray, block_size: int) -> np.ndarray:
    """Return the exact sums of code * x (M, N, groups), in float64."""
    pairs = zip(
        blocks(codes.astype(np.float64), block_size), blocks(x.astype(np.float64), block_size), strict=True
    )
    return np.stack([xs @ cs.T for cs, xs in pairs], axis=-1)


def dot_shapes() -> Iterator[tuple[int, int, int, int]]:
    """Yield (m, n, k, block_size) around the edges of steps, panels, super-panels, row blocks and groups."""
    rng = np.random.default_rng(1)
    for k in EDGES:
        yield int(rng.integers(1, 10)), int(rng.integers(1, 70)), k, 0
    for n in range(1, 131):
        yield int(rng.integers(1, 10)), n, 40, 0
    for m in range(1, 10):
        for n in (16, 32, 48, 64, 80, 128):
            yield m, n, 200, 0
            yield m, n, 200, 48
    for m in range(10, 41):
        yield m, 112, 176, 0
    for k in (1, 15, 16, 17, 100, 257):
        for block_size in (1, 5, 16, 32, 64, 100):
            yield 3, 70, k, block_size


@every("dot")
def test_dot_equals_reference(kernel: Kernel, guarded: Guarded) -> None:
    rng = np.random.default_rng(0)
    for m, n, k, block_size in dot_shapes():
        codes = rng.integers(0, TOP[kernel.format], (n, k), np.uint8, endpoint=True)
        q = rng.integers(-128, 128, (m, k)).astype(np.int8)
        got = run_dot(guarded, _native.dot, kernel, codes, q, block_size)
        assert np.array_equal(got, expected_dot(codes, q, block_size)), (m, n, k, block_size)


@every("dot")
@pytest.mark.parametrize("q", [127, -128])
@pytest.mark.parametrize("below", [0, 1, 2, 3])
def test_dot_does_not_overflow(kernel: Kernel, guarded: Guarded, below: int, q: int) -> None:
    code = max(0, TOP[kernel.format] - below)
    longest = 2**18 if kernel.format in ("i2s", "t5") else 2**16
    for m, n, k in (
        (1, 64, 2049),
        (2, 64, 2049),
        (3, 32, 2064),
        (4, 64, 2064),
        (6, 64, 2064),
        (5, 17, 8192),
        (1, 16, longest),
        (2, 16, longest),
    ):
        got = run_dot(
            guarded, _native.dot, kernel, np.full((n, k), code, np.uint8), np.full((m, k), q, np.int8), 0
        )
        assert (got == code * q * k).all(), (m, n, k)


@every("dot")
def test_dot_counts_each_input_once(kernel: Kernel, guarded: Guarded) -> None:
    codes = np.zeros((64, 48), np.uint8)
    codes[np.arange(64), np.arange(64) % 48] = TOP[kernel.format]
    q = np.arange(-24, 24, dtype=np.int8)[None].repeat(5, axis=0)
    got = run_dot(guarded, _native.dot, kernel, codes, q, 0)
    assert np.array_equal(got, expected_dot(codes, q, 0))


@every("dotf")
def test_dotf_is_close_to_reference(kernel: Kernel, guarded: Guarded) -> None:
    rng = np.random.default_rng(0)
    for m, n, k, block_size in dot_shapes():
        codes = rng.integers(0, 4, (n, k), np.uint8)
        x = rng.normal(size=(m, k)).astype(np.float32) + np.float32(1)
        got = run_dot(guarded, _native.dotf, kernel, codes, x, block_size)
        t = codes.astype(np.int8) - 1
        size = expected_dot(np.abs(t), np.abs(x), block_size)
        assert (np.abs(got - expected_dot(t, x, block_size)) <= 2e-6 * size).all(), (m, n, k, block_size)


def activation_rows(k: int) -> Iterator[np.ndarray]:
    """Yield rows that are ordinary, tiny, huge, tied between two integers, or not finite."""
    rng = np.random.default_rng(k)
    x = rng.normal(size=k).astype(np.float32)
    yield x
    yield x * np.float32(1e-7)
    yield x * np.float32(1e-42)
    yield x * np.float32(6e37)
    yield rng.integers(-254, 255, k).astype(np.float32) / 2
    yield np.zeros(k, np.float32)
    yield np.full(k, -3.0, np.float32)
    yield np.float32(1e30) ** rng.choice([-1, 0, 1], k).astype(np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        broken = x.copy()
        broken[rng.integers(k)] = bad
        yield broken


@every("actq")
@pytest.mark.parametrize("bits", [8, 16])
def test_actq_equals_reference(kernel: Kernel, guarded: Guarded, bits: int) -> None:
    for k in (*range(1, 36), 63, 64, 65, 130, 255, 256, 257, 2049):
        for x in activation_rows(k):
            for block_size, step in ((0, 0.0), (0, 1.0), (0, 0.013), (16, 0.0), (32, 0.5), (11, 0.0)):
                check_actq(kernel, guarded, x, bits, block_size, np.float32(step))
        if k == 1:
            check_actq(kernel, guarded, np.float32([1e-5]), bits, 0, np.float32(0))


@every("actq")
@pytest.mark.parametrize("bits", [8, 16])
def test_actq_sums_do_not_overflow(kernel: Kernel, guarded: Guarded, bits: int) -> None:
    x = np.full(2**18, -(2.0 ** (bits - 1)), np.float32)
    check_actq(kernel, guarded, x, bits, 0, np.float32(1))


def check_actq(
    kernel: Kernel, guarded: Guarded, x: np.ndarray, bits: int, block_size: int, step: np.float32
) -> None:
    q, inv_s = reference.quantize_rows(x[None], bits, step)
    padded = pad_groups(q[0], block_size)
    parts = [padded] if bits == 8 else [padded >> 8, (padded & 255) - 128]
    sums = guarded(np.zeros(len(reference.group_starts(x.size, block_size)), np.int64))
    got = guarded(np.zeros((bits // 8, pad_groups(x, block_size).size), np.int8))
    got_inv_s = _native.actq(
        guarded(x), got, sums, block_size=block_size, bits=bits, step=step, isa=kernel.isa
    )
    assert np.array_equal(np.float32(got_inv_s), inv_s[0], equal_nan=True)
    assert np.array_equal(sums, [block.sum() for block in blocks(q, block_size)])
    if not np.isnan(inv_s[0]):
        assert np.array_equal(got, parts)


@every("scale")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("zero_point", ["1", "128", "1.5", "any"])
def test_scale_equals_scalar(kernel: Kernel, guarded: Guarded, parts: int, zero_point: str) -> None:
    rng = np.random.default_rng(parts)
    for rows, groups, panels in ((1, 1, 4), (3, 1, 1), (2, 5, 3), (16, 4, 4), (5, 2, 2)):
        high = 2**28 if parts == 1 else 2**20
        acc = guarded(rng.integers(-high, high, (parts * rows, groups, 64)).astype(np.int32))
        sums = guarded(rng.integers(-high, high, (rows, groups)))
        code_sum = guarded(rng.integers(0, 2**20, (groups, 64)).astype(np.int32))
        scale = guarded(rng.normal(size=(groups, 64)).astype(np.float32))
        zeros = {
            "1": None,
            "128": None,
            "1.5": guarded(np.full((groups, 64), 1.5, np.float32)),
            "any": guarded(rng.normal(size=(groups, 64)).astype(np.float32)),
        }[zero_point]
        zero = 128 if zero_point == "128" else 1
        sums //= zero
        factor = guarded(rng.random(rows, np.float32))
        start = guarded(rng.normal(size=(rows, 64)).astype(np.float32))
        last = {"bias": guarded(np.arange(64, dtype=np.float32)), "rescale": factor}
        for columns, options in ((64, {"before": start}), (16 * panels, {}), (80, {"before": start, **last})):
            ys = [guarded(np.full((rows, columns), 77, np.float32)) for _ in range(2)]
            for y, isa in zip(ys, (kernel.isa, "scalar"), strict=True):
                _native.scale(
                    acc,
                    sums,
                    code_sum,
                    scale,
                    zeros,
                    factor,
                    y,
                    panels=panels,
                    isa=isa,
                    zero=zero,
                    **options,
                )
            assert np.array_equal(*ys)
            assert (ys[0][:, panels * 16 :] == 77).all()
            assert not (ys[0][:, : panels * 16] == 77).any()


@every("widen")
def test_widen_equals_numpy(kernel: Kernel, guarded: Guarded) -> None:
    halves = np.arange(2**16, dtype=np.uint16)
    for count in (*range(1, 20), halves.size):
        x = guarded(halves[-count:])
        y = guarded(np.zeros(count, np.float32))
        _native.widen(x, y, isa=kernel.isa)
        assert np.array_equal(y, x.view(np.float16).astype(np.float32), equal_nan=True)


@every("narrow")
def test_narrow_equals_numpy(kernel: Kernel, guarded: Guarded) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, np.uint32)
    with np.errstate(invalid="ignore"):
        ties = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
        above = np.nextafter(ties, np.float32(np.inf))
    for values in (halves, ties, above, bits.view(np.float32)):
        for count in (1, 7, 8, 9, values.size):
            x = guarded(values[-count:])
            y = guarded(np.zeros(count, np.uint16))
            _native.narrow(x, y, isa=kernel.isa)
            with np.errstate(over="ignore", invalid="ignore"):
                expected = x.astype(np.float16)
            assert np.array_equal(y.view(np.float16), expected, equal_nan=True)


@every("hadamard")
def test_hadamard_equals_reference(kernel: Kernel, guarded: Guarded) -> None:
    rng = np.random.default_rng(0)
    for block_size in (2**power for power in range(13)):
        for rows, blocks in ((1, 1), (3, 1), (2, 2), (1, 7), (2, 33)):
            k = block_size * blocks
            signs = rng.choice([-1, 1], k).astype(np.float32)
            for x in activation_rows(rows * k):
                check_hadamard(kernel, guarded, x.reshape(rows, k), signs, block_size)


def check_hadamard(
    kernel: Kernel, guarded: Guarded, x: np.ndarray, signs: np.ndarray, block_size: int
) -> None:
    expected = reference.block_hadamard(x, signs, block_size)
    apart, signs = guarded(np.full_like(x, 77)), guarded(signs)
    in_place = guarded(x)
    for y, source in ((apart, guarded(x)), (in_place, in_place)):
        _native.hadamard(source, signs, y, block_size=block_size, isa=kernel.isa)
        assert np.array_equal(y, expected, equal_nan=True), (x.shape, block_size)
        zeros = expected == 0
        assert np.array_equal(np.signbit(y[zeros]), np.signbit(expected[zeros]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size must be a power of two"),
        ({"block_size": 24}, "block_size must be a power of two"),
        ({"block_size": 32}, "K = 48 is no multiple of 32"),
        ({"signs": np.ones(47, np.float32)}, r"signs must be \(48,\)"),
        ({"y": np.ones((1, 48), np.float32)}, "x and y must have the same shape"),
        ({"x": np.ones((0, 48), np.float32)}, "x must not be empty"),
    ],
)
def test_hadamard_of_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    case = {
        "x": np.ones((2, 48), np.float32),
        "signs": np.ones(48, np.float32),
        "y": np.ones((2, 48), np.float32),
        "block_size": 16,
    }
    with pytest.raises(ValueError, match=message):
        _native.hadamard(**{**case, **change}, isa="scalar")


# Rows, tokens, width and width of y around the edges of strips, vectors, panels and their halves.
HEADS = [
    *((rows, 70, 20, 40) for rows in range(1, 25)),
    *((7, tokens, 8, 16) for tokens in (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 300)),
    *((6, 40, width, 16) for width in (0, 1, 2, 7, 31, 32, 64, 100)),
    *((13, 33, 5, width) for width in (1, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 96, 128)),
]


def head(rows: int, tokens: int, width: int, value_width: int, kind: str) -> tuple[np.ndarray, ...]:
    """Return q, k, v and mask (rows, tokens) of one head: ordinary, or such as overflow or are masked."""
    rng = np.random.default_rng([rows, tokens, width, value_width])
    q, k = rng.normal(size=(rows, width)), rng.normal(size=(tokens, width))
    v, mask = rng.normal(size=(tokens, value_width)), rng.normal(size=(rows, tokens))
    if kind == "far apart":
        q *= 40
    if kind == "masked":
        mask = np.where(rng.random((rows, tokens)) < 0.5, rng.choice([-1e9, -np.inf], (rows, tokens)), 0)
        mask[0] = -np.inf
    if kind == "not finite":
        for array in (q, k, v):
            array.flat[:: array.size // 2 + 1] = rng.choice([np.nan, np.inf, -np.inf, 3e38])
    return tuple(x.astype(np.float32) for x in (q, k, v, mask))


def attend(
    kernel: Kernel,
    guarded: Guarded,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    nan_to_zero: bool = False,
) -> np.ndarray:
    """Lay out one head as the kernel reads it; return y (rows, width of v)."""
    (rows, width), (tokens, value_width) = q.shape, v.shape
    padded = -(-tokens // 64) * 64
    keys = np.full((padded, width), 5, np.float32)
    keys[:tokens] = k
    values = np.full((tokens, -(-value_width // 16) * 16), 5, np.float32)
    values[:, :value_width] = v
    masks = np.full((mask.shape[0], padded), -np.inf, np.float32)
    masks[:, :tokens] = mask
    scores = guarded(np.zeros((rows, padded), np.float32))
    y = guarded(np.zeros((rows, value_width), np.float32))
    panels = np.ascontiguousarray(keys.reshape(padded // 64, 64, width).transpose(0, 2, 1))
    inputs = (guarded(array) for array in (q, panels, values, masks))
    _native.attention(*inputs, scores, y, scale=0.25, nan_to_zero=nan_to_zero, isa=kernel.isa)
    return y


@every("attention")
@pytest.mark.parametrize("kind", ["ordinary", "far apart", "masked", "not finite"])
def test_attention_equals_reference(kernel: Kernel, guarded: Guarded, kind: str) -> None:
    for shape in HEADS:
        q, k, v, mask = head(*shape, kind)
        heads = [x[None, :, None] for x in (q, k, v)]
        for masks in (mask, mask[-1:]):  # one for each row, one for all
            for guard in (False, True):
                expected = reference.attention(*heads, masks, 0.25, guard)[0, :, 0]
                y = attend(kernel, guarded, q, k, v, masks, guard)
                assert np.array_equal(y, expected, equal_nan=True), shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.ones((25, 8), np.float32)}, "q must have 1 to 24 rows"),
        ({"keys": np.ones((2, 9, 64), np.float32)}, r"keys must be \(panels, 8, 64\)"),
        ({"values": np.ones((64, 16), np.float32)}, "values must fill the panels of keys"),
        ({"mask": np.ones((2, 128), np.float32)}, r"mask must be \(1 or 3, 128\)"),
        ({"scores": np.ones((3, 127), np.float32)}, r"scores must be \(3, 128\)"),
        ({"y": np.ones((3, 17), np.float32)}, "y must have the rows of q and the width of v"),
    ],
)
def test_attention_of_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"q": (3, 8), "keys": (2, 8, 64), "values": (70, 16)}
    shapes |= {"mask": (1, 128), "scores": (3, 128), "y": (3, 10)}
    case = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        _native.attention(**case | change, scale=1.0, isa="scalar")


@every("transpose")
def test_transpose_equals_numpy(kernel: Kernel, guarded: Guarded) -> None:
    for rows, cols in ((1, 1), (7, 9), (8, 8), (9, 16), (16, 7), (31, 33), (32, 64), (5, 64)):
        x = guarded(np.arange(rows * cols, dtype=np.float32).reshape(rows, cols))
        y = guarded(np.zeros((cols, rows), np.float32))
        _native.transpose(x, y, isa=kernel.isa)
        assert np.array_equal(y, x.T), (rows, cols)


def weight_rows(k: int) -> Iterator[np.ndarray]:
    """Yield rows of weights that are ordinary, large, tiny, one-sided, signed zeros, or on thresholds."""
    rng = np.random.default_rng(k)
    x = rng.normal(size=k).astype(np.float32)
    yield x
    yield x * np.float32(6e37)
    yield x * np.float32(1e-42)
    yield np.abs(x)
    yield -np.abs(x)
    yield rng.choice([0.0, -0.0], k).astype(np.float32)
    yield rng.choice([0.0, 0.5, -0.5, 1.5, -1.5], k).astype(np.float32)


def lanes(terms: np.ndarray) -> np.float64:
    """Sum float64 terms in the order of ext/kernel.h."""
    lane = np.zeros(8)
    for start in range(0, terms.size, 8):
        part = terms[start : start + 8]
        lane[: part.size] += part
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]))


WEIGHT_EDGES = [*range(1, 36), 63, 64, 65, 127, 128, 129, 1031]


@every("moments")
def test_moments_are_sums_in_lanes_and_extremes(kernel: Kernel, guarded: Guarded) -> None:
    for k in WEIGHT_EDGES:
        for w in weight_rows(k):
            for block_size in (0, 16, 20, 64):
                groups = blocks(w, block_size)
                out = guarded(np.zeros((len(groups), 3)))
                _native.row_moments(guarded(w), out, block_size=block_size, isa=kernel.isa)
                expected = [[lanes(np.abs(g, dtype=np.float64)), g.min(), g.max()] for g in groups]
                assert np.array_equal(out, expected), (k, block_size)


@every("moments")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_moments_of_what_is_not_finite_are_not_finite(kernel: Kernel, guarded: Guarded, bad: float) -> None:
    for k, at in ((1, 0), (8, 3), (13, 12), (40, 17)):
        w = np.ones(k, np.float32)
        w[at] = bad
        out = guarded(np.zeros((1, 3)))
        _native.row_moments(guarded(w), out, isa=kernel.isa)
        assert not np.isfinite(out[0, 0])


@every("optimum")
@pytest.mark.parametrize("levels", [3, 4])
def test_optimum_equals_reference(kernel: Kernel, guarded: Guarded, levels: int) -> None:
    for k in (*WEIGHT_EDGES, 300):
        rng = np.random.default_rng(k)
        for w in (*weight_rows(k), rng.choice(np.float32([0.5, -0.5, 0.25, -1, 2, 0]), k)):
            for block_size in (0, 16, 20, 64):
                groups = blocks(w, block_size)
                scale = guarded(np.zeros(len(groups), np.float32))
                _native.row_optimum(guarded(w), scale, levels, block_size=block_size, isa=kernel.isa)
                expected = [reference.least_squares(g, levels) if g.any() else 0 for g in groups]
                assert np.array_equal(scale, expected), (k, block_size)


STEPS = np.float32(
    [
        [1, 0.5, np.inf, 0.9],
        [-1, 0.5, 1.5, -1.1],
        [2, 1, 3, 0.5],
        [0, 0, np.inf, 0],
        [1e5, 0.5, 1.5, 1e-5],
        [1, np.inf, np.inf, 3e38],
    ]
)


@every("assign")
def test_assign_equals_reference(kernel: Kernel, guarded: Guarded) -> None:
    for k in WEIGHT_EDGES:
        for w in weight_rows(k):
            for block_size in (0, 16, 20, 64):
                check_assign(kernel, guarded, w, block_size)


def check_assign(kernel: Kernel, guarded: Guarded, w: np.ndarray, block_size: int) -> None:
    groups = blocks(w, block_size)
    steps = guarded(np.resize(np.roll(STEPS, w.size, axis=0), (len(groups), 4)))
    with np.errstate(over="ignore"):
        ts = [reference.assign(group, *step) for group, step in zip(groups, steps, strict=True)]
        left = np.concatenate([g - step[3] * t for g, step, t in zip(groups, steps, ts, strict=True)])
    expected = reference.pack_i2s(np.concatenate(ts) + 1)
    for with_packed, with_rest in ((True, False), (False, True), (True, True)):
        row = guarded(w)
        packed = guarded(np.zeros_like(expected)) if with_packed else None
        rest = row if with_rest else None
        _native.row_assign(row, steps, packed, rest, block_size=block_size, isa=kernel.isa)
        assert packed is None or np.array_equal(packed, expected), (w.size, block_size)
        assert np.array_equal(row, left if with_rest else w), (w.size, block_size)


@every("decode")
@pytest.mark.parametrize("add", [False, True])
def test_decode_equals_reference(kernel: Kernel, guarded: Guarded, add: bool) -> None:
    rng = np.random.default_rng(0)
    for k in WEIGHT_EDGES:
        for block_size in (0, 16, 20, 64):
            groups = len(reference.group_starts(k, block_size))
            codes = rng.integers(0, 4, (1, 1, k), np.uint8)
            scale, zero_point = rng.normal(size=(2, 1, 1, groups)).astype(np.float32)
            packed = reference.pack_i2s(codes)
            start = rng.normal(size=k).astype(np.float32)
            out = guarded(start)
            _native.row_decode(
                guarded(packed[0, 0]),
                guarded(scale[0, 0]),
                guarded(zero_point[0, 0]),
                out,
                block_size=block_size,
                add=add,
                isa=kernel.isa,
            )
            expected = reference.dequantize(packed, scale, zero_point, k, block_size)[0]
            assert np.array_equal(out, start + expected if add else expected), (k, block_size)


@every("compare")
def test_compare_sums_in_lanes(kernel: Kernel, guarded: Guarded) -> None:
    for k in WEIGHT_EDGES:
        for w in weight_rows(k):
            decoded = np.round(w)
            error, signal, zeros = _native.row_compare(guarded(w), guarded(decoded), isa=kernel.isa)
            wide = w.astype(np.float64)
            assert error == lanes((wide - decoded) ** 2), k
            assert signal == lanes(wide**2), k
            assert zeros == np.count_nonzero(decoded == 0), k


@every("panel")
def test_panel(kernel: Kernel, guarded: Guarded) -> None:
    """Words of 4 x 4 fields change rows for columns, inside and among each other."""
    rng = np.random.default_rng(0)
    for width in (1, 2, 3, 4):
        for steps in (*range(1, 20), 31, 32, 33, 160):
            rows = guarded(rng.integers(0, 256, (16 * width, 4 * steps), np.uint8))
            out = guarded(np.zeros(rows.size, np.uint8))
            _native.panel(rows, out, isa=kernel.isa)
            fields = rows[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3
            words = fields.reshape(16 * width, steps, 4, 4).transpose(1, 0, 3, 2)
            expected = (words << np.array([0, 2, 4, 6], np.uint8)).sum(axis=-1, dtype=np.uint8)
            assert np.array_equal(out, expected.reshape(-1))
