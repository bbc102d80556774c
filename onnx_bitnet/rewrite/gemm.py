"""Gemm with a constant matrix as B, or as A."""

from __future__ import annotations

from dataclasses import replace

from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.matmul import refuse_both, swap_last
from onnx_bitnet.rewrite.origins import NotConstant
from onnx_bitnet.rewrite.records import Linear, Refusal, Site, operand


def match(site: Site) -> Linear | Refusal:
    """Match one node: y = alpha * A' B' + beta * C.

    1. B is the weight: W = B'^T; A is transposed first with transA.
    2. A is the weight: W = A'; B is transposed first unless transB has it already, y is transposed back.

    C becomes the bias where it is one constant per output, else it is added at the end.
    """
    attributes = site.node.attributes
    trans_a, trans_b = (bool(attributes.get_int(name, 0)) for name in ("transA", "transB"))
    b = site.constant(operand(site.node, 1))
    a = site.constant(operand(site.node, 0)) if isinstance(b, NotConstant) else b
    if isinstance(b, NotConstant) and isinstance(a, NotConstant):
        return refuse_both(site, a, b)
    on_right = isinstance(b, Constant)
    constant = b if on_right else a
    assert isinstance(constant, Constant)
    weight = site.matrix(constant)
    if isinstance(weight, Refusal):
        return weight
    stored_as_k_n = not trans_b if on_right else trans_a
    if stored_as_k_n:
        weight = weight.transpose(1, 0)
    linear = site.linear(0 if on_right else 1, weight.scale(attributes.get_float("alpha", 1.0)))
    x_turned = trans_a if on_right else not trans_b
    linear = replace(
        linear,
        before=(swap_last(2),) if x_turned else (),
        after=() if on_right else (swap_last(2),),
    )
    return _with_c(site, linear, outputs_axis=-1 if on_right else -2)


def _with_c(site: Site, linear: Linear, outputs_axis: int) -> Linear:
    """Take up C, which broadcasts to y; its axis `outputs_axis` is the one of N."""
    beta = site.node.attributes.get_float("beta", 1.0)
    if len(site.node.inputs) < 3 or site.node.inputs[2] is None or beta == 0:
        return linear
    c = site.constant(operand(site.node, 2))
    if isinstance(c, Constant):
        padded = (1, 1, *c.shape)[-2:]
        if padded[outputs_axis] in (1, linear.weight.n) and padded[-3 - outputs_axis] == 1:
            return replace(linear, bias=c.scale(beta))
    return replace(linear, addend_index=2, addend_factor=beta)
