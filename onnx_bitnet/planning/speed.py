"""What a packed layer takes, where a float one takes 1: constants measured once, see docs/speed.md.

They are those of many rows of activations on a machine with AVX512-VNNI, where products decide. With few rows
memory does, and there the smaller is the faster.
"""

from __future__ import annotations

from onnx_bitnet.quantization.spec import LayerSpec

# One pass of 8-bit activations over codes of 2, 4 or 8 bits: 1812 us where float takes 8114, 128 rows.
_PASS = 0.223
# Inputs whose products take as long as to scale their sum: blocks of 32 take 1.7 times as long as none.
_GROUP = 22
# Products in float that take as long as to bring one input into a rotated basis: 8.9 us for 128 rows of 384,
# where float with 384 outputs takes 173 us.
_TURN = 20


def relative_time(spec: LayerSpec, k: int, outputs: int) -> float:
    """Return the time of a layer of K inputs, where one in float takes 1.

    Integers and nine levels take one pass, free planes one each; 16-bit activations are two passes. A
    rotation is an op more, whose time all that read the value share.

    Args:
        spec: how the layer is packed.
        k: K.
        outputs: of all layers that read the same value.

    >>> relative_time(LayerSpec(integer_bits=4, granularity="channel", activation_bits=8), 384, 384) < 0.3
    True
    """
    turn = _TURN / outputs if spec.rotation else 0.0
    if spec.activation_bits == 32:
        return 1.0 + turn
    passes = 1 if spec.integer_bits or spec.levels == 9 else spec.planes
    length = spec.group_length(k)
    groups = 1.0 if length >= k else 1.0 + _GROUP / length
    return _PASS * passes * groups * (spec.activation_bits // 8) + turn
