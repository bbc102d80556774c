"""`load_weights` for GGUF files: few-bit tensors become Quantized, all others arrays."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from onnx_bitnet.errors import ModelError
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.weights.ggml import BFLOAT16, LAYOUTS, PLAIN, UNDEFINED, Layout
from onnx_bitnet.weights.gguf_header import Entry, read_header
from onnx_bitnet.weights.mapping import Weights

_ROTATED = "prism.hadamard."


def load_gguf(path: Path) -> Weights:
    """Read a GGUF file; see load_weights."""
    header = read_header(path)
    rotated = [key for key in header.metadata if key.startswith(_ROTATED)]
    if rotated:
        raise ModelError(
            f"{path}: its weights are stored in a rotated basis ({rotated[0]}), which cannot be undone here; "
            "use the file of the model that is not rotated"
        )
    weights, others = {}, {}
    for entry in header.entries:
        layout = _layout(path, entry, header.metadata)
        if layout is None:
            others[entry.name] = partial(_array, path, entry)
        else:
            weights[entry.name] = partial(_load, path, entry, layout)
    return Weights(path, weights, others, header.metadata)


def _layout(path: Path, entry: Entry, metadata: dict[str, Any]) -> Layout | None:
    """Return the layout of a few-bit tensor, None for an ordinary one, after checking its size."""
    where = f"{path}: {entry.name!r}"
    layout, known = LAYOUTS.get(entry.kind), _known()
    bitnet = str(metadata.get("general.architecture", "")).startswith("bitnet")
    if entry.kind in UNDEFINED and (bitnet or entry.kind not in known):
        raise ModelError(
            f"{where}: has type {UNDEFINED[entry.kind]}, whose order of bytes is that of the program it is "
            "for, and the file does not say which; use the I2_S file of the model"
        )
    if layout is not None:
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise ModelError(
                f"{where}: of type {layout.name} has shape {list(entry.shape)}, which is no matrix"
            )
        if entry.shape[1] % layout.block:
            raise ModelError(
                f"{where}: K = {entry.shape[1]} is no multiple of {layout.block}, as {layout.name} wants; "
                "the file is damaged"
            )
        needed, name = layout.nbytes(*entry.shape), layout.name
    elif entry.kind in known:
        name, block, block_bytes = known[entry.kind]
        needed = math.prod(entry.shape) // block * block_bytes
    else:
        raise ModelError(
            f"{where}: has type {entry.kind}, which is not known; if it is of llama.cpp: pip install gguf"
        )
    if needed > entry.room:
        raise ModelError(
            f"{where}: truncated or damaged: {needed} bytes of {name} {list(entry.shape)} wanted at byte "
            f"{entry.offset}, {entry.room} are there; download it again"
        )
    return layout


def _known() -> dict[int, tuple[str, int, int]]:
    """Return name, elements and bytes of a block of each ordinary type that can be decoded."""
    plain = {kind: (np.dtype(code).name, 1, np.dtype(code).itemsize) for kind, code in PLAIN.items()}
    try:
        import gguf
    except ImportError:
        return plain
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    return sizes | plain


def _raw(path: Path, entry: Entry, nbytes: int) -> np.ndarray:
    return np.fromfile(path, np.uint8, nbytes, offset=entry.offset)


def _array(path: Path, entry: Entry) -> np.ndarray:
    """Read an ordinary tensor; quantized ones come as float32."""
    _, block, block_bytes = _known()[entry.kind]
    raw = _raw(path, entry, math.prod(entry.shape) // block * block_bytes)
    if entry.kind in PLAIN:
        values = raw.view(PLAIN[entry.kind]).reshape(entry.shape)
        return values.view(ml_dtypes.bfloat16) if entry.kind == BFLOAT16 else values
    import gguf

    rows = raw.reshape(*entry.shape[:-1], -1)
    array: np.ndarray = gguf.dequantize(rows, gguf.GGMLQuantizationType(entry.kind))
    return array


def _load(path: Path, entry: Entry, layout: Layout) -> Quantized:
    n, k = entry.shape
    where = f"{path}: {entry.name!r}"
    raw = _raw(path, entry, layout.nbytes(n, k))
    body = raw[: len(raw) - layout.tail].reshape(-1, layout.block_bytes)
    codes, scale = layout.decode(body)
    if scale is None:
        scale = raw[-layout.tail :].view("<f4")[:1]
    if layout.ternary and (codes == 3).any():
        raise ModelError(f"{where}: holds code 3, which stands for no ternary weight; the file is damaged")
    if not np.isfinite(scale).all():
        raise ModelError(f"{where}: has a scale that is NaN or infinite; the file is damaged")
    return _quantized(codes.reshape(n, k), scale.reshape(-1, 1) if scale.size == 1 else scale.reshape(n, -1))


def _quantized(codes: np.ndarray, scale: np.ndarray) -> Quantized:
    """Pack codes (N, K) and scales (1, 1) or (N, G), with as few scales as hold the same values.

    A block of zeros takes any scale, so it takes that of its neighbours.
    """
    n, k = codes.shape
    groups = scale.shape[1]
    blocks = codes.reshape(*scale.shape, -1)
    blocks[scale == 0] = 1
    used = (blocks != 1).any(axis=-1)
    for axis in (None, 1):
        most = np.where(used, scale, -np.inf).max(axis=axis, keepdims=True)
        if ((scale == most) | ~used).all():
            scale, groups = np.where(np.isfinite(most), most, 0), 1
            break
    one = scale.dtype.type(1) if groups > 1 else np.float32(1)
    return Quantized(
        "i2s",
        n,
        k,
        k // groups if groups > 1 else 0,
        FORMATS["i2s"].pack(codes)[None],
        scale.astype(one.dtype)[None],
        np.full((1, 1, 1), one),
        lossless=True,
        zeros=float((codes == 1).mean()),
    )
