"""Writes text encoders whose linear layers are BitLinear with random weights, as fp32 ONNX.

    python models/encoders.py bert encoder.onnx

`bert` has the sizes of BERT-base: LayerNorm behind each sum, biases, GELU, learned positions. `qwen` is what
embedding models of Qwen's kind are: RMSNorm before each part, rotary positions, heads that share keys and
values, gated SiLU, and no causal mask. Both see no padding and give the mean over the tokens. They are good
at nothing but being converted and timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from charlm import Rounded, product, rounded_to_8_bits
from minilm import Graph, gelu, padding_bias, pooling
from onnx import TensorProto, helper

OPSET = 18
EPSILON = 1e-6


@dataclass(frozen=True)
class Geometry:
    """Sizes of an encoder; `kind` is bert or qwen."""

    kind: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int = 30522
    positions: int = 512

    @property
    def head_size(self) -> int:
        """Channels of one head of attention."""
        return self.hidden // self.heads

    def linear(self) -> dict[str, tuple[int, int]]:
        """Return outputs and inputs of the linear layers of a layer by name."""
        kv = self.kv_heads * self.head_size
        shapes = {"q": (self.hidden, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden)}
        shapes |= {"o": (self.hidden, self.hidden), "up": (self.ffn, self.hidden)}
        if self.kind == "qwen":
            shapes["gate"] = self.ffn, self.hidden
        return shapes | {"down": (self.hidden, self.ffn)}


GEOMETRIES = {
    "bert": Geometry("bert", layers=12, hidden=768, ffn=3072, heads=12, kv_heads=12),
    "qwen": Geometry("qwen", layers=12, hidden=768, ffn=2048, heads=12, kv_heads=4),
}


def build(of: Geometry, seed: int = 0) -> onnx.ModelProto:
    """Return the model.

    It takes int64 input_ids and attention_mask (batch, sequence) and gives float32 last_hidden_state
    (batch, sequence, hidden) and sentence_embedding (batch, hidden).
    """
    graph = Graph(dict(_tensors(of, np.random.default_rng(seed))))
    x = graph.op("Gather", graph.parameter("words"), "input_ids", name="words.gather")
    length = graph.op("Shape", "input_ids", name="length", start=1, end=2)
    tables = {
        name: graph.op("Slice", graph.parameter(name), graph.integers(0), length, name=f"{name}.slice")
        for name in (("positions",) if of.kind == "bert" else ("cosines", "sines"))
    }
    mask = graph.op("Unsqueeze", padding_bias(graph), graph.integers(1), name="mask.heads")
    if of.kind == "bert":
        x = _norm(graph, graph.op("Add", x, tables["positions"], name="words.positions"), "norm", of)
    for index in range(of.layers):
        x = _layer(graph, x, mask, tables, f"layer.{index}", of)
    x = (
        graph.op("Identity", x, name="last", output="last_hidden_state")
        if of.kind == "bert"
        else _norm(graph, x, "norm", of, "last_hidden_state")
    )
    pooling(graph, x)
    tokens = ["batch", "sequence"]
    onnx_graph = helper.make_graph(
        graph.nodes,
        of.kind,
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, tokens)
            for name in ("input_ids", "attention_mask")
        ],
        [
            helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*tokens, of.hidden]),
            helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", of.hidden]),
        ],
        list(graph.initializers.values()),
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        onnx_graph, opset_imports=opsets, ir_version=8, producer_name="onnx_bitnet models/encoders.py"
    )
    onnx.checker.check_model(model)
    return model


def feeds(of: Geometry, lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Return random tokens of texts of these lengths, with padding behind the shorter ones."""
    shape = len(lengths), max(lengths)
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    return {
        "input_ids": np.random.default_rng(seed).integers(1, of.vocabulary, shape) * mask,
        "attention_mask": mask,
    }


def _tensors(of: Geometry, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Yield all weights; those of linear layers are scale * {-1, 0, 1}, and keep the size of activations."""
    yield "words", rng.standard_normal((of.vocabulary, of.hidden), np.float32)
    if of.kind == "bert":
        yield "positions", rng.standard_normal((of.positions, of.hidden), np.float32)
    else:
        angles = np.outer(np.arange(of.positions), 1e6 ** -(np.arange(0, of.head_size, 2) / of.head_size))
        yield "cosines", np.cos(angles).astype(np.float32)
        yield "sines", np.sin(angles).astype(np.float32)
    norms = ["norm", *(f"layer.{index}.{part}" for index in range(of.layers) for part in ("norm1", "norm2"))]
    for name in norms:
        yield f"{name}.weight", rng.uniform(0.5, 1.5, of.hidden).astype(np.float32)
        yield f"{name}.bias", rng.normal(0, 0.1, of.hidden).astype(np.float32)
    for index in range(of.layers):
        for name, (n, k) in of.linear().items():
            trits = rng.integers(-1, 2, (n, k)).astype(np.float32)
            yield f"layer.{index}.{name}.weight", trits * np.float32((1.5 / k) ** 0.5)
            yield f"layer.{index}.{name}.bias", rng.normal(0, 0.1, n).astype(np.float32)


def _layer(graph: Graph, x: str, mask: str, tables: dict[str, str], module: str, of: Geometry) -> str:
    if of.kind == "bert":
        x = _sum(graph, x, _attention(graph, x, mask, tables, module, of), f"{module}.attended")
        x = _norm(graph, x, f"{module}.norm1", of)
        x = _sum(graph, x, _feed_forward(graph, x, module, of), f"{module}.sum")
        return _norm(graph, x, f"{module}.norm2", of)
    normed = _norm(graph, x, f"{module}.norm1", of)
    x = _sum(graph, x, _attention(graph, normed, mask, tables, module, of), f"{module}.attended")
    normed = _norm(graph, x, f"{module}.norm2", of)
    return _sum(graph, x, _feed_forward(graph, normed, module, of), f"{module}.sum")


def _attention(graph: Graph, x: str, mask: str, tables: dict[str, str], module: str, of: Geometry) -> str:
    """Heads that share keys and values are a dimension: (batch, kv heads, share, sequence, size)."""
    rounded, share = rounded_to_8_bits(graph, x, f"{module}.attention"), of.heads // of.kv_heads

    def project(part: str, share: int) -> str:
        y = _linear(graph, rounded, f"{module}.{part}", biased=True)
        split = graph.integers(0, 0, of.kv_heads, share, of.head_size)
        y = graph.op("Reshape", y, split, name=f"{module}.{part}.heads")
        y = graph.op("Transpose", y, name=f"{module}.{part}.transpose", perm=[0, 2, 3, 1, 4])
        return y if part == "v" or of.kind == "bert" else _turned(graph, y, tables, f"{module}.{part}")

    key = graph.op("Transpose", project("k", 1), name=f"{module}.keys", perm=[0, 1, 2, 4, 3])
    scores = graph.op("MatMul", project("q", share), key, name=f"{module}.scores")
    scores = graph.op("Mul", scores, graph.scalar(of.head_size**-0.5), name=f"{module}.scale")
    scores = graph.op("Add", scores, mask, name=f"{module}.mask")
    shares = graph.op("Softmax", scores, name=f"{module}.softmax", axis=-1)
    y = graph.op("MatMul", shares, project("v", 1), name=f"{module}.context")
    y = graph.op("Transpose", y, name=f"{module}.context.transpose", perm=[0, 3, 1, 2, 4])
    y = graph.op("Reshape", y, graph.integers(0, 0, of.hidden), name=f"{module}.context.merge")
    return _linear(
        graph, rounded_to_8_bits(graph, y, f"{module}.o.input"), f"{module}.o", biased=of.kind == "bert"
    )


def _turned(graph: Graph, x: str, tables: dict[str, str], name: str) -> str:
    """Return x with the two halves of each head turned by the angles of their position."""
    parts = [f"{name}.first", f"{name}.second"]
    graph.nodes.append(helper.make_node("Split", [x], parts, name=f"{name}.halves", axis=-1, num_outputs=2))

    def mixed(op_type: str, a: str, b: str) -> str:
        a, b = (
            graph.op("Mul", part, tables[table], name=f"{name}.{op_type}.{table}")
            for part, table in ((a, "cosines"), (b, "sines"))
        )
        return graph.op(op_type, a, b, name=f"{name}.{op_type}")

    first, second = mixed("Sub", *parts), mixed("Add", *reversed(parts))
    return graph.op("Concat", first, second, name=f"{name}.turned", axis=-1)


def _feed_forward(graph: Graph, x: str, module: str, of: Geometry) -> str:
    bert, rounded = of.kind == "bert", rounded_to_8_bits(graph, x, f"{module}.ffn")
    up = _linear(graph, rounded, f"{module}.up", biased=bert)
    if bert:
        y = gelu(graph, up, f"{module}.gelu")
    else:
        gate = _linear(graph, rounded, f"{module}.gate", biased=False)
        sigmoid = graph.op("Sigmoid", gate, name=f"{module}.sigmoid")
        gate = graph.op("Mul", gate, sigmoid, name=f"{module}.silu")
        y = graph.op("Mul", gate, up, name=f"{module}.gated")
    return _linear(graph, rounded_to_8_bits(graph, y, f"{module}.down.input"), f"{module}.down", biased=bert)


def _linear(graph: Graph, x: Rounded, module: str, *, biased: bool) -> str:
    y = product(graph, x, module)
    return graph.op("Add", y, graph.parameter(f"{module}.bias"), name=f"{module}.add") if biased else y


def _sum(graph: Graph, x: str, y: str, name: str) -> str:
    return graph.op("Add", x, y, name=name)


def _norm(graph: Graph, x: str, module: str, of: Geometry, output: str | None = None) -> str:
    """Return LayerNorm for bert, RMSNorm for qwen."""
    if of.kind == "bert":
        return graph.layer_norm(x, module, output)
    square = graph.op("Mul", x, x, name=f"{module}.square")
    mean = graph.op("ReduceMean", square, graph.integers(-1), name=f"{module}.mean", keepdims=1)
    mean = graph.op("Add", mean, graph.scalar(EPSILON), name=f"{module}.eps")
    x = graph.op("Div", x, graph.op("Sqrt", mean, name=f"{module}.root"), name=f"{module}.div")
    return graph.op("Mul", x, graph.parameter(f"{module}.weight"), name=module, output=output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=list(GEOMETRIES))
    parser.add_argument("out", type=Path, help="ONNX file to write")
    arguments = parser.parse_args()
    onnx.save(build(GEOMETRIES[arguments.kind]), arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
