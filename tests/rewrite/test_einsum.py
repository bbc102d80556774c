"""Einsum: equations that are linear layers, and those that are not."""

from __future__ import annotations

import pytest
from rewrite.graphs import EINSUMS, build, ternary
from rewrite.steps import convert, find_one, ops

from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.records import Refusal

AFTER = {
    "einsum_dense": ["MatMulI2S"],
    "einsum_heads_out": ["MatMulI2S", "Reshape"],
    "einsum_heads_in": ["Reshape", "MatMulI2S"],
    "einsum_permuted": ["MatMulI2S", "Reshape", "Transpose"],
    "einsum_ellipsis": ["MatMulI2S"],
    "einsum_ellipsis_middle": ["Transpose", "MatMulI2S", "Transpose"],
    "einsum_weight_first": ["MatMulI2S"],
    "einsum_implicit": ["MatMulI2S"],
    "einsum_vector": ["MatMulI2S", "Reshape"],
    "einsum_crossed": ["Transpose", "Reshape", "MatMulI2S"],
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_becomes(name: str):
    assert ops(convert(EINSUMS[name].model)) == AFTER[name]


def refused(equation: str, weight: tuple[int, ...], operands: str = "x, W") -> Refusal:
    found = find_one(
        build(
            f'g (float[?, ?, ?] x) => (float[] y) {{ y = Einsum <equation = "{equation}"> ({operands}) }}',
            {"W": ternary(*weight)},
        )
    )
    assert isinstance(found, Refusal)
    return found


@pytest.mark.parametrize(
    ("equation", "weight", "detail"),
    [
        ("bsd,ef->bsdef", (3, 4), "it is no product summed over letters that both operands have"),
        ("bsd,de->be", (3, 4), "it is no product summed over letters that both operands have"),
        ("bsd,def->bse", (3, 4, 5), "it sums over a letter of one operand"),
        ("bss,sn->bn", (3, 4), "a letter occurs twice in one operand"),
        ("bsd,dn->bsn", (3, 4, 5), "the weight of shape [3, 4, 5] is 'dn'"),
    ],
)
def test_equation_that_is_no_linear_layer_is_refused(equation: str, weight: tuple[int, ...], detail: str):
    refusal = refused(equation, weight)
    assert (refusal.reason, refusal.detail) == (Reason.EINSUM_NOT_LINEAR, detail)


@pytest.mark.parametrize(
    ("x", "equation", "rows"),
    [("2, 3", "bk,kn->bn", 1), ("2, 1", "bk,kn->bn", 3), ("2, 3", "...k,kn->...n", 1)],
)
def test_a_letter_that_is_broadcast_is_refused(x: str, equation: str, rows: int):
    # onnxruntime and NumPy let an axis of length 1 stand for one of any length
    found = find_one(
        build(
            f'g (float[{x}] x) => (float[?, 4] y) {{ y = Einsum <equation = "{equation}"> (x, W) }}',
            {"W": ternary(rows, 4)},
        )
    )
    assert isinstance(found, Refusal)
    assert found.reason is Reason.EINSUM_NOT_LINEAR
    assert found.detail == f"'k' is {x[-1]} long in one operand and {rows} in the other"


def test_batched_weight_is_refused():
    refusal = refused("ebd,edn->ebn", (2, 3, 4))
    assert refusal.reason is Reason.WEIGHT_BATCHED


@pytest.mark.parametrize(("operands", "equation"), [("x", "abc->acb"), ("x, W, W", "bsd,de,ef->bsf")])
def test_other_than_two_operands_are_refused(operands: str, equation: str):
    refusal = refused(equation, (3, 3), operands)
    assert refusal.reason is Reason.EINSUM_NOT_LINEAR
    assert refusal.detail == f"it has {operands.count(',') + 1} operands"


def test_two_changing_operands_are_refused():
    assert refused("bqd,bkd->bqk", (1, 1), "x, x").reason is Reason.WEIGHT_NOT_CONSTANT


def test_ellipsis_of_unknown_rank_is_refused():
    found = find_one(
        build(
            """g (float[?, 3] x) => (float[] y) {
                h = Relu (x)
                y = Einsum <equation = "...d,dn->...n"> (h, W)
            }""",
            {"W": ternary(3, 4)},
        )
    )
    assert isinstance(found, Refusal)
    assert (found.reason, found.detail) == (Reason.RANK_UNKNOWN, "the rank of 'h' is not stated")
