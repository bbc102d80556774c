"""Nodes and initializers of a model under construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_bitnet.decoder.checked import meant
from onnx_bitnet.decoder.datafile import DataFile
from onnx_bitnet.formats import FORMATS, PANEL_OP, to_panels
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.rewrite.functions import DOMAIN, FUNCTIONS, VERSION
from onnx_bitnet.rewrite.replace import LAYER

OPSET = 18
CONTRIB = "com.microsoft"


class Graph:
    """Collects a graph; large constants go to the data file as they are added.

    Args:
        data: where large constants go.
    """

    def __init__(self, data: DataFile) -> None:
        self.data = data
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._constants: dict[str, ir.Value] = {}
        self.layers: dict[str, str] = {}
        """What `checked.meant` says of each packed layer."""
        self._packed_ops: set[str] = set()
        self._domains = {"": OPSET, DOMAIN: VERSION}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add an input of the graph."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make a value an output of the graph."""
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Add an initializer, once for each name."""
        if name not in self._constants:
            self.tensor(self.data.add(name, array.shape, [array]))
        return self._constants[name]

    def integers(self, *values: int) -> ir.Value:
        """Return a constant int64 vector."""
        return self.constant("int_" + "_".join(map(str, values)), np.array(values, np.int64))

    def tensor(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a tensor that the data file has given back."""
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self._constants[str(tensor.name)] = value
        return value

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        outputs: Sequence[str] = ("",),
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Add a node and return its outputs.

        Args:
            op_type: of the node.
            inputs: None for one that is left out.
            name: of the node, and of its first output where `outputs` gives none.
            outputs: their names, "-" for one that is not asked for.
            domain: of the op.
            attributes: of the node.
        """
        self._domains.setdefault(domain, 1)
        converted = ir.convenience.convert_attributes(attributes)
        node = ir.Node(domain, op_type, inputs, converted, name=name, num_outputs=len(outputs))
        for value, given in zip(node.outputs, outputs, strict=True):
            value.name = "" if given == "-" else given or f"{name}.out"
        self._nodes.append(node)
        return tuple(node.outputs)

    def packed(
        self, x: ir.Value, weight: Quantized, name: str, activation_bits: int, *, form: str, layout: str
    ) -> ir.Value:
        """Add a packed linear layer.

        Args:
            x: what it reads.
            weight: in whatever format.
            name: of the layer.
            activation_bits: 8, 16 or 32.
            form: format to store it in.
            layout: `canonical`, or `panel` for the order in which kernels read i2s.
        """
        self.layers[name] = meant(weight)
        stored = weight.to(form)
        if layout == "panel":
            codes = self.constant(f"{name}.panel", to_panels(stored.weight, stored.k))
            return self.product(x, stored, name, activation_bits, codes, op_type=PANEL_OP)
        codes = self.constant(f"{name}.{form}", stored.weight)
        return self.product(x, stored, name, activation_bits, codes)

    def product(
        self,
        x: ir.Value,
        quantized: Quantized,
        name: str,
        activation_bits: int,
        codes: ir.Value,
        *,
        op_type: str = "",
        output: str = "",
    ) -> ir.Value:
        """Add the op of a packed layer whose codes are stored already; `op_type` is that of their layout."""
        layout = FORMATS[quantized.format]
        op_type = op_type or layout.op_type
        zeros = self.constant(f"zeros_{quantized.n}", np.zeros(quantized.n, np.float32))
        inputs = [x, codes, self.constant(f"{name}.scale", quantized.scale)]
        if layout.four_levels:
            points = quantized.zero_point.astype(np.float32)
            inputs.append(self.constant("zero_point_" + "_".join(f"{p:g}" for p in points.flat), points))
        self._packed_ops.add(op_type)
        (y,) = self.op(
            op_type,
            *inputs,
            zeros,
            name=name,
            outputs=[output],
            domain=DOMAIN,
            K=quantized.k,
            N=quantized.n,
            block_size=quantized.block_size,
            activation_bits=activation_bits,
            activation_scale=0.0,
        )
        node = y.producer()
        assert node is not None
        node.metadata_props[LAYER] = name
        return y

    def model(self, name: str, metadata: dict[str, str]) -> ir.Model:
        """Return the model that all of it makes."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports=self._domains,
            name=name,
        )
        functions = [FUNCTIONS[op_type](OPSET) for op_type in sorted(self._packed_ops)]
        return ir.Model(
            graph,
            ir_version=8,
            producer_name="onnx_bitnet",
            functions=functions,
            metadata_props=metadata,
        )
