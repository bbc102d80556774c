"""Read a written model back and hold it against what was meant to be written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnx_bitnet import reference
from onnx_bitnet.errors import OutputError
from onnx_bitnet.quantize import Quantized
from onnx_bitnet.rewrite.packed import PackedNode, packed_nodes

_ROWS_AT_ONCE = 1 << 20  # weights decoded at a time, so that memory stays bounded


def verify(written: Path, meant: Mapping[str, Quantized]) -> None:
    """Check a model file that was just written.

    Every packed weight is decoded from the file by the NumPy reference, which shares no code with the packer,
    and compared value for value with what was meant; and the file as a whole must satisfy onnx.checker.

    Args:
        written: path of the model.
        meant: the layers packed in this conversion, by name; the model may hold others from an earlier one.

    Raises:
        OutputError: something differs.
    """
    found = {packed.layer: packed for packed in packed_nodes(ir.load(written))}
    for name, quantized in meant.items():
        if name not in found:
            raise OutputError(f"verification failed: layer {name!r} is not in the file")
        _compare(name, found[name], quantized)
    try:
        onnx.checker.check_model(written)
    except onnx.checker.ValidationError as error:
        raise OutputError(f"verification failed: {' '.join(str(error).split())[:300]}") from None


def _compare(name: str, packed: PackedNode, quantized: Quantized) -> None:
    weight, scale, zero_point = packed.arrays()
    step = max(1, _ROWS_AT_ONCE // quantized.k)
    for start in range(0, quantized.n, step):
        rows = slice(start, start + step)
        try:
            decoded = reference.dequantize(
                weight[:, rows],
                _rows(scale, rows),
                _rows(zero_point, rows),
                quantized.k,
                packed.block_size,
                packed.format,
            )
        except ValueError as error:
            raise OutputError(f"verification failed: layer {name!r}: {error}") from None
        if not np.array_equal(decoded, quantized.dequantize(rows)):
            raise OutputError(
                f"verification failed: layer {name!r} decodes to other values than were written"
            )


def _rows(parameter: np.ndarray, rows: slice) -> np.ndarray:
    return parameter if parameter.shape[1] == 1 else parameter[:, rows]
