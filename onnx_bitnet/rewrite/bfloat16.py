"""A graph computed in bfloat16, which onnxruntime has no CPU kernels for, turned into a float32 graph.

Types of ONNX values follow from those they are computed from, so only the places are changed where a type
comes from: inputs, Casts, and stored constants, which keep their bytes and are cast where they are read.
A constant subgraph goes on rounding to bfloat16 where it has a Cast, because the weight is what comes out.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnx_bitnet.graphs import roots, values
from onnx_bitnet.rewrite.constants import stored_tensor
from onnx_bitnet.rewrite.functions import DOMAIN
from onnx_bitnet.rewrite.origins import Facts, survey
from onnx_bitnet.rewrite.records import unique
from onnx_bitnet.rewrite.types import FOUND

_FROM, _TO = ir.DataType.BFLOAT16, ir.DataType.FLOAT
# Attributes that name the type of what a node makes.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")


def widen(model: ir.Model) -> bool:
    """Turn bfloat16 activations into float32 ones, in place; return whether there were any.

    Inputs and outputs of the model keep their names and become float32. Functions are inlined.
    """
    if not _has_bfloat16(model):
        return False
    if any(function.domain != DOMAIN for function in model.functions.values()):
        InlinePass(criteria=lambda function: function.domain != DOMAIN)(model)
    facts = survey(model)
    return _Widening(model, facts).run()


def _has_bfloat16(model: ir.Model) -> bool:
    given = [*model.graph.inputs, *model.graph.initializers.values()]
    return any(value.dtype == _FROM for value in given) or any(
        _names_type(node) or any(output.dtype == _FROM for output in node.outputs)
        for root in roots(model)
        for node in root.all_nodes()
    )


def _names_type(node: ir.Node) -> bool:
    return any(
        not attribute.is_ref() and attribute.type == ir.AttributeType.INT and attribute.value == _FROM
        for name, attribute in node.attributes.items()
        if name in _TYPE_ATTRIBUTES
    )


class _Widening:
    """One pass over a model, and the Casts it has made."""

    def __init__(self, model: ir.Model, facts: Facts) -> None:
        self._model = model
        self._facts = facts
        self._names = {str(value.name) for value in values(model.graph)}
        self._casts: dict[tuple[ir.Value, ir.Graph], ir.Value] = {}
        self._changed = False

    def run(self) -> bool:
        """Return whether values have changed that are not constant."""
        for graph in (self._model.graph, *self._model.graph.subgraphs()):
            for value in graph.inputs:
                self._retype(value)
            for node in list(graph):
                if node.op_type != "Constant":
                    self._widen(node, graph)
            for index, output in enumerate(graph.outputs):
                if _is_stored(output):
                    graph.outputs[index] = self._cast(output, graph)
        return self._changed

    def _widen(self, node: ir.Node, graph: ir.Graph) -> None:
        """Make a node compute float32."""
        known = bool(node.outputs) and node.outputs[0] in self._facts.known
        if known and node.op_type == "Cast" and _names_type(node):
            self._round(node.outputs[0], graph)
            return
        for name in _TYPE_ATTRIBUTES:
            if name in node.attributes and _names_type(node):
                node.attributes[name] = ir.AttrInt64(name, _TO)
                self._changed |= not known
        for index, value in enumerate(node.inputs):
            if value is not None and _is_stored(value) and node.op_type != "Cast":
                node.replace_input_with(index, self._cast(value, graph))
                self._changed |= not known
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            if tensor.dtype == _FROM:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype("float32")))
        for output in node.outputs:
            self._retype(output)

    def _round(self, value: ir.Value, graph: ir.Graph) -> None:
        """Let a constant be rounded to bfloat16, and float32 be read."""
        uses = value.uses()
        wide = self._cast(value, graph)
        for use in uses:
            use.node.replace_input_with(use.idx, wide)
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = wide

    def _retype(self, value: ir.Value) -> None:
        value.meta.pop(FOUND, None)
        if value.dtype == _FROM and not value.is_initializer():
            value.dtype = _TO
            self._changed |= value not in self._facts.known

    def _cast(self, value: ir.Value, graph: ir.Graph) -> ir.Value:
        """Return a bfloat16 constant as float32, cast once in each graph that reads it."""
        made = self._casts.get((value, graph))
        if made is None:
            name = unique(f"{value.name}.float32", self._names)
            node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", _TO)], name=name)
            made = node.outputs[0]
            made.name, made.shape, made.type = name, value.shape, ir.TensorType(_TO)
            producer = value.producer()
            if producer is not None and producer.graph is graph:
                graph.insert_after(producer, node)
            elif len(graph):
                graph.insert_before(graph[0], node)
            else:
                graph.append(node)
            self._casts[value, graph] = made
        return made


def _is_stored(value: ir.Value) -> bool:
    """Whether a value is a bfloat16 tensor that the model stores."""
    tensor = None if value.is_graph_input() else stored_tensor(value)
    return tensor is not None and tensor.dtype == _FROM
