"""A whole packed layer on each instruction set against the NumPy oracle, however it is split into tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnx_bitnet import _native, reference

Guarded = Callable[[np.ndarray], np.ndarray]

ISAS = [
    pytest.param(name, marks=pytest.mark.skipif(not runs_here, reason=f"this CPU lacks {name}"))
    for name, runs_here in _native.isas()
]


def make_case(
    seed: int,
    *,
    n: int = 70,
    k: int = 150,
    m: int = 5,
    planes: int = 1,
    block_size: int = 0,
    rows: str = "n",
    zero_point: float | None = 1.0,
    bias: bool = True,
    dtype: type = np.float32,
    **options: Any,
) -> dict[str, Any]:
    """Make the arguments of `matmul`; zero_point None means a different one for each scale."""
    rng = np.random.default_rng(seed)
    shape = (planes, n if rows == "n" else 1, len(reference.group_starts(k, block_size)))
    return {
        "x": rng.normal(size=(m, k)).astype(dtype),
        "weight": reference.pack_i2s(rng.integers(0, 4, (planes, n, k), np.uint8)),
        "scale": rng.normal(size=shape).astype(np.float32),
        "zero_point": (rng.normal(size=shape) if zero_point is None else np.full(shape, zero_point)).astype(
            np.float32
        ),
        "bias": rng.normal(size=n).astype(np.float32) if bias else None,
        "k": k,
        "block_size": block_size,
        **options,
    }


def assert_equals_reference(case: dict[str, Any], isa: str, threads: int = 1) -> None:
    expected = reference.matmul(**case)
    got = _native.matmul(**case, isa=isa, threads=threads)
    assert got.dtype == expected.dtype
    assert np.array_equal(got, expected, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_each_feature_equals_reference(isa: str, bits: int, dtype: type) -> None:
    cases = [
        {},
        {"planes": 2},
        {"planes": 3, "block_size": 64},
        {"planes": 4, "zero_point": None},
        {"rows": "1"},
        {"rows": "1", "block_size": 32},
        {"block_size": 16},
        {"block_size": 37},
        {"block_size": 1, "k": 9},
        {"block_size": 1000},
        {"zero_point": 1.5},
        {"zero_point": 0.0, "block_size": 32},
        {"zero_point": None, "block_size": 32},
        {"bias": False},
        {"activation_scale": 0.017},
        {"activation_scale": 0.017, "block_size": 64, "planes": 2},
        {"m": 33, "n": 130, "block_size": 20},
        {"k": 33000, "n": 3, "zero_point": 1.0},
    ]
    for seed, options in enumerate(cases):
        assert_equals_reference(make_case(seed, activation_bits=bits, dtype=dtype, **options), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_shapes_equal_reference(isa: str) -> None:
    for seed in range(150):
        rng = np.random.default_rng(1000 + seed)
        n, k, m = (int(rng.integers(1, high)) for high in (131, 300, 40))
        block_size = int(rng.choice([0, 0, 16, 32, 50]))
        bits = int(rng.choice([8, 16]))
        case = make_case(
            seed, n=n, k=k, m=m, block_size=block_size, activation_bits=bits, planes=int(rng.integers(1, 5))
        )
        assert_equals_reference(case, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_every_number_of_rows_equals_reference(isa: str) -> None:
    for m in range(1, 41):
        for n, bits in ((64, 8), (70, 16)):
            assert_equals_reference(make_case(m, n=n, m=m, activation_bits=bits), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_t5_equals_i2s(isa: str) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, k, m = (int(rng.integers(1, high)) for high in (200, 700, 40))
        options: dict[str, Any] = {"zero_point": 1.0, "activation_bits": int(rng.choice([8, 16]))}
        if seed % 4 == 3:  # these get panels of i2s, or merge
            options |= [{"planes": 2}, {"block_size": 160}, {"activation_bits": 32}][seed // 4 % 3]
        case = make_case(seed, n=n, k=k, m=m if seed % 2 else 1 + m % 10, **options)
        codes = rng.integers(0, 3, (*case["weight"].shape[:2], k), np.uint8)
        case["weight"] = reference.pack_i2s(codes)
        expected = _native.matmul(**case, isa=isa)
        if case["activation_bits"] != 32:
            assert np.array_equal(expected, reference.matmul(**case))
        case["weight"] = reference.pack_t5(codes)
        got = _native.matmul(**case, isa=isa, format="t5", threads=1 + seed % 2)
        assert np.array_equal(got, expected), seed


def in_ratio(
    case: dict[str, Any], ratio: tuple[float, ...], zero_points: tuple[float, ...]
) -> dict[str, Any]:
    """Give the planes of a case scales in that ratio, exact in float32, and zero points."""
    scale = (case["scale"][-1].view(np.uint32) & 0xFFFFFF00).view(np.float32)
    return {
        **case,
        "scale": np.stack([scale * np.float32(r) for r in ratio]),
        "zero_point": np.float32(zero_points)[:, None, None] + np.zeros_like(case["zero_point"][:, :1, :1]),
    }


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("ratio", "zero_points"),
    [
        ((4, 1), (2, 0)),
        ((3, 1), (1, 1)),
        ((4, 1), (1.5, 1.5)),
        ((4, 1), (-128, 128)),
        ((16, 4, 1), (1, 1, 1)),
        ((27, 9, 3, 1), (1, 1, 1, 1)),
        ((64, 16, 4, 1), (2, 0, 0, 0)),
        ((1, 1, 1), (1, 0, 2)),
    ],
)
def test_planes_in_ratio_equal_reference(
    isa: str, bits: int, ratio: tuple[int, ...], zero_points: tuple[float, ...]
) -> None:
    for seed, options in enumerate(
        [
            {},
            {"k": 300, "m": 1, "n": 64},
            {"k": 2049, "m": 2, "n": 16},
            {"block_size": 32, "m": 17},
            {"block_size": 37, "n": 130, "m": 6, "rows": "1"},
            {"activation_scale": 0.017, "dtype": np.float16},
            {"k": 1, "n": 1, "m": 1},
        ]
    ):
        case = make_case(seed, planes=len(ratio), activation_bits=bits, **options)
        case = in_ratio(case, ratio, zero_points)
        codes = reference.unpack_i2s(case["weight"], case["k"])
        merged, *_ = reference.merge_planes(codes, case["scale"], case["zero_point"], case["k"])
        assert len(merged) == 1
        assert_equals_reference(case, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
def test_merged_planes_of_the_longest_group_do_not_overflow(isa: str, bits: int) -> None:
    for k in (2**16, 2**16 + 1):
        case = make_case(0, n=5, k=k, m=2, planes=4, activation_bits=bits, activation_scale=1.0, bias=False)
        case = in_ratio(case, (64, 16, 4, 1), (2, 0, 0, 0))
        case["weight"] = reference.pack_i2s(np.full((4, 5, k), 3, np.uint8))
        case["x"][:] = -(2.0 ** (bits - 1))
        assert_equals_reference(case, isa)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("ratio", [(4, 1), (64, 16, 4, 1)])
def test_planes_nearly_in_ratio_stay_apart(bits: int, ratio: tuple[int, ...]) -> None:
    case = make_case(1, planes=len(ratio), activation_bits=bits, block_size=32)
    case = in_ratio(case, ratio, (2, 0, 0, 0)[: len(ratio)])
    merged = _native.matmul(**case)
    for way in (np.inf, -np.inf):
        scale = case["scale"].copy()
        scale[0, 3, 1] = np.nextafter(scale[0, 3, 1], np.float32(way))
        near = {**case, "scale": scale}
        got = _native.matmul(**near)
        assert np.array_equal(got, reference.matmul(**near))
        assert not np.array_equal(np.delete(got, 3, axis=1), np.delete(merged, 3, axis=1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 32}, {"zero_point": None}, {"zero_point": 0.0}, {"zero_point": 1.5, "planes": 2}],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_float_activations_are_close_to_reference(isa: str, options: dict[str, Any], dtype: type) -> None:
    for seed, (n, k, m) in enumerate([(1, 1, 1), (70, 150, 5), (64, 2049, 1), (65, 257, 18)]):
        case = make_case(seed, n=n, k=k, m=m, activation_bits=32, dtype=dtype, **options)
        case["x"] += dtype(2)
        expected = reference.matmul(**case)
        magnitude = {
            **case,
            "x": np.abs(case["x"]),
            "scale": np.abs(case["scale"]),
            "zero_point": np.full_like(case["scale"], -2),
        }
        bound = np.abs(reference.matmul(**magnitude).astype(np.float64)) + 1
        got = _native.matmul(**case, isa=isa)
        assert (
            np.abs(got - expected.astype(np.float64)) <= (1e-6 if dtype is np.float32 else 1e-3) * bound
        ).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("options", [{}, {"block_size": 32}, {"activation_scale": 0.01}])
def test_rows_that_are_not_finite_become_nan_and_others_stay(
    isa: str, bits: int, options: dict[str, Any]
) -> None:
    case = make_case(3, m=7, activation_bits=bits, **options)
    clean = _native.matmul(**case, isa=isa)
    case["x"][1, 0], case["x"][3, -1], case["x"][5, 77] = np.nan, np.inf, -np.inf
    got = _native.matmul(**case, isa=isa)
    assert np.isnan(got[1::2]).all()
    assert np.array_equal(got[0::2], clean[0::2])


@pytest.mark.parametrize("isa", ISAS)
def test_zero_rows_give_the_bias(isa: str) -> None:
    for bits in (8, 16, 32):
        case = make_case(4, activation_bits=bits)
        case["x"][:] = 0
        assert np.array_equal(_native.matmul(**case, isa=isa), np.broadcast_to(case["bias"], (5, 70)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("m", [1, 40, 90, 210])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_results_do_not_depend_on_tasks(isa: str, bits: int, m: int, dtype: type) -> None:
    case = make_case(5, n=700, k=900, m=m, block_size=256, planes=2, dtype=dtype, activation_bits=bits)
    once = _native.matmul(**case, isa=isa)
    for threads in (2, 3, 5):  # with 210 rows two and three have rows enough to take tasks of rows
        assert np.array_equal(_native.matmul(**case, isa=isa, threads=threads), once)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_row_does_not_depend_on_its_neighbours(isa: str, bits: int) -> None:
    case = make_case(6, m=37, n=100, activation_bits=bits)
    together = _native.matmul(**case, isa=isa)
    for row in range(37):
        alone = _native.matmul(**{**case, "x": case["x"][row : row + 1]}, isa=isa)
        if bits == 32:
            assert np.allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)
        else:
            assert np.array_equal(alone[0], together[row])


@pytest.mark.parametrize("isa", ISAS)
def test_inputs_are_read_within_bounds(isa: str, guarded: Guarded) -> None:
    for seed, (n, k, block_size, bits) in enumerate(
        [(1, 1, 0, 8), (17, 5, 0, 16), (66, 131, 32, 8), (64, 64, 0, 32)]
    ):
        case = make_case(seed, n=n, k=k, block_size=block_size, activation_bits=bits)
        inputs = {
            name: guarded(value) if isinstance(value, np.ndarray) else value for name, value in case.items()
        }
        for x in (inputs["x"], guarded(case["x"].astype(np.float16))):
            got = _native.matmul(**{**inputs, "x": x}, isa=isa)
            assert np.array_equal(got, _native.matmul(**{**case, "x": x}, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
def test_leading_axes_are_kept(isa: str) -> None:
    case = make_case(7, m=6)
    expected = _native.matmul(**case, isa=isa)
    assert np.array_equal(
        _native.matmul(**{**case, "x": case["x"].reshape(2, 3, 150)}, isa=isa), expected.reshape(2, 3, 70)
    )
    assert np.array_equal(_native.matmul(**{**case, "x": case["x"][0]}, isa=isa), expected[0])
    assert _native.matmul(**{**case, "x": case["x"][:0]}, isa=isa).shape == (0, 70)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 7), np.float32)}, r"x is \(2, 7\), expected \(\.\.\., 150\)"),
        ({"x": np.zeros((2, 150))}, "x is float64, expected float32 or float16"),
        ({"weight": np.zeros((70, 38), np.uint8)}, "weight must be uint8"),
        ({"weight": np.full((5, 70, 38), 0x55, np.uint8)}, "1 to 4 planes"),
        ({"k": 200}, "rows of 38 bytes, K = 200 needs 50"),
        ({"k": 149}, "a code past K is not 1"),
        ({"block_size": -1}, "block_size must not be negative"),
        ({"block_size": 32}, r"scale has shape \(1, 70, 2\), expected \(1, 70 or 1, 5 or 1\)"),
        (
            {"zero_point": np.ones((1, 2, 1), np.float32)},
            r"zero_point has shape \(1, 2, 1\), expected \(1, 70 or 1, 2 or 1\)",
        ),
        ({"bias": np.zeros(3, np.float32)}, r"bias must have shape \(70,\)"),
        ({"activation_bits": 4}, "activation_bits must be 8, 16 or 32"),
        ({"activation_scale": -1.0}, "activation_scale must be 0 or a positive number"),
        ({"activation_scale": float("nan")}, "activation_scale must be 0 or a positive number"),
        ({"isa": "sse9"}, "isa 'sse9': no instruction set has this name"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    case = make_case(8, block_size=100)
    case["weight"][:, :, -1] |= 0x40
    case["weight"][:, :, -1] &= 0x7F
    with pytest.raises(ValueError, match=message):
        _native.matmul(**{**case, **change})


def test_sums_that_would_overflow_are_refused() -> None:
    k = 2**18 + 1
    case = make_case(9, n=1, k=k, m=1)
    with pytest.raises(ValueError, match="more than 262144 inputs share a scale"):
        _native.matmul(**case)
    case = make_case(9, n=1, k=k, m=1, block_size=2**18, bias=False)
    assert np.array_equal(_native.matmul(**case), reference.matmul(**case))
