"""The parts of a decoder between its layers, in ops that every runtime of ONNX has.

Past and present are different buffers, which each token copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_bitnet.decoder.architecture import Architecture
from onnx_bitnet.decoder.graph import Graph

_HIDDEN = np.array(np.finfo(np.float32).min)  # what the score of a key becomes that a query must not see


class Standard:
    """What `Contrib` has ops for; values are float32 (batch, sequence, width).

    Tokens with 0 in the mask are seen by none and take no position, wherever they stand.

    Args:
        graph: where nodes go.
        of: sizes of heads, and their rotary embedding.
        mask: int64 (batch, total), 1 for each token so far.
        ids: int64 (batch, sequence), the tokens that are new.
    """

    def __init__(self, graph: Graph, of: Architecture, mask: ir.Value, ids: ir.Value) -> None:
        self._graph, self._of = graph, of
        (total,) = graph.op("Shape", mask, name="total", start=1, end=2)
        (sequence,) = graph.op("Shape", ids, name="sequence", start=1, end=2)
        (past,) = graph.op("Sub", total, sequence, name="past")
        self._turns = self._angles(mask, past, total)
        self._bias = self._unseen(mask, past, total)
        # (batch, kv_heads, heads that share them, sequence, total), and the middle two as one
        self._apart, self._joined = (
            graph.op("Concat", graph.integers(*shape), total, name=f"scores.{name}", axis=0)[0]
            for name, shape in (("apart", (0, 0, of.heads // of.kv_heads, -1)), ("joined", (0, 0, -1)))
        )

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
        graph, of = self._graph, self._of
        x = qkv[0] if len(qkv) == 1 else graph.op("Concat", *qkv, name=f"{name}.qkv", axis=-1)[0]
        shape = graph.integers(0, 0, of.heads + 2 * of.kv_heads, of.head_size)
        x = self._apply("Transpose", self._reshape(x, shape, f"{name}.split"), f"{name}.heads", perm=_SWAP)
        sizes = graph.integers(of.heads + of.kv_heads, of.kv_heads)
        names = f"{name}.q_and_k", f"{name}.v"
        both, v = graph.op("Split", x, sizes, name=f"{name}.parts", outputs=names, axis=1)
        sizes, names = graph.integers(of.heads, of.kv_heads), (f"{name}.q", f"{name}.k")
        q, k = graph.op("Split", self._turn(both, name), sizes, name=f"{name}.turned", outputs=names, axis=1)
        keys, values = (
            graph.op("Concat", old, new, name=f"{output}.concat", outputs=[output], axis=2)[0]
            for old, new, output in zip(past, (k, v), present, strict=True)
        )
        return self._mix(q, keys, values, name), keys, values

    def _mix(self, q: ir.Value, keys: ir.Value, values: ir.Value, name: str) -> ir.Value:
        """Return softmax(q k^T) v: queries that share keys stand below each other, as rows of one product."""
        graph, of = self._graph, self._of
        rows = self._reshape(q, graph.integers(0, of.kv_heads, -1, of.head_size), f"{name}.rows")
        scale = graph.constant("scale", np.array(of.head_size**-0.5, np.float32))
        turned = self._apply("Transpose", keys, f"{name}.keys", perm=[0, 1, 3, 2])
        scores = self._apply(
            "MatMul", self._apply("Mul", rows, f"{name}.scaled", scale), f"{name}.qk", turned
        )
        scores = self._reshape(scores, self._apart, f"{name}.scores")
        scores = self._apply("Add", scores, f"{name}.masked", self._bias)
        shares = self._apply("Softmax", scores, f"{name}.softmax", axis=-1)
        x = self._apply("MatMul", self._reshape(shares, self._joined, f"{name}.shares"), f"{name}.sv", values)
        x = self._reshape(x, graph.integers(0, of.heads, -1, of.head_size), f"{name}.apart")
        x = self._apply("Transpose", x, f"{name}.tokens", perm=_SWAP)
        return self._reshape(x, graph.integers(0, 0, of.heads * of.head_size), name)

    def norm(self, x: ir.Value, gains: ir.Value, name: str, epsilon: float) -> ir.Value:
        """Return RMSNorm of x, spelled so that onnxruntime makes one op of it again."""
        graph = self._graph
        two, small = (
            graph.constant(f"float_{number}", np.array(number, np.float32)) for number in (2, epsilon)
        )
        square = self._apply("Pow", x, f"{name}.square", two)
        mean = self._apply("ReduceMean", square, f"{name}.mean", graph.integers(-1))
        root = self._apply("Sqrt", self._apply("Add", mean, f"{name}.positive", small), f"{name}.root")
        return self._apply("Mul", self._apply("Div", x, f"{name}.normed", root), name, gains)

    def add_norm(
        self, residual: ir.Value, x: ir.Value, gains: ir.Value, name: str, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        """Return RMSNorm of the sum, and the sum."""
        total = self._apply("Add", residual, f"{name}.sum", x)
        return self.norm(total, gains, name, epsilon), total

    def silu(self, x: ir.Value, name: str) -> ir.Value:
        """Return x / (1 + exp(-x))."""
        return self._apply("Mul", x, name, self._apply("Sigmoid", x, f"{name}.sigmoid"))

    def _angles(self, mask: ir.Value, past: ir.Value, total: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return cosines and sines (batch, 1, sequence, head_size / 2) of the new tokens' positions."""
        graph, of = self._graph, self._of
        (count,) = graph.op("CumSum", mask, graph.constant("axis", np.array(1)), name="mask.count")
        (index,) = graph.op("Sub", count, graph.integers(1), name="mask.index")
        (index,) = graph.op("Max", index, graph.integers(0), name="mask.positions")
        (positions,) = graph.op("Slice", index, past, total, graph.integers(1), name="positions")
        (positions,) = graph.op("Unsqueeze", positions, graph.integers(1), name="positions.heads")
        cosines, sines = (
            graph.op("Gather", graph.constant(f"rope.{name}", table), positions, name=name)[0]
            for name, table in zip(
                ("cosines", "sines"), of.rope.tables(of.head_size, of.positions), strict=True
            )
        )
        return cosines, sines

    def _unseen(self, mask: ir.Value, past: ir.Value, total: ir.Value) -> ir.Value:
        """Return what to add to scores (batch, 1, 1, sequence, total)."""
        graph = self._graph
        start, end = (
            graph.op("Squeeze", value, graph.integers(0), name=f"{value.name}.scalar")[0]
            for value in (past, total)
        )
        zero, one = (graph.constant(f"int_{number}_scalar", np.array(number)) for number in (0, 1))
        (keys,) = graph.op("Range", zero, end, one, name="keys")
        (queries,) = graph.op("Range", start, end, one, name="queries")
        (queries,) = graph.op("Unsqueeze", queries, graph.integers(1), name="queries.rows")
        (earlier,) = graph.op("LessOrEqual", keys, queries, name="earlier")
        (there,) = graph.op("Cast", mask, name="mask.there", to=ir.DataType.BOOL)
        (there,) = graph.op("Unsqueeze", there, graph.integers(1, 2, 3), name="mask.keys")
        (seen,) = graph.op("And", there, earlier, name="seen")
        hidden = graph.constant("hidden", _HIDDEN)
        return graph.op(
            "Where", seen, graph.constant("float_0", np.array(0, np.float32)), hidden, name="bias"
        )[0]

    def _turn(self, x: ir.Value, name: str) -> ir.Value:
        """Rotate pairs of the two halves of each head of x by the angles of their position."""
        cosines, sines = self._turns
        first, second = self._graph.op(
            "Split",
            x,
            name=f"{name}.halves",
            outputs=(f"{name}.first", f"{name}.second"),
            axis=-1,
            num_outputs=2,
        )
        parts = (
            (first, cosines, "Sub", second, sines, f"{name}.real"),
            (second, cosines, "Add", first, sines, f"{name}.imaginary"),
        )
        halves = (
            self._apply(
                op_type, self._apply("Mul", a, f"{part}.a", c), part, self._apply("Mul", b, f"{part}.b", s)
            )
            for a, c, op_type, b, s, part in parts
        )
        return self._graph.op("Concat", *halves, name=f"{name}.rotary", axis=-1)[0]

    def _reshape(self, x: ir.Value, shape: ir.Value, name: str) -> ir.Value:
        return self._apply("Reshape", x, name, shape)

    def _apply(self, op_type: str, x: ir.Value, name: str, *others: ir.Value, **attributes: Any) -> ir.Value:
        return self._graph.op(op_type, x, *others, name=name, **attributes)[0]


_SWAP = [0, 2, 1, 3]
