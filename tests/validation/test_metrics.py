"""Metrics: equal to the plain formulas on all batches at once, and sensible at the edges."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest

from onnx_bitnet.validation.metrics import Accumulator, Metrics


def measure(*batches: tuple[np.ndarray, np.ndarray]) -> Metrics:
    accumulator = Accumulator()
    for reference, got in batches:
        accumulator.update(reference, got)
    return accumulator.result()


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_batches_give_the_formulas_of_the_concatenated_tensors(dtype):
    rng = np.random.default_rng(1)
    # The long rows and the many rows do not fit one chunk.
    for columns, counts in ((7, (3, 20000, 1)), (70000, (2, 1))):
        pairs = []
        for count in counts:
            reference = rng.standard_normal((1, count, columns)).astype(dtype)
            noise = 0.1 * rng.standard_normal(reference.shape)
            pairs.append((reference, (reference.astype(np.float64) + noise).astype(dtype)))
        got = measure(*pairs)
        r, g = (np.concatenate([pair[i][0] for pair in pairs]).astype(np.float64) for i in (0, 1))
        error = g - r
        assert got.elements == r.size
        assert not got.identical
        assert got.agreement is None
        assert got.sqnr_db == pytest.approx(10 * np.log10((r**2).sum() / (error**2).sum()))
        assert got.cosine == pytest.approx((r * g).sum() / (np.linalg.norm(r) * np.linalg.norm(g)))
        rows = (r * g).sum(1) / (np.linalg.norm(r, axis=1) * np.linalg.norm(g, axis=1))
        assert got.row_cosine == pytest.approx(rows.mean())
        assert got.relative_l2 == pytest.approx(np.linalg.norm(error) / np.linalg.norm(r))
        assert got.max_abs == np.abs(error).max()
        assert got.top1 == (r.argmax(1) == g.argmax(1)).mean()
        p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (r, g))
        assert got.kl == pytest.approx((p * np.log(p / q)).sum(1).mean())


def test_identical_tensors_have_infinite_sqnr_which_json_writes_as_null():
    x = f32(1, -2, 3).reshape(1, 3)
    got = measure((x, x.copy()))
    assert got.identical
    assert got.sqnr_db == math.inf
    assert (got.cosine, got.relative_l2, got.max_abs, got.top1, got.kl) == (1.0, 0.0, 0.0, 1.0, 0.0)
    document = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert document["sqnr_db"] is None
    assert document["identical"] is True


def test_zero_tensors_give_numbers():
    zero, one = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    both = measure((zero, -zero))
    assert both.identical
    assert (both.cosine, both.row_cosine, both.relative_l2) == (1.0, 1.0, 0.0)
    noise = measure((zero, one))
    assert (noise.sqnr_db, noise.relative_l2) == (-math.inf, math.inf)
    assert (noise.cosine, noise.row_cosine, noise.max_abs) == (0.0, 0.0, 1.0)
    silence = measure((one, zero))
    assert (silence.sqnr_db, silence.relative_l2, silence.cosine) == (0.0, 1.0, 0.0)
    json.dumps([m.to_dict() for m in (both, noise, silence)], allow_nan=False)


def test_elements_that_are_not_finite_alike_are_equal():
    x = f32(1, math.nan, math.inf, -math.inf).reshape(1, 4)
    got = measure((x, x.copy()), (f32(1, 2, 3, 4).reshape(1, 4), f32(1, 2, 3, 5).reshape(1, 4)))
    assert (got.nonfinite_reference, got.nonfinite_got, got.nonfinite_differ) == (3, 3, 0)
    assert not got.identical
    assert got.sqnr_db == pytest.approx(10 * math.log10(31))
    assert measure((x, x.copy())).identical


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_element_finite_in_only_one_tensor_is_an_infinite_error(wrong):
    good, bad = f32(1, 2, 3, 4).reshape(2, 2), f32(1, 2, 3, wrong).reshape(2, 2)
    for reference, other, counts in ((good, bad, (0, 1)), (bad, good, (1, 0))):
        got = measure((reference, other))
        assert (got.nonfinite_reference, got.nonfinite_got) == counts
        assert got.nonfinite_differ == 1
        assert not got.identical
        assert (got.sqnr_db, got.cosine, got.max_abs) == (-math.inf, 0.0, math.inf)
        assert got.row_cosine == pytest.approx(0.5)
        json.dumps(got.to_dict(), allow_nan=False)
    assert measure((good, bad)).top1 == (0.5 if math.isnan(wrong) else 1.0)


def test_other_infinity_is_an_infinite_error():
    assert measure((f32(1, math.inf), f32(1, -math.inf))).nonfinite_differ == 1


def test_large_logits_do_not_overflow_the_softmax():
    got = measure((f32(1e4, 0).reshape(1, 2), f32(9e3, 0).reshape(1, 2)))
    assert got.kl == 0.0
    assert measure((f32(1e4, 0).reshape(1, 2), f32(0, 1e4).reshape(1, 2))).kl == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("reference", "got", "share"),
    [
        (np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), 0.75),
        (np.array([True, False]), np.array([True, True]), 0.5),
        (np.array(["a", "b"], object), np.array(["a", "b"], object), 1.0),
        (np.array([], np.int64), np.array([], np.int64), 1.0),
    ],
)
def test_integers_booleans_and_strings_have_exact_agreement(reference, got, share):
    result = measure((reference, got))
    assert (result.agreement, result.identical) == (share, share == 1.0)
    assert result.sqnr_db is None
    assert result.cosine is None


def test_scalars_columns_and_empty_tensors():
    scalar = measure((np.float32(2).reshape(()), np.float32(1).reshape(())))
    assert scalar.sqnr_db == pytest.approx(20 * math.log10(2))
    assert (scalar.top1, scalar.kl, scalar.row_cosine) == (None, None, None)
    column = measure((f32(1, 2).reshape(2, 1), f32(1, 3).reshape(2, 1)))
    assert (column.top1, column.row_cosine) == (None, None)
    empty = np.zeros((0, 5), np.float32)
    assert measure((empty, empty)).identical
    assert measure((empty.reshape(5, 0), empty.reshape(5, 0))).elements == 0


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \[1, 2\] instead of \[2\]"):
        measure((f32(1, 2), f32(1, 2).reshape(1, 2)))
