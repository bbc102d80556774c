"""The parts of a decoder between its layers, in onnxruntime's own ops: the fastest there.

GroupQueryAttention turns queries and keys by their positions, and appends to the cache in place when past and
present are one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_bitnet.decoder.architecture import Architecture
from onnx_bitnet.decoder.graph import CONTRIB, Graph


class Contrib:
    """What `Standard` spells in ONNX's ops; values are float32 (batch, sequence, width).

    Args:
        graph: where nodes go.
        of: sizes of heads, and their rotary embedding.
        mask: int64 (batch, total), 1 for each token so far.
    """

    def __init__(self, graph: Graph, of: Architecture, mask: ir.Value) -> None:
        self._graph, self._of = graph, of
        (count,) = graph.op("ReduceSum", mask, graph.integers(1), name="mask.sum", keepdims=0)
        (last,) = graph.op("Sub", count, graph.integers(1), name="mask.last")
        (last,) = graph.op("Cast", last, name="seqlens_k", to=ir.DataType.INT32)
        (shape,) = graph.op("Shape", mask, name="mask.shape", start=1, end=2)
        (total,) = graph.op("Squeeze", shape, name="mask.total")
        (total,) = graph.op("Cast", total, name="total_sequence_length", to=ir.DataType.INT32)
        cosines, sines = of.rope.tables(of.head_size, of.positions)
        tables = graph.constant("rope.cosines", cosines), graph.constant("rope.sines", sines)
        self._positions = last, total, *tables

    def attend(
        self, qkv: Sequence[ir.Value], past: Sequence[ir.Value], present: Sequence[str], name: str
    ) -> tuple[ir.Value, ...]:
        """Return the heads' results, and keys and values so far.

        Args:
            qkv: queries, keys and values, or one value with all of them side by side.
            past: keys and values (batch, kv_heads, past, head_size).
            present: what the names of the results of this shape are.
            name: of the attention.
        """
        return self._graph.op(
            "GroupQueryAttention",
            *(qkv if len(qkv) == 3 else (qkv[0], None, None)),
            *past,
            *self._positions,
            name=name,
            outputs=["", *present],
            domain=CONTRIB,
            num_heads=self._of.heads,
            kv_num_heads=self._of.kv_heads,
            do_rotary=1,
        )

    def norm(self, x: ir.Value, gains: ir.Value, name: str, epsilon: float) -> ir.Value:
        """Return RMSNorm of x, by the name that onnxruntime has had for it in all versions."""
        op_type = "SimplifiedLayerNormalization"
        return self._graph.op(op_type, x, gains, name=name, axis=-1, epsilon=epsilon)[0]

    def add_norm(
        self, residual: ir.Value, x: ir.Value, gains: ir.Value, name: str, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        """Return RMSNorm of the sum, and the sum."""
        y, _, _, total = self._graph.op(
            "SkipSimplifiedLayerNormalization",
            residual,
            x,
            gains,
            name=name,
            outputs=["", "-", "-", f"{name}.sum"],
            domain=CONTRIB,
            epsilon=epsilon,
        )
        return y, total

    def silu(self, x: ir.Value, name: str) -> ir.Value:
        """Return x / (1 + exp(-x))."""
        return self._graph.op("QuickGelu", x, name=name, domain=CONTRIB, alpha=1.0)[0]
