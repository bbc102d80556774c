"""Read a written model back and hold it against what was meant to be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from onnx_bitnet import files
from onnx_bitnet.conversion.targets import Stored
from onnx_bitnet.errors import OutputError
from onnx_bitnet.rewrite.replaced import Replaced, replaced

_ROWS_AT_ONCE = 1 << 20  # weights decoded at a time, so that memory stays bounded


def verify(
    written: Path, meant: Mapping[str, Stored], source: Path, *, between: Callable[[], None] = lambda: None
) -> str | None:
    """Check a model file that was just written.

    Every weight is decoded from the file by the NumPy reference, which shares no code with the packer, and
    compared value for value with what was meant; and the file as a whole must satisfy onnx.checker, if the
    model that it was made from does: onnxruntime runs many that do not.

    Args:
        written: path of the model.
        meant: the layers replaced in this conversion, by name; the model may hold others from an earlier one.
        source: path of the model that it was made from.
        between: called after each layer.

    Returns:
        What onnx.checker says against the file, when it also refuses the source; None otherwise.

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
    complaint = files.complaint(written)
    if complaint is not None and files.complaint(source) is None:
        raise OutputError(f"verification failed: {complaint}")
    return complaint


def _compare(name: str, found: Replaced, meant: Stored) -> None:
    decode = found.decoder()
    step = max(1, _ROWS_AT_ONCE // meant.k)
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
