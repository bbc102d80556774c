"""Embedding and head: from tokens to vectors and back, in float, 8 or 4 bits, by onnxruntime's own ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnx_bitnet.decoder.architecture import Architecture
from onnx_bitnet.decoder.checked import Fingerprint
from onnx_bitnet.decoder.graph import CONTRIB, Graph
from onnx_bitnet.decoder.source import Source
from onnx_bitnet.errors import ModelError
from onnx_bitnet.granularity import stored_block_size
from onnx_bitnet.quantization.quantize import quantize_layer
from onnx_bitnet.quantization.spec import LayerSpec

BITS = {"float": 0, "int8": 8, "int4": 4}
"""By onnxruntime's own ops."""

PACKED = {
    "packed8": LayerSpec(granularity="channel", integer_bits=8, activation_bits=16),
    "packed4": LayerSpec(granularity="block:32", integer_bits=4, activation_bits=8),
}
"""Heads by ours: what makes the most of the bits, measured."""

_BLOCKS = (128, 32)
"""Of 8 bits the larger if it divides K, since MatMulNBits is faster with it; of 4 bits the smaller."""

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits: the fastest, and as exact as 8-bit weights deserve


class Tokens:
    """The two matrices (vocabulary, hidden) of a decoder.

    A float embedding keeps the type it has in the checkpoint, since only single rows of it are ever read;
    a float head is float32, since onnxruntime multiplies nothing else. What is tied and of one type is
    stored once.

    Args:
        graph: where they go.
        source: of their values.
        of: shapes, and whether the head is the embedding.
        kinds: how embedding and head are stored, of BITS.
    """

    def __init__(self, graph: Graph, source: Source, of: Architecture, kinds: tuple[str, str]) -> None:
        self._graph, self._source, self._shape = graph, source, (of.vocabulary, of.hidden)
        self._module = _EMBEDDING if of.tied else _HEAD
        self._kind, self._head = ("float32" if kind == "float" else kind for kind in kinds)
        if kinds[0] == "float" and not (of.tied and kinds[1] == "float"):
            self._kind = "float"
        self._stored: dict[tuple[str, str], tuple[ir.Value, ...]] = {}

    def embed(self, ids: ir.Value) -> ir.Value:
        """Return the vectors float32 [..., hidden] of tokens."""
        graph, kind, hidden = self._graph, self._kind, self._shape[1]
        if kind.startswith("float"):
            (x,) = graph.op("Gather", *self._store(_EMBEDDING, kind), ids, name=_EMBEDDING)
            return graph.op("Cast", x, name=f"{_EMBEDDING}.float32", to=ir.DataType.FLOAT)[0]
        codes, scales = self._store(_EMBEDDING, kind)
        (blocks,) = graph.op(
            "GatherBlockQuantized",
            codes,
            ids,
            graph.op("Unsqueeze", scales, graph.integers(-1), name=f"{_EMBEDDING}.scales")[0],
            name=_EMBEDDING,
            domain=CONTRIB,
            bits=BITS[kind],
            block_size=_block(kind, hidden),
            gather_axis=0,
            quantize_axis=2,
        )
        (x,) = graph.op("Reshape", blocks, graph.integers(0, 0, hidden), name=f"{_EMBEDDING}.rows")
        return x

    def logits(self, x: ir.Value) -> ir.Value:
        """Return the logits float32 [..., vocabulary] of x [..., hidden]."""
        kind, (vocabulary, hidden) = self._head, self._shape
        if kind == "float32":
            return self._float(x, *self._store(self._module, kind))
        if kind in PACKED:
            return self._packed(x, PACKED[kind])
        (logits,) = self._graph.op(
            "MatMulNBits",
            x,
            *self._store(self._module, kind),
            name=_HEAD,
            outputs=["logits"],
            domain=CONTRIB,
            K=hidden,
            N=vocabulary,
            bits=BITS[kind],
            block_size=_block(kind, hidden),
            accuracy_level=_INT8_ACTIVATIONS,
        )
        return logits

    def _float(self, x: ir.Value, matrix: ir.Value) -> ir.Value:
        """Add the head as Gemm, which alone of ONNX's ops reads a matrix (n, k) as it is."""
        graph, (vocabulary, hidden) = self._graph, self._shape
        (shape,) = graph.op("Shape", x, name=f"{_HEAD}.positions", end=2)
        (shape,) = graph.op("Concat", shape, graph.integers(vocabulary), name=f"{_HEAD}.shape", axis=0)
        (rows,) = graph.op("Reshape", x, graph.integers(-1, hidden), name=f"{_HEAD}.rows")
        (rows,) = graph.op("Gemm", rows, matrix, name=_HEAD, transB=1)
        return graph.op("Reshape", rows, shape, name=f"{_HEAD}.logits", outputs=["logits"])[0]

    def _packed(self, x: ir.Value, spec: LayerSpec) -> ir.Value:
        """Add the head as a packed layer, quantized some rows at a time, which makes all planes of them."""
        n, k = self._shape
        codes, tensor = self._graph.data.reserve(f"{_HEAD}.i2s", (spec.integer_bits // 2, n, -(-k // 4)))
        made = Fingerprint(k, stored_block_size(spec.granularity, k))
        scales, done = [], 0
        for part in self._source.rows(self._module, n, k):
            quantized = quantize_layer(part.astype(np.float32), spec)
            made.add(quantized.codes(), quantized.scale, quantized.zero_point)
            codes[:, done : done + len(part)] = quantized.weight
            scales.append(quantized.scale.astype(np.float32))
            done += len(part)
        whole = dataclasses.replace(quantized, n=n, weight=codes, scale=np.concatenate(scales, axis=1))
        self._graph.layers[_HEAD] = made.digest()
        stored = self._graph.tensor(tensor)
        return self._graph.product(x, whole, _HEAD, spec.activation_bits, stored, output="logits")

    def _store(self, module: str, kind: str) -> tuple[ir.Value, ...]:
        """Write a matrix once for each type: (n, k) as it is or in float32, or codes and scales of blocks."""
        key = module, kind
        if key not in self._stored:
            self._stored[key] = self._written(module, kind)
        return self._stored[key]

    def _written(self, module: str, kind: str) -> tuple[ir.Value, ...]:
        n, k = self._shape
        parts = self._source.rows(module, n, k)
        data, name = self._graph.data, f"{module}.{kind}"
        if kind == "float":
            return (self._graph.tensor(data.add(name, (n, k), parts)),)
        parts = (part.astype(np.float32) for part in parts)
        if kind == "float32":
            return (self._graph.tensor(data.add(name, (n, k), parts)),)
        block = _block(kind, k)
        if k % block:
            raise ModelError(f"{module}: {k} inputs are no multiple of {block}, so it cannot be {kind}")
        scales: list[np.ndarray] = []
        shape = n, k // block, block * BITS[kind] // 8
        codes = self._graph.tensor(data.add(name, shape, _quantized(parts, block, BITS[kind], scales)))
        return codes, self._graph.tensor(data.add(f"{name}.scales", shape[:2], scales))


def _block(kind: str, k: int) -> int:
    large, small = _BLOCKS
    return large if BITS[kind] == 8 and k % large == 0 else small


def _quantized(
    parts: Iterator[np.ndarray], block: int, bits: int, scales: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Yield codes uint8 (rows, blocks, bytes) as MatMulNBits wants them; append their scales (rows, blocks).

    A value is scale * (code - 2^(bits-1)); the largest of a block has code 0. Two 4-bit codes are in a byte,
    the first in the low bits.
    """
    zero = 1 << bits - 1
    for part in parts:
        blocks = part.reshape(len(part), -1, block)
        peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
        scale = peak / np.float32(-zero)
        with np.errstate(divide="ignore", over="ignore"):
            factor = np.where(scale == 0, 0, np.float32(1) / scale)
        codes = np.clip(np.rint(blocks * factor) + zero, 0, 2 * zero - 1).astype(np.uint8)
        scales.append(scale[..., 0])
        yield codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
