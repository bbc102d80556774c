"""Read a written model back and hold it against what was meant to be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx

from onnx_bitnet import files
from onnx_bitnet.conversion.targets import Stored
from onnx_bitnet.errors import OutputError, one_line
from onnx_bitnet.rewrite.replaced import Replaced, replaced

_WEIGHTS_AT_ONCE = 1 << 20  # decoded at a time, so that memory stays bounded


def verify(written: Path, meant: Mapping[str, Stored], *, between: Callable[[], None] = lambda: None) -> None:
    """Check a model file that was just written.

    Every weight is decoded from the file by the NumPy reference, which shares no code with the packer, and
    compared value for value with what was meant; and the file as a whole must satisfy onnx.checker, but for
    what onnxruntime does without: shapes of inputs and outputs, and a name of the graph.

    Args:
        written: path of the model.
        meant: the layers replaced in this conversion, by name; the model may hold others from an earlier one.
        between: called after each layer.

    Raises:
        OutputError: something differs.
    """
    file = files.read(written)
    found = {node.layer: node for node in replaced(file.model)}
    for name, stored in meant.items():
        if name not in found:
            raise OutputError(f"verification failed: layer {name!r} is not in the file")
        _compare(name, found[name], stored)
        file.release()
        between()
    try:
        _check(written)
    except onnx.checker.ValidationError as error:
        raise OutputError(f"verification failed: {one_line(error)}") from None


def _check(written: Path) -> None:
    try:
        onnx.checker.check_model(written)
    except onnx.checker.ValidationError:
        proto = onnx.load(written, load_external_data=False)
        stated = proto.SerializeToString()
        proto.graph.name = proto.graph.name or "graph"
        for value in (*proto.graph.input, *proto.graph.output):
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
        if proto.SerializeToString() == stated:
            raise
        completed = written.with_name("completed.onnx")  # beside the data file
        onnx.save(proto, completed)
        onnx.checker.check_model(completed)
        completed.unlink()


def _compare(name: str, found: Replaced, meant: Stored) -> None:
    decode = found.decoder()
    step = max(1, _WEIGHTS_AT_ONCE // meant.k)
    for start in range(0, meant.n, step):
        rows = slice(start, start + step)
        try:
            decoded = decode(rows)
        except ValueError as error:
            raise OutputError(f"verification failed: layer {name!r}: {error}") from None
        if not np.array_equal(decoded, meant.dequantize(rows)):
            raise OutputError(
                f"verification failed: layer {name!r} decodes to other values than were written"
            )
