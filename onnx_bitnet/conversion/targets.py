"""The forms in which a quantized weight can stand in a model, one or more for each target of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_bitnet.quantization.floats import Floats
from onnx_bitnet.quantization.nbits import DynamicInt8, NBits, integers
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.quantization.rotation import Rotation
from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.rewrite.plain import Plain, replace_plain
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.rewrite.replace import Shared, replace
from onnx_bitnet.rewrite.stock import replace_stock

Stored = Quantized | Floats | NBits | DynamicInt8 | Plain


def store(quantized: Quantized | Floats, linear: Linear, spec: LayerSpec, target: str) -> Stored:
    """Bring a quantized weight into the form that a target wants; nothing is lost.

    With target `ort`, floats meet DequantizeLinear, 8-bit integers without blocks that are to meet 8-bit
    activations DynamicQuantizeMatMul, and all others MatMulNBits.
    """
    if target == "custom" and isinstance(quantized, Quantized):
        return quantized
    if target == "simulate":
        return Plain.of(quantized.dequantize(), linear)
    if isinstance(quantized, Floats):
        return quantized
    found = integers(quantized)
    assert found is not None, "decide keeps what has no integers"
    if found.bits == 8 and found.block_size == 0 and spec.dynamic_int8:
        return DynamicInt8.pack(found)
    return NBits.pack(found)


@dataclass(frozen=True, eq=False)
class Basis:
    """What a weight wants beside it: its inputs rotated, and something added to the bias.

    Args:
        rotation: the basis that the weight is stored in, or None.
        bias_shift: float32 (N,) to add to the bias, or None.
    """

    rotation: Rotation | None = None
    bias_shift: np.ndarray | None = None


def put(
    model: ir.Model,
    linear: Linear,
    stored: Stored,
    spec: LayerSpec,
    basis: Basis,
    *,
    layout: str,
    shared: Shared,
) -> ir.Node | None:
    """Put the ops for a stored weight in the place of its layer; return the op if it is a packed one."""
    bits, step = spec.activation_bits, spec.activation_scale
    rotation, bias_shift = basis.rotation, basis.bias_shift
    if isinstance(stored, Quantized):
        return replace(
            model,
            linear,
            stored,
            activation_bits=bits,
            activation_scale=step,
            layout=layout,
            rotation=rotation,
            bias_shift=bias_shift,
            shared=shared,
        )
    if isinstance(stored, (Plain, Floats)):
        replace_plain(
            model,
            linear,
            stored,
            activation_bits=bits,
            activation_scale=step,
            rotation=rotation,
            bias_shift=bias_shift,
            shared=shared,
        )
    else:
        replace_stock(
            model,
            linear,
            stored,
            activation_bits=bits,
            rotation=rotation,
            bias_shift=bias_shift,
            shared=shared,
        )
    return None
