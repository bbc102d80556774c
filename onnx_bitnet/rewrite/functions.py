"""Each of our ops spelled in standard ONNX ops, so that files run without the library (promise P4).

An op's FunctionProto must import the same version of the default domain as the model that carries it,
so a body is written for a given opset. Bodies are ONNX text: what differs between opsets is substituted.
Everything that depends on weights and attributes only is a constant chain, which onnxruntime folds to
one float matrix when it loads the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from string import Template
from types import MappingProxyType

import onnx.parser
import onnx_ir as ir

from onnx_bitnet.formats import FORMATS, PANEL_OP, Format

DOMAIN = "onnx_bitnet"
VERSION = 1
ATTENTION, ATTENTION_BY_HEAD = "Attention", "AttentionByHead"
OPSETS = range(11, 27)
"""Opsets of the default domain for which bodies are written. Before 11 there is no BitShift and no Round."""

FLOAT16_OPSET = 15
"""First opset whose bodies give y the type of a float16 x (CastLike); before it x must be float32."""

_MATMUL = Template("""
<opset_import: ["" : $opset], domain: "$domain">
$op_type <K, N, block_size, activation_bits, activation_scale>
          (x, weight, scale, $zero_point bias) => (y)
{
    int_0 = Constant <value = int64[1] {0}> ()
    int_1 = Constant <value = int64[1] {1}> ()
    last = Constant <value = int64[1] {-1}> ()
    float_0 = Constant <value = float {0.0}> ()
    float_1 = Constant <value = float {1.0}> ()
$attributes

    # codes (P, N, K)
    split = Constant <value = int64[4] {0, 0, 0, 1}> ()
    join = Constant <value = int64[3] {0, 0, -1}> ()
    columns = Constant <value = int64[1] {2}> ()
$unpack
    codes = Slice (row_codes, int_0, K, columns)

    # blocks (P, N, G, block): the last one is filled up
    one_block = Equal (block_size, int_0)
    block = Where (one_block, K, block_size)
    minus_K = Neg (K)
    missing = Mod (minus_K, block)
    before = Constant <value = int64[5] {0, 0, 0, 0, 0}> ()
    padding = Concat <axis = 0> (before, missing)
    float_codes = Cast <to = 1> (codes)
    padded = Pad (float_codes, padding)
    block_shape = Concat <axis = 0> (join, block)
    blocks = Reshape (padded, block_shape)

    # W (K, N) = sum over planes of scale * (code - zero_point)
    float_scale = Cast <to = 1> (scale)
    block_scale = Reshape (float_scale, split)
$centre
    planes = Mul (centred, block_scale)
    W_blocks = $sum_of_planes
    two_axes = Constant <value = int64[2] {0, -1}> ()
    W_padded = Reshape (W_blocks, two_axes)
    W_rows = Slice (W_padded, int_0, K, int_1)
    W = Transpose <perm = [1, 0]> (W_rows)

    # inputs as integers -L - 1 to L and the step between two of them
    bits_16 = Constant <value = int64[1] {16}> ()
    bits_32 = Constant <value = int64[1] {32}> ()
    L_8 = Constant <value = float {127.0}> ()
    L_16 = Constant <value = float {32767.0}> ()
    tiny = Constant <value = float {1e-5}> ()
    is_16 = Equal (activation_bits, bits_16)
    is_float = Equal (activation_bits, bits_32)
    is_static = Greater (activation_scale, float_0)
    L = Where (is_16, L_16, L_8)
    minus_L = Neg (L)
    lowest = Sub (minus_L, float_1)
    float_x = Cast <to = 1> (x)
    magnitudes_of_x = Abs (float_x)
    peak = $peak
    absmax = Max (peak, tiny)
    inverse = Div (float_1, absmax)
    dynamic_factor = Mul (inverse, L)
    dynamic_step = Div (absmax, L)
    static_step = Where (is_static, activation_scale, float_1)
    static_factor = Div (float_1, static_step)
    factor = Where (is_static, static_factor, dynamic_factor)
    quantized_step = Where (is_static, static_step, dynamic_step)
    scaled = Mul (float_x, factor)
    rounded = Round (scaled)
    at_most = Min (rounded, L)
    quantized = Max (at_most, lowest)

    # y = Q(x) W + bias; 0 * x is NaN in a row with NaN or Inf, and 0 in all others.
    # onnxruntime does not reduce the last axis of an empty x: Slice makes its length 1.
    q = Where (is_float, float_x, quantized)
    finite_step = Where (is_float, float_1, quantized_step)
    nothings = Mul (float_x, float_0)
    nothing = $nothing
    poisoned_step = Add (finite_step, nothing)
    step = Slice (poisoned_step, int_0, int_1, last)
    product = MatMul (q, W)
    product_scaled = Mul (product, step)
    float_y = Add (product_scaled, bias)
    y = $y
}
""")

# Four codes to a byte, lowest bits first.
_UNPACK_I2S = """
    shifts = Constant <value = uint8[4] {0, 2, 4, 6}> ()
    radix = Constant <value = uint8 {4}> ()
    bytes = Reshape (weight, split)
    shifted = BitShift <direction = "RIGHT"> (bytes, shifts)
    fields = Mod (shifted, radix)
    row_codes = Reshape (fields, join)"""

# Panels of 64 outputs: 16 inputs of each are 4 bytes of 4 fields, which count inputs by 4 and by 1.
_UNPACK_PANELS = """
    shifts = Constant <value = uint8[4] {0, 2, 4, 6}> ()
    radix = Constant <value = uint8 {4}> ()
    sixteen = Constant <value = int64[1] {16}> ()
    step_shape = Constant <value = int64[6] {0, 0, -1, 64, 4, 1}> ()
    bytes = Reshape (weight, step_shape)
    shifted = BitShift <direction = "RIGHT"> (bytes, shifts)
    fields = Mod (shifted, radix)
    outputs_first = Transpose <perm = [0, 1, 3, 2, 5, 4]> (fields)
    K_negative = Neg (K)
    missing_K = Mod (K_negative, sixteen)
    padded_K = Add (K, missing_K)
    all_rows = Constant <value = int64[2] {0, -1}> ()
    all_rows_shape = Concat <axis = 0> (all_rows, padded_K)
    all_row_codes = Reshape (outputs_first, all_rows_shape)
    N = Shape (bias)
    row_codes = Slice (all_row_codes, int_0, N, int_1)"""

# Numbers of some trits each, of which `powers` says what each digit counts.
_DIGITS = """
    three = Constant <value = int32 {3}> ()
    split_numbers = Reshape (numbers, split)
    quotients = Div (split_numbers, powers)
    digits = Mod (quotients, three)
    row_codes = Reshape (digits, join)"""

_NIBBLES = """
    nibble_shifts = Constant <value = uint8[2] {0, 4}> ()
    sixteen = Constant <value = uint8 {16}> ()
    split_bytes = Reshape (bytes, split)
    shifted_nibbles = BitShift <direction = "RIGHT"> (split_bytes, nibble_shifts)
    fields = Mod (shifted_nibbles, sixteen)
    row_nibbles = Reshape (fields, join)
    nibbles = Cast <to = 6> (row_nibbles)"""

# Two pairs 3 c0 + c1 to a byte.
_UNPACK_TL1 = f"""
    powers = Constant <value = int32[2] {{3, 1}}> ()
    bytes = Identity (weight)
{_NIBBLES}
    numbers = Identity (nibbles)
{_DIGITS}"""

# Triples v = 9 c0 + 3 c1 + c2 - 13: two |v| to a byte, then eight signs to a byte.
_UNPACK_TL2 = f"""
    powers = Constant <value = int32[3] {{9, 3, 1}}> ()
    int_2 = Constant <value = int64[1] {{2}}> ()
    int_3 = Constant <value = int64[1] {{3}}> ()
    most = Constant <value = int64[1] {{2147483647}}> ()
    K_and_2 = Add (K, int_2)
    triples = Div (K_and_2, int_3)
    triples_and_1 = Add (triples, int_1)
    magnitude_bytes = Div (triples_and_1, int_2)
    bytes = Slice (weight, int_0, magnitude_bytes, columns)
{_NIBBLES}
    magnitudes = Slice (nibbles, int_0, triples, columns)

    sign_bytes = Slice (weight, magnitude_bytes, most, columns)
    bit_shifts = Constant <value = uint8[8] {{0, 1, 2, 3, 4, 5, 6, 7}}> ()
    two = Constant <value = uint8 {{2}}> ()
    split_sign_bytes = Reshape (sign_bytes, split)
    shifted_signs = BitShift <direction = "RIGHT"> (split_sign_bytes, bit_shifts)
    bits = Mod (shifted_signs, two)
    row_bits = Reshape (bits, join)
    sign_bits = Slice (row_bits, int_0, triples, columns)
    negative = Cast <to = 9> (sign_bits)

    thirteen = Constant <value = int32 {{13}}> ()
    above = Add (thirteen, magnitudes)
    below = Sub (thirteen, magnitudes)
    numbers = Where (negative, below, above)
{_DIGITS}"""

# Five codes to a byte, c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4.
_UNPACK_T5 = f"""
    powers = Constant <value = int32[5] {{1, 3, 9, 27, 81}}> ()
    numbers = Cast <to = 6> (weight)
{_DIGITS}"""

_UNPACK = {"i2s": _UNPACK_I2S, "tl1": _UNPACK_TL1, "tl2": _UNPACK_TL2, "t5": _UNPACK_T5}

_CENTRE_BY_ZERO_POINT = """
    float_zero_point = Cast <to = 1> (zero_point)
    block_zero_point = Reshape (float_zero_point, split)
    centred = Sub (blocks, block_zero_point)"""

_ATTRIBUTES = """
    K_scalar = Constant <value_int: int = @K> ()
    block_size_scalar = Constant <value_int: int = @block_size> ()
    activation_bits_scalar = Constant <value_int: int = @activation_bits> ()
    K = Reshape (K_scalar, int_1)
    block_size = Reshape (block_size_scalar, int_1)
    activation_bits = Reshape (activation_bits_scalar, int_1)
    activation_scale = Constant <value_float: float = @activation_scale> ()"""

# Constant takes no number before opset 12. Gemm multiplies by alpha. EyeLike puts a 1 in column k and ArgMax
# finds it again: the row has a column for each k up to 8 * row_bytes + 32, so for K and activation_bits; a
# block_size beyond that gives 0, which means the same.
_ATTRIBUTES_11 = """
    row_bytes_axis = Constant <value = int64[1] {2}> ()
    most_in_byte = Constant <value = int64[1] {8}> ()
    most_bits = Constant <value = int64[1] {33}> ()
    weight_shape = Shape (weight)
    row_bytes = Gather <axis = 0> (weight_shape, row_bytes_axis)
    row_weights = Mul (row_bytes, most_in_byte)
    row_length = Add (row_weights, most_bits)
    row_shape = Concat <axis = 0> (int_1, row_length)
    row = ConstantOfShape (row_shape)
    K_row = EyeLike <k: int = @K> (row)
    block_size_row = EyeLike <k: int = @block_size> (row)
    activation_bits_row = EyeLike <k: int = @activation_bits> (row)
    K = ArgMax <axis = 1, keepdims = 0> (K_row)
    block_size = ArgMax <axis = 1, keepdims = 0> (block_size_row)
    activation_bits = ArgMax <axis = 1, keepdims = 0> (activation_bits_row)
    matrix_shape = Constant <value = int64[2] {1, 1}> ()
    matrix_1 = Reshape (float_1, matrix_shape)
    activation_scale_matrix = Gemm <alpha: float = @activation_scale> (matrix_1, matrix_1)
    activation_scale = Reshape (activation_scale_matrix, int_1)"""


def matmul(form: Format, opset: int, op_type: str | None = None) -> ir.Function:
    """Make the body of a format's op, or of MatMulPanel, for models that import this default domain.

    y = (Q(x) W^T) * step + bias with W = sum over planes p of scale[p] * (code[p] - zero_point[p]),
    for all attributes of the op: planes, blocks (ragged ones too), zero points, float16 scales,
    activation_bits 8, 16 and 32, static activation_scale, and x of any rank from 1 up. A row of x with
    NaN or Inf gives a row of NaN. x may be float16 from opset 15 on.

    Raises:
        ValueError: the opset is not in OPSETS.
    """
    _require_opset(opset)
    text = _MATMUL.substitute(
        opset=opset,
        domain=DOMAIN,
        op_type=op_type or form.op_type,
        zero_point="zero_point," if form.four_levels else "",
        unpack=_UNPACK_PANELS if op_type == PANEL_OP else _UNPACK[form.name],
        centre=_CENTRE_BY_ZERO_POINT if form.four_levels else "    centred = Sub (blocks, float_1)",
        attributes=_ATTRIBUTES if opset >= 12 else _ATTRIBUTES_11,
        sum_of_planes=_reduce("ReduceSum", "planes", "int_0", keepdims=False, axes_are_input=opset >= 13),
        peak=_reduce("ReduceMax", "magnitudes_of_x", "last", keepdims=True, axes_are_input=opset >= 18),
        nothing=_reduce("ReduceMean", "nothings", "last", keepdims=True, axes_are_input=opset >= 18),
        y="CastLike (float_y, x)" if opset >= FLOAT16_OPSET else "Identity (float_y)",
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


_BLOCK_HADAMARD = Template("""
<opset_import: ["" : $opset], domain: "$domain">
BlockHadamard <block_size> (x, signs) => (y)
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

# As in _ATTRIBUTES_11; a block_size beyond 4096 gives 0.
_BLOCK_SIZE_11 = """
    row_shape = Constant <value = int64[2] {1, 4097}> ()
    row = ConstantOfShape (row_shape)
    block_size_row = EyeLike <k: int = @block_size> (row)
    block_size = ArgMax <axis = 1, keepdims = 0> (block_size_row)"""


def block_hadamard(opset: int) -> ir.Function:
    """Make the body of BlockHadamard for models that import this version of the default domain.

    y = the Walsh-Hadamard transform of x * signs in blocks of the last axis, divided by sqrt(block_size), for
    x of any rank from 1 up. x may be float16 from opset 15 on. Where block_size is no power of two from 1 to
    4096, or K is no multiple of it, the body fails to run.

    Raises:
        ValueError: the opset is not in OPSETS.
    """
    _require_opset(opset)
    text = _BLOCK_HADAMARD.substitute(
        opset=opset,
        domain=DOMAIN,
        block_size=_BLOCK_SIZE if opset >= 12 else _BLOCK_SIZE_11,
        y="CastLike (float_y, x)" if opset >= FLOAT16_OPSET else "Identity (float_y)",
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


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

_ATTENTION_ATTRIBUTES = """
    scale = Constant <value_float: float = @scale> ()
    nan_to_zero = Constant <value_int: int = @nan_to_zero> ()
    is_guarded = Cast <to = 9> (nan_to_zero)"""

# As in _ATTRIBUTES_11.
_ATTENTION_ATTRIBUTES_11 = """
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


def attention(opset: int, *, by_head: bool = False) -> ir.Function:
    """Make the body of Attention or AttentionByHead for models with this version of the default domain.

    y = softmax(scale * q k + mask) v for each head: float32 q and y (batch, row, head, width), k and v
    (batch, token, head, width), or all with heads before rows and tokens; v and y may have another width.
    Batches and heads broadcast, the mask does to (batch, head, row, token). A row whose softmax is NaN is
    NaN, or with nan_to_zero the sum of v times zeros.

    Raises:
        ValueError: the opset is not in OPSETS.
    """
    _require_opset(opset)
    text = _ATTENTION.substitute(
        opset=opset,
        domain=DOMAIN,
        op_type=ATTENTION_BY_HEAD if by_head else ATTENTION,
        attributes=_ATTENTION_ATTRIBUTES if opset >= 12 else _ATTENTION_ATTRIBUTES_11,
        heads=_TURN_KEYS if by_head else _TURN_HEADS,
        y="    y = Identity (y_heads)" if by_head else "    y = Transpose <perm = [0, 2, 1, 3]> (y_heads)",
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


FUNCTIONS: Mapping[str, Callable[[int], ir.Function]] = MappingProxyType(
    {form.op_type: partial(matmul, form) for form in FORMATS.values()}
    | {
        PANEL_OP: partial(matmul, FORMATS["i2s"], op_type=PANEL_OP),
        "BlockHadamard": block_hadamard,
        ATTENTION: attention,
        ATTENTION_BY_HEAD: partial(attention, by_head=True),
    }
)
"""Op type -> what makes its body for an opset."""


def _reduce(op: str, value: str, axis: str, *, keepdims: bool, axes_are_input: bool) -> str:
    """A reduction over the axis named `int_0` (0) or `last` (-1): an attribute first, an input later."""
    if axes_are_input:
        return f"{op} <keepdims = {keepdims:d}> ({value}, {axis})"
    return f"{op} <axes = [{0 if axis == 'int_0' else -1}], keepdims = {keepdims:d}> ({value})"


def _require_opset(opset: int) -> None:
    if opset not in OPSETS:
        raise ValueError(f"opset {opset}: function bodies exist for {OPSETS[0]} to {OPSETS[-1]}")
