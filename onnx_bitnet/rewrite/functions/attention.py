"""The body of Attention and of AttentionByHead: a softmax of products, for each head."""

from __future__ import annotations

from string import Template

import onnx_ir as ir

from onnx_bitnet.rewrite.functions.common import parsed

ATTENTION, ATTENTION_BY_HEAD = "Attention", "AttentionByHead"

_ATTENTION = Template("""
<opset_import: ["" : $opset], domain: "$domain">
$op_type <scale, nan_to_zero> (q, k, v, mask) => (y)
{
    zero = Constant <value = float {0.0}> ()
$attributes
$heads
    products = MatMul (q_heads, k_heads)
    scaled = Mul (products, scale)
    scores = Add (scaled, mask)
    softmax = Softmax <axis = 3> (scores)
    nan = IsNaN (softmax)
    gone = And (nan, is_guarded)
    weights = Where (gone, zero, softmax)
    y_heads = MatMul (weights, v_heads)
$y
}
""")

_ATTRIBUTES = """
    scale = Constant <value_float: float = @scale> ()
    nan_to_zero = Constant <value_int: int = @nan_to_zero> ()
    is_guarded = Cast <to = 9> (nan_to_zero)"""

# As _ATTRIBUTES_11 of matmul.py.
_ATTRIBUTES_11 = """
    one = Constant <value = float[1,1] {1.0}> ()
    scale = Gemm <alpha: float = @scale> (one, one)
    row_shape = Constant <value = int64[2] {1, 2}> ()
    row = ConstantOfShape (row_shape)
    nan_to_zero_row = EyeLike <k: int = @nan_to_zero> (row)
    nan_to_zero = ArgMax <axis = 1, keepdims = 0> (nan_to_zero_row)
    is_guarded = Cast <to = 9> (nan_to_zero)"""

_TURN_HEADS = """
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q)
    k_heads = Transpose <perm = [0, 2, 3, 1]> (k)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v)"""

_TURN_KEYS = """
    q_heads = Identity (q)
    k_heads = Transpose <perm = [0, 1, 3, 2]> (k)
    v_heads = Identity (v)"""


def body(opset: int, *, by_head: bool = False) -> ir.Function:
    """Make the body of Attention or AttentionByHead for models with this version of the default domain.

    y = softmax(scale * q k + mask) v for each head: float32 q and y (batch, row, head, width), k and v
    (batch, token, head, width), or all with heads before rows and tokens; v and y may have another width.
    Batches and heads broadcast, the mask does to (batch, head, row, token). A row whose softmax is NaN is
    NaN, or with nan_to_zero the sum of v times zeros.

    Raises:
        ValueError: the opset is not in OPSETS.
    """
    return parsed(
        _ATTENTION,
        opset,
        op_type=ATTENTION_BY_HEAD if by_head else ATTENTION,
        attributes=_ATTRIBUTES if opset >= 12 else _ATTRIBUTES_11,
        heads=_TURN_KEYS if by_head else _TURN_HEADS,
        y="    y = Identity (y_heads)" if by_head else "    y = Transpose <perm = [0, 2, 1, 3]> (y_heads)",
    )
