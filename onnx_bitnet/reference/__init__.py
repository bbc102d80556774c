"""The NumPy oracle: what every format, kernel and quantizer must compute, written slowly and plainly.

Converted models are read back with it (panels with nothing else), `doctor` compares this machine's results
with it, and tests compare all else with it. Nothing quantizes, packs or runs a model with it.
"""

from onnx_bitnet.reference.formats import (
    PACK,
    UNPACK,
    dequantize_linear,
    dequantize_nbits,
    pack_i2s,
    pack_panels,
    pack_t5,
    pack_tl1,
    pack_tl2,
    unpack_i2s,
    unpack_panels,
    unpack_t5,
    unpack_tl1,
    unpack_tl2,
)
from onnx_bitnet.reference.ops import (
    attention,
    block_hadamard,
    dequantize,
    exp,
    fma,
    group_starts,
    matmul,
    merge_planes,
    quantize_rows,
)
from onnx_bitnet.reference.weights import (
    assign,
    compensated,
    find_ternary,
    fit_group,
    fit_levels,
    least_squares,
    quantize_integer,
    quantize_weight,
    split,
)

__all__ = [
    "PACK",
    "UNPACK",
    "assign",
    "attention",
    "block_hadamard",
    "compensated",
    "dequantize",
    "dequantize_linear",
    "dequantize_nbits",
    "exp",
    "find_ternary",
    "fit_group",
    "fit_levels",
    "fma",
    "group_starts",
    "least_squares",
    "matmul",
    "merge_planes",
    "pack_i2s",
    "pack_panels",
    "pack_t5",
    "pack_tl1",
    "pack_tl2",
    "quantize_integer",
    "quantize_rows",
    "quantize_weight",
    "split",
    "unpack_i2s",
    "unpack_panels",
    "unpack_t5",
    "unpack_tl1",
    "unpack_tl2",
]
