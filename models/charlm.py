"""A small natively ternary language model: writes it as fp32 ONNX, measures and runs it. Needs no torch.

    python models/charlm.py charlm.onnx [--prompt "The with statement "]

The architecture is BitNet b1.58's: RMSNorm before every BitLinear layer, rotary positions, grouped-query
attention, gated squared ReLU, tied embeddings. Its tokens are ASCII characters. Its weights were trained by
train_charlm.py on the reference text that ships with Python. They lie in charlm/ in the layout of a Hugging
Face BitNet checkpoint: packed codes, and one scale a matrix. The ONNX file spells BitLinear as PyTorch does.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import onnx
import onnxruntime as ort
from minilm import Graph
from onnx import TensorProto, helper

import onnx_bitnet as bn
from onnx_bitnet.weights import load_weights

CHECKPOINT = Path(__file__).parent / "charlm"
CONTEXT = 128  # tokens the graph can hold
OPSET = 18


@dataclass(frozen=True)
class Geometry:
    """The sizes of the model, under their names in config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float

    @property
    def head_size(self) -> int:
        """Channels of one head of attention."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def load(cls, folder: Path = CHECKPOINT) -> Geometry:
        """Read them from a checkpoint."""
        config = json.loads((folder / "config.json").read_text())
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})

    def rotation(self) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and sines, float32 (CONTEXT, head_size), of rotary positions."""
        half = np.arange(self.head_size // 2) / (self.head_size // 2)
        angle = np.outer(np.arange(CONTEXT), self.rope_theta**-half)
        angle = np.concatenate([angle, angle], axis=1)
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def text(every: int = 10) -> tuple[str, str]:
    """Return the text to train on, about 430 000 characters, and 6 000 to test on.

    The latter are from every tenth topic. Topics repeat each other, so only those paragraphs count of which
    no 40 characters in a row, looked for in steps of 10, are in the text to train on.

    Args:
        every: hold out more topics (fewer than 10) or less; one of these many.
    """
    names = sorted(topics)
    held = [i % every == every // 2 for i in range(len(names))]
    parts = [[n for n, out in zip(names, held, strict=True) if out == held_out] for held_out in (False, True)]
    training, test = (
        "\n".join(topics[name] for name in part).encode("ascii", "ignore").decode() for part in parts
    )
    known = " ".join(training.split())

    def is_new(paragraph: str) -> bool:
        line = " ".join(paragraph.split())
        pieces = [line[start : start + 40] for start in range(0, len(line) - 39, 10)]
        return bool(pieces) and not any(piece in known for piece in pieces)

    return training, "\n\n".join(filter(is_new, re.split(r"\n\s*\n", test)))


def tokens(string: str) -> np.ndarray:
    """Return the characters as int64 tokens; what is not ASCII is left out."""
    return np.frombuffer(string.encode("ascii", "ignore"), np.uint8).astype(np.int64)


def weights(folder: Path = CHECKPOINT) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint as float32; BitLinear weights (N, K) are scale * {-1, 0, 1}."""
    packed = load_weights(folder)
    return {name: weight.dequantize() for name, weight in packed.items()} | dict(packed.others)


def build(folder: Path = CHECKPOINT) -> onnx.ModelProto:
    """Return the float model: tokens int64 (batch, length <= 128) to logits float32 (batch, length, 128)."""
    geometry = Geometry.load(folder)
    graph = Graph(weights(folder))
    embedding = graph.parameter("model.embed_tokens.weight")
    x = graph.op("Gather", embedding, "tokens", name="model.embed_tokens")
    rotation = _rotation(graph, geometry)
    for index in range(geometry.num_hidden_layers):
        x = _layer(graph, x, f"model.layers.{index}", geometry, rotation)
    x = _norm(graph, x, "model.norm", geometry)
    head = graph.op("Transpose", embedding, name="lm_head.transpose", perm=[1, 0])
    graph.op("MatMul", x, head, name="lm_head", output="logits")

    shape = ["batch", "length"]
    onnx_graph = helper.make_graph(
        graph.nodes,
        "charlm",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, geometry.vocab_size])],
        list(graph.initializers.values()),
    )
    model = helper.make_model(
        onnx_graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
        producer_name="onnx_bitnet models/charlm.py",
    )
    onnx.checker.check_model(model)
    return model


@dataclass(frozen=True)
class Rotation:
    """Names of what positions need: cosines and sines (length, head_size), and -inf above the diagonal."""

    cos: str
    sin: str
    future: str


def _rotation(graph: Graph, geometry: Geometry) -> Rotation:
    length = graph.op("Shape", "tokens", name="length", start=1, end=2)
    zero, rows, columns = graph.integers(0), graph.integers(0), graph.integers(0, 1)
    tables = {}
    for name, table in zip(("cos", "sin"), geometry.rotation(), strict=True):
        tables[name] = graph.op(
            "Slice", graph.constant(f"{name}.table", table), zero, length, rows, name=name
        )
    square = np.triu(np.full((CONTEXT, CONTEXT), -np.inf, np.float32), 1)
    sides = graph.op("Concat", length, length, name="future.sides", axis=0)
    start = graph.integers(0, 0)
    future = graph.op("Slice", graph.constant("future.table", square), start, sides, columns, name="future")
    return Rotation(tables["cos"], tables["sin"], future)


def _layer(graph: Graph, x: str, module: str, geometry: Geometry, rotation: Rotation) -> str:
    normed = _norm(graph, x, f"{module}.input_layernorm", geometry)
    attended = _attention(graph, normed, f"{module}.self_attn", geometry, rotation)
    x = graph.op("Add", x, attended, name=f"{module}.self_attn.residual")
    normed = _norm(graph, x, f"{module}.post_attention_layernorm", geometry)
    return graph.op("Add", x, _mlp(graph, normed, f"{module}.mlp", geometry), name=f"{module}.mlp.residual")


def _mlp(graph: Graph, x: str, module: str, geometry: Geometry) -> str:
    rounded = rounded_to_8_bits(graph, x, f"{module}.input")
    gate = graph.op("Relu", product(graph, rounded, f"{module}.gate_proj"), name=f"{module}.relu")
    gate = graph.op("Mul", gate, gate, name=f"{module}.square")
    x = graph.op("Mul", gate, product(graph, rounded, f"{module}.up_proj"), name=f"{module}.gated")
    x = _norm(graph, x, f"{module}.ffn_sub_norm", geometry)
    return product(graph, rounded_to_8_bits(graph, x, f"{module}.down_proj.input"), f"{module}.down_proj")


def _attention(graph: Graph, x: str, module: str, geometry: Geometry, rotation: Rotation) -> str:
    """Heads that share keys and values are a dimension: (batch, kv heads, share, length, size)."""
    groups, size = geometry.num_key_value_heads, geometry.head_size
    rounded = rounded_to_8_bits(graph, x, f"{module}.input")

    def project(part: str, share: int) -> str:
        y = product(graph, rounded, f"{module}.{part}_proj")
        y = graph.op("Reshape", y, graph.integers(0, 0, groups, share, size), name=f"{module}.{part}.heads")
        return graph.op("Transpose", y, name=f"{module}.{part}.transpose", perm=[0, 2, 3, 1, 4])

    query = rotated(
        graph, project("q", geometry.num_attention_heads // groups), f"{module}.q", rotation, size
    )
    key = rotated(graph, project("k", 1), f"{module}.k", rotation, size)
    key = graph.op("Transpose", key, name=f"{module}.k.turned", perm=[0, 1, 2, 4, 3])
    scores = graph.op("MatMul", query, key, name=f"{module}.scores")
    scores = graph.op("Mul", scores, graph.scalar(size**-0.5), name=f"{module}.scale")
    scores = graph.op("Add", scores, rotation.future, name=f"{module}.mask")
    share = graph.op("Softmax", scores, name=f"{module}.softmax", axis=-1)
    y = graph.op("MatMul", share, project("v", 1), name=f"{module}.context")
    y = graph.op("Transpose", y, name=f"{module}.context.transpose", perm=[0, 3, 1, 2, 4])
    y = graph.op("Reshape", y, graph.integers(0, 0, geometry.hidden_size), name=f"{module}.context.merge")
    y = _norm(graph, y, f"{module}.attn_sub_norm", geometry)
    return product(graph, rounded_to_8_bits(graph, y, f"{module}.o_proj.input"), f"{module}.o_proj")


def rotated(graph: Graph, x: str, name: str, rotation: Rotation, size: int) -> str:
    last = graph.integers(-1)
    half, end, zero = graph.integers(size // 2), graph.integers(size), graph.integers(0)
    first = graph.op("Slice", x, zero, half, last, name=f"{name}.first")
    second = graph.op("Slice", x, half, end, last, name=f"{name}.second")
    second = graph.op("Neg", second, name=f"{name}.negated")
    turned = graph.op("Concat", second, first, name=f"{name}.turned_halves", axis=-1)
    straight = graph.op("Mul", x, rotation.cos, name=f"{name}.cos")
    turned = graph.op("Mul", turned, rotation.sin, name=f"{name}.sin")
    return graph.op("Add", straight, turned, name=f"{name}.rotated")


def _norm(graph: Graph, x: str, module: str, geometry: Geometry) -> str:
    """Return x over the root of its mean square, times a gain."""
    square = graph.op("Mul", x, x, name=f"{module}.square")
    mean = graph.op("ReduceMean", square, graph.integers(-1), name=f"{module}.mean", keepdims=1)
    mean = graph.op("Add", mean, graph.scalar(geometry.rms_norm_eps), name=f"{module}.eps")
    root = graph.op("Sqrt", mean, name=f"{module}.root")
    x = graph.op("Div", x, root, name=f"{module}.div")
    return graph.op("Mul", x, graph.parameter(f"{module}.weight"), name=module)


@dataclass(frozen=True)
class Rounded:
    """Names of activations rounded to 8 bits per token: integers q and their step, x ~ q * step."""

    q: str
    step: str


def rounded_to_8_bits(graph: Graph, x: str, name: str) -> Rounded:
    """Round activations, node for node as PyTorch exports `onnx_bitnet.torch`."""
    largest = graph.op("Abs", x, name=f"{name}.abs")
    largest = graph.op("ReduceMax", largest, graph.integers(-1), name=f"{name}.max", keepdims=1)
    largest = graph.op("Clip", largest, graph.scalar(1e-5), name=f"{name}.clip")
    scale = graph.op("Reciprocal", largest, name=f"{name}.reciprocal")
    scale = graph.op("Mul", scale, graph.scalar(127), name=f"{name}.scale")
    x = graph.op("Mul", x, scale, name=f"{name}.scaled")
    x = graph.op("Round", x, name=f"{name}.round")
    q = graph.op("Clip", x, graph.scalar(-128), graph.scalar(127), name=f"{name}.clamp")
    return Rounded(q, graph.op("Div", largest, graph.scalar(127), name=f"{name}.step"))


def product(graph: Graph, x: Rounded, module: str) -> str:
    """Return the products of integers, which float32 holds exactly, times the scales of both sides."""
    weight = graph.tensors[f"{module}.weight"]
    codes = graph.constant(f"{module}.weight", np.sign(weight.T))
    scale = graph.constant(f"{module}.scale", np.abs(weight).max())
    y = graph.op("MatMul", x.q, codes, name=module)
    scale = graph.op("Mul", x.step, scale, name=f"{module}.factor")
    return graph.op("Mul", y, scale, name=f"{module}.scaled")


def bits_per_character(session: ort.InferenceSession, string: str, length: int = 128) -> float:
    """Return the cross entropy in bits over a text that is read in pieces of `length` characters."""
    pieces = tokens(string)
    pieces = pieces[: len(pieces) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    bits = []
    for batch in np.array_split(pieces, -(-len(pieces) // 16)):
        (logits,) = session.run(None, {"tokens": batch[:, :-1]})
        logits = logits.astype(np.float64)
        total = np.log(np.exp(logits).sum(axis=-1))
        right = np.take_along_axis(logits, batch[:, 1:, None], axis=-1)[..., 0]
        bits.append((total - right) / np.log(2))
    return float(np.concatenate(bits).mean())


def generate(session: ort.InferenceSession, prompt: str, count: int) -> str:
    """Continue a text greedily by `count` characters, of which the model sees the last 128."""
    row = tokens(prompt).tolist()
    for _ in range(count):
        (logits,) = session.run(None, {"tokens": np.array([row[-CONTEXT:]], np.int64)})
        row.append(int(logits[0, -1].argmax()))
    return bytes(row).decode("ascii")[len(prompt) :]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="ONNX file to write; or one to use, with --use")
    parser.add_argument("--use", action="store_true", help="do not write: run this file, packed or not")
    parser.add_argument("--prompt", default="The with statement ", help="text to continue")
    parser.add_argument("--count", type=int, default=90, help="characters to generate")
    arguments = parser.parse_args()
    if not arguments.use:
        onnx.save(build(), arguments.out)
        print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB")
    session = bn.session(arguments.out)
    print(
        f"{bits_per_character(session, text()[1]):.4f} bits per character of text that it was not trained on"
    )
    started = time.perf_counter()
    print(arguments.prompt + generate(session, arguments.prompt, arguments.count))
    print(f"{arguments.count / (time.perf_counter() - started):.0f} characters/s, without a cache")


if __name__ == "__main__":
    main()
