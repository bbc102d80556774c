"""Conv: 1x1 kernels are linear layers, others are refused."""

from __future__ import annotations

import pytest
from rewrite.graphs import CONVS, K, N, build, numbers, ternary
from rewrite.steps import convert, find_one, ops

from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.records import Refusal


@pytest.mark.parametrize("name", CONVS)
def test_conv_becomes(name: str):
    assert ops(convert(CONVS[name].model)) == ["Transpose", "MatMulI2S", "Transpose"]


def refused(attributes: str, weight: tuple[int, ...], inputs: str = "x, W") -> Refusal:
    spatial = ", ".join("?" * (len(weight) - 2))
    proto = build(
        f"g (float[b, {K}, {spatial}] x, float[{N}] b) => (float[] y) {{ y = Conv {attributes} ({inputs}) }}",
        {"W": ternary(*weight)},
    )
    found = find_one(proto)
    assert isinstance(found, Refusal)
    return found


@pytest.mark.parametrize(
    ("attributes", "weight", "detail"),
    [
        ("", (N, K, 3, 1), "kernel 3x1"),
        ("<strides = [1, 2]>", (N, K, 1, 1), "strides 1x2"),
        ("<pads = [0, 1, 0, 0]>", (N, K, 1, 1), "pads 0x1x0x0"),
        ("<group = 2>", (N, K // 2, 1), "group 2"),
    ],
    ids=["kernel", "strides", "pads", "group"],
)
def test_conv_that_is_not_pointwise_is_refused(attributes: str, weight: tuple[int, ...], detail: str):
    refusal = refused(attributes, weight)
    assert refusal.reason is Reason.CONV_NOT_POINTWISE
    assert refusal.detail == detail


def test_changing_kernel_is_refused():
    refusal = refused("", (N, K, 1), "x, x")
    assert refusal.reason is Reason.WEIGHT_NOT_CONSTANT


def test_changing_bias_is_refused():
    refusal = refused("", (N, K, 1), "x, W, b")
    assert (refusal.reason, refusal.detail) == (Reason.WEIGHT_NOT_CONSTANT, "bias: 'b' is an input")
    assert (refusal.n, refusal.k) == (N, K)


def test_four_spatial_dimensions_are_refused():
    assert refused("", (N, K, 1, 1, 1, 1)).reason is Reason.WEIGHT_RANK


def test_pads_and_strides_that_do_nothing_are_accepted():
    proto = build(
        f"""g (float[b, {K}, h] x) => (float[b, {N}, h] y) {{
            y = Conv <auto_pad = "VALID", dilations = [2]> (x, W, B)
        }}""",
        {"W": ternary(N, K, 1), "B": numbers(N)},
    )
    assert not isinstance(find_one(proto), Refusal)
