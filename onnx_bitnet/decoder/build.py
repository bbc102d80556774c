"""Write a decoder as an ONNX model for text generation, with packed layers and a cache of keys and values.

Inputs and outputs have the names and shapes that onnxruntime-genai expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnx_bitnet.decoder.architecture import Architecture
from onnx_bitnet.decoder.checked import check
from onnx_bitnet.decoder.contrib import Contrib
from onnx_bitnet.decoder.datafile import DataFile
from onnx_bitnet.decoder.graph import Graph
from onnx_bitnet.decoder.source import Source
from onnx_bitnet.decoder.standard import Standard
from onnx_bitnet.decoder.tokens import Tokens
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.report import Progress
from onnx_bitnet.rewrite.fuse import concatenate

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64

ATTENTION = ("gqa", "standard")
LAYOUTS = ("canonical", "panel")


@dataclass(frozen=True)
class Options:
    """What can be chosen about a decoder that its checkpoint does not say.

    Args:
        head: how the last layer is stored and computed: `float`, `int8` or `int4` by onnxruntime's own ops,
            `packed8` or `packed4` by the packed op, which is faster.
        embedding: `float`, `int8` or `int4` for the first, which costs no time, only room.
        format: of packed weights, see formats.py.
        all_logits: give the logits of every position, for perplexity; else of the last one alone.
        attention: `gqa` for onnxruntime's own ops, whose cache grows in place; `standard` for ops that every
            runtime of ONNX has, in norms and head too (float or packed), and a cache that each token copies.
        layout: `panel` stores i2s layers, not the head, as the kernels read them: the session opens at once
            and maps them, for some speed; otherwise `canonical`.
    """

    head: str = "packed8"
    embedding: str = "float"
    format: str = "i2s"
    all_logits: bool = False
    attention: str = "gqa"
    layout: str = "canonical"


def write_model(
    path: Path,
    architecture: Architecture,
    source: Source,
    options: Options,
    progress: Progress | None = None,
) -> None:
    """Write the model at `path` and its weights beside it in `<path>.data`, and read both back.

    Weights are written as they are read, so memory holds those of one layer at a time.

    Raises:
        OutputError: the files hold something else than was meant.
    """
    progress = progress or (lambda *_: None)
    with path.with_name(path.name + ".data").open("wb") as file:
        graph = Graph(DataFile(file))
        model = _Builder(architecture, source, options, graph).build(progress)
    ir.save(model, path, format="protobuf")
    check(path, graph.layers, graph.data.digests, progress)


class _Builder:
    """The parts of one decoder; methods follow the modules of transformers, whose names nodes carry."""

    def __init__(self, of: Architecture, source: Source, options: Options, graph: Graph) -> None:
        self.of, self.source, self.options, self.graph = of, source, options, graph
        self.ids = graph.input("input_ids", _INT64, ["batch", "sequence"])
        mask = graph.input("attention_mask", _INT64, ["batch", "total"])
        self.parts = (
            Contrib(graph, of, mask) if options.attention == "gqa" else Standard(graph, of, mask, self.ids)
        )

    def build(self, progress: Progress) -> ir.Model:
        of, graph = self.of, self.graph
        tokens = Tokens(graph, self.source, of, (self.options.embedding, self.options.head))
        progress(0, of.layers + 2, "embedding")
        residual = tokens.embed(self.ids)
        x = self._norm(residual, "model.layers.0.input_layernorm", of.hidden)
        for index in range(of.layers):
            progress(index + 1, of.layers + 2, f"layer {index}")
            after = f"model.layers.{index + 1}.input_layernorm" if index + 1 < of.layers else "model.norm"
            x, residual = self._layer(index, x, residual, after)
        progress(of.layers + 1, of.layers + 2, "head")
        if not self.options.all_logits:
            (x,) = graph.op(
                "Slice", x, graph.integers(-1), graph.integers(2**31), graph.integers(1), name="last"
            )
        logits = tokens.logits(x)
        graph.output(logits, _FLOAT, ["batch", "sequence" if self.options.all_logits else 1, of.vocabulary])
        graph.outputs.insert(0, graph.outputs.pop())
        progress(of.layers + 2, of.layers + 2, "")
        return graph.model(of.name, {})

    def _layer(self, index: int, x: ir.Value, residual: ir.Value, after: str) -> tuple[ir.Value, ir.Value]:
        """Return the next layer's normalized input, and the residual stream."""
        name = f"model.layers.{index}"
        x = self._attention(index, x)
        x, residual = self._add_norm(residual, x, f"{name}.post_attention_layernorm")
        return self._add_norm(residual, self._feed_forward(f"{name}.mlp", x), after)

    def _attention(self, index: int, x: ir.Value) -> ir.Value:
        of, graph, name = self.of, self.graph, f"model.layers.{index}.self_attn"
        sizes = {"q": of.heads, "k": of.kv_heads, "v": of.kv_heads}
        widths = {f"{name}.{part}_proj": heads * of.head_size for part, heads in sizes.items()}
        qkv = self._linears(x, widths, f"{name}.qkv_proj", of.hidden)
        shape: list[int | str] = ["batch", of.kv_heads, "past", of.head_size]
        parts = ("key", "value")
        past = [graph.input(f"past_key_values.{index}.{part}", _FLOAT, shape) for part in parts]
        x, *present = self.parts.attend(qkv, past, [f"present.{index}.{part}" for part in parts], name)
        for value in present:
            graph.output(value, _FLOAT, ["batch", of.kv_heads, "total", of.head_size])
        if of.sub_norms:
            x = self._norm(x, f"{name}.attn_sub_norm", of.heads * of.head_size)
        return self._linear(x, f"{name}.o_proj", of.hidden, of.heads * of.head_size)

    def _feed_forward(self, name: str, x: ir.Value) -> ir.Value:
        of, graph = self.of, self.graph
        gate = self._linear(x, f"{name}.gate_proj", of.ffn, of.hidden)
        up = self._linear(x, f"{name}.up_proj", of.ffn, of.hidden)
        if of.activation == "relu2":
            (positive,) = graph.op("Relu", gate, name=f"{name}.relu")
            (gate,) = graph.op("Mul", positive, positive, name=f"{name}.square")
        else:
            gate = self.parts.silu(gate, f"{name}.silu")
        (x,) = graph.op("Mul", gate, up, name=f"{name}.gated")
        if of.sub_norms:
            x = self._norm(x, f"{name}.ffn_sub_norm", of.ffn)
        return self._linear(x, f"{name}.down_proj", of.hidden, of.ffn)

    def _linears(self, x: ir.Value, widths: dict[str, int], name: str, k: int) -> tuple[ir.Value, ...]:
        """Add layers that read the same x: as one, unless each has a norm of its own before it."""
        if self.of.input_epsilon is not None:
            return tuple(self._linear(x, module, n, k) for module, n in widths.items())
        weights = [self.source.linear(module, n, k) for module, n in widths.items()]
        return (self._packed(x, concatenate(weights), name),)

    def _linear(self, x: ir.Value, module: str, n: int, k: int) -> ir.Value:
        if self.of.input_epsilon is not None:
            x = self._norm(x, f"{module}.rms_norm", k, self.of.input_epsilon)
        return self._packed(x, self.source.linear(module, n, k), module)

    def _packed(self, x: ir.Value, weight: Quantized, name: str) -> ir.Value:
        of, options = self.of, self.options
        return self.graph.packed(
            x, weight, name, of.activation_bits, form=options.format, layout=options.layout
        )

    def _norm(self, x: ir.Value, module: str, size: int, epsilon: float | None = None) -> ir.Value:
        epsilon = self.of.epsilon if epsilon is None else epsilon
        return self.parts.norm(x, self._gains(module, size), module, epsilon)

    def _add_norm(self, residual: ir.Value, x: ir.Value, module: str) -> tuple[ir.Value, ir.Value]:
        """Return the normalized sum, and the sum."""
        return self.parts.add_norm(residual, x, self._gains(module, self.of.hidden), module, self.of.epsilon)

    def _gains(self, module: str, size: int) -> ir.Value:
        return self.graph.constant(f"{module}.weight", self.source.norm(module, size))
