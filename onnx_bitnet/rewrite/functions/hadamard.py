"""The body of BlockHadamard: blocks times a matrix made of the bits of row and column numbers."""

from __future__ import annotations

from string import Template

import onnx_ir as ir

from onnx_bitnet.rewrite.functions.common import of_type_of_x, parsed

HADAMARD = "BlockHadamard"

_BLOCK_HADAMARD = Template("""
<opset_import: ["" : $opset], domain: "$domain">
$op_type <block_size> (x, signs) => (y)
{
    int_0 = Constant <value = int64[1] {0}> ()
    int_1 = Constant <value = int64[1] {1}> ()
    int_2 = Constant <value = int64[1] {2}> ()
    last = Constant <value = int64[1] {-1}> ()
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
$block_size

    # block: the largest power of two up to block_size. Where they differ, or K is no multiple of it,
    # width is 0, which fits no Reshape.
    powers = Constant <value = int64[13] {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096}> ()
    is_larger = Greater (powers, block_size)
    candidates = Where (is_larger, int_1, powers)
    block = ReduceMax <keepdims = 1> (candidates)
    K = Shape (signs)
    rest = Mod (K, block)
    is_power = Equal (block, block_size)
    is_multiple = Equal (rest, int_0)
    fits = And (is_power, is_multiple)
    width = Where (fits, block, int_0)

    # H (block, block): -1 where the numbers of row and column share an odd number of bits, else 1;
    # then divided by its norm
    block_scalar = Squeeze (block)
    numbers = Range (zero, block_scalar, one)
    column_shape = Constant <value = int64[2] {-1, 1}> ()
    column = Reshape (numbers, column_shape)
    shifted = Div (column, powers)
    int_bits = Mod (shifted, int_2)
    bits = Cast <to = 1> (int_bits)
    bits_turned = Transpose <perm = [1, 0]> (bits)
    shared_bits = MatMul (bits, bits_turned)
    int_shared_bits = Cast <to = 7> (shared_bits)
    parity = Mod (int_shared_bits, int_2)
    is_odd = Equal (parity, int_1)
    float_block = Cast <to = 1> (block)
    norm = Sqrt (float_block)
    positive = Reciprocal (norm)
    negative = Neg (positive)
    H = Where (is_odd, negative, positive)

    # y = H times each block of x * signs
    x_shape = Shape (x)
    leading = Slice (x_shape, int_0, last)
    block_count = Div (K, block)
    blocks_shape = Concat <axis = 0> (leading, block_count, width)
    float_x = Cast <to = 1> (x)
    signed_x = Mul (float_x, signs)
    blocks = Reshape (signed_x, blocks_shape)
    transformed = MatMul (blocks, H)
    float_y = Reshape (transformed, x_shape)
    y = $y
}
""")

_BLOCK_SIZE = """
    block_size_scalar = Constant <value_int: int = @block_size> ()
    block_size = Reshape (block_size_scalar, int_1)"""

# As _ATTRIBUTES_11 of matmul.py; a block_size beyond 4096 gives 0.
_BLOCK_SIZE_11 = """
    row_shape = Constant <value = int64[2] {1, 4097}> ()
    row = ConstantOfShape (row_shape)
    block_size_row = EyeLike <k: int = @block_size> (row)
    block_size = ArgMax <axis = 1, keepdims = 0> (block_size_row)"""


def body(opset: int) -> ir.Function:
    """Make the body of BlockHadamard for models that import this version of the default domain.

    y = the Walsh-Hadamard transform of x * signs in blocks of the last axis, divided by sqrt(block_size), for
    x of any rank from 1 up. x may be float16 from opset 15 on. Where block_size is no power of two from 1 to
    4096, or K is no multiple of it, the body fails to run.

    Raises:
        ValueError: the opset is not in OPSETS.
    """
    return parsed(
        _BLOCK_HADAMARD,
        opset,
        op_type=HADAMARD,
        block_size=_BLOCK_SIZE if opset >= 12 else _BLOCK_SIZE_11,
        y=of_type_of_x(opset),
    )
