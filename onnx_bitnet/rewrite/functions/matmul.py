"""The body of the matmul of each format: unpack the weight to one float matrix, round x, multiply.

Everything that depends on weights and attributes only is a constant chain, which onnxruntime folds to that
matrix when it loads the model.
"""

from __future__ import annotations

from string import Template

import onnx_ir as ir

from onnx_bitnet.formats import PANEL_OP, Format
from onnx_bitnet.rewrite.functions.common import of_type_of_x, parsed

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


def body(form: Format, opset: int, op_type: str | None = None) -> ir.Function:
    """Make the body of a format's op, or of MatMulPanel, for models that import this default domain.

    y = (Q(x) W^T) * step + bias with W = sum over planes p of scale[p] * (code[p] - zero_point[p]),
    for all attributes of the op: planes, blocks (ragged ones too), zero points, float16 scales,
    activation_bits 8, 16 and 32, static activation_scale, and x of any rank from 1 up. A row of x with
    NaN or Inf gives a row of NaN. x may be float16 from opset 15 on.

    Raises:
        ValueError: the opset is not in OPSETS.
    """
    return parsed(
        _MATMUL,
        opset,
        op_type=op_type or form.op_type,
        zero_point="zero_point," if form.four_levels else "",
        unpack=_UNPACK_PANELS if op_type == PANEL_OP else _UNPACK[form.name],
        centre=_CENTRE_BY_ZERO_POINT if form.four_levels else "    centred = Sub (blocks, float_1)",
        attributes=_ATTRIBUTES if opset >= 12 else _ATTRIBUTES_11,
        sum_of_planes=_reduce("ReduceSum", "planes", "int_0", keepdims=False, axes_are_input=opset >= 13),
        peak=_reduce("ReduceMax", "magnitudes_of_x", "last", keepdims=True, axes_are_input=opset >= 18),
        nothing=_reduce("ReduceMean", "nothings", "last", keepdims=True, axes_are_input=opset >= 18),
        y=of_type_of_x(opset),
    )


def _reduce(op: str, value: str, axis: str, *, keepdims: bool, axes_are_input: bool) -> str:
    """A reduction over the axis named `int_0` (0) or `last` (-1): an attribute first, an input later."""
    if axes_are_input:
        return f"{op} <keepdims = {keepdims:d}> ({value}, {axis})"
    return f"{op} <axes = [{0 if axis == 'int_0' else -1}], keepdims = {keepdims:d}> ({value})"
