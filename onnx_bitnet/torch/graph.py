"""What training changes of an ONNX graph, as a torch module: from the trained layers to what is compared.

Nothing else of the graph is computed here. What does not depend on the layers (embeddings, masks, whole
branches, whatever their operators) comes from onnxruntime, and so do shapes, which no weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnx_bitnet.errors import ModelError, one_line
from onnx_bitnet.graphs import reads
from onnx_bitnet.rewrite.constants import find
from onnx_bitnet.rewrite.origins import Facts, survey
from onnx_bitnet.rewrite.records import Linear, Reshaping
from onnx_bitnet.torch.arithmetic import ARITHMETIC
from onnx_bitnet.torch.arrangement import ARRANGEMENT
from onnx_bitnet.torch.linear import BitLinear
from onnx_bitnet.torch.spatial import SPATIAL

OPERATORS: Mapping[str, Callable[..., Any]] = MappingProxyType({**ARITHMETIC, **ARRANGEMENT, **SPATIAL})
"""Standard operators that can be trained through -> what computes them."""

# What they give depends on no value, only on shapes.
_SHAPES = frozenset({"Shape", "Size"})


class Layer(nn.Module):
    """A linear layer of a graph that is trained: a BitLinear, and what the layer does around its product."""

    def __init__(self, linear: Linear, bit: BitLinear) -> None:
        super().__init__()
        self.linear = linear
        self.bit = bit

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Return y of the layer's own x, both in the layout of the graph."""
        for reshaping in self.linear.before:
            x = _reshaped(x, reshaping)
        y = self.bit(x)
        for reshaping in self.linear.after:
            y = _reshaped(y, reshaping)
        return y if addend is None else y + self.linear.addend_factor * addend


def trainable(linears: Sequence[Linear], **options: Any) -> dict[Linear, Layer]:
    """Return a layer to train for each, with its weights; what shares a weight in the file shares it here.

    Args:
        linears: the layers.
        **options: as for BitLinear.
    """
    shared: dict[Any, BitLinear] = {}
    layers = {}
    for linear in linears:
        n, k = linear.weight.shape
        plain = nn.utils.skip_init(nn.Linear, k, n, linear.bias is not None)
        with torch.no_grad():
            plain.weight.copy_(tensor(linear.weight.array()))
            if linear.bias is not None:
                plain.bias.copy_(tensor(linear.bias.array()).flatten().expand(n))
        bit = BitLinear.of(plain, **options)
        first = shared.setdefault(linear.weight.key, bit)
        bit.weight, bit.log_scale = first.weight, first.log_scale
        layers[linear] = Layer(linear, bit)
    return layers


@dataclass(frozen=True)
class _Step:
    """A layer or a node: the names of what it reads and makes, and what computes that."""

    label: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    run: Callable[..., Any]


class Graph(nn.Module):
    """Computes some values of a graph from others, differentiable in the layers' parameters.

    Attributes:
        needs: names of the values that must be given.
        names: names of the values that are computed: those asked for that depend on a layer.
        layers: the layers on the way to these.
    """

    def __init__(self, model: ir.Model, layers: Mapping[Linear, Layer], targets: Sequence[str]) -> None:
        """Find the way from the layers to the targets.

        Args:
            model: as it was scanned for the layers.
            layers: in the main graph.
            targets: names of values.

        Raises:
            ModelError: there is a node on the way that cannot be trained through.
        """
        super().__init__()
        facts = survey(model)
        heads = {linear.y: layer for linear, layer in layers.items()}
        moving = _moving(model.graph, set(heads))
        changed = (str(value.name) for value in _values(model.graph) if value in moving)
        self.names = tuple(name for name in changed if name in targets)
        steps, boundary = _way(model.graph, heads, moving, set(self.names))
        self.layers = nn.ModuleList(step.run for step in steps if isinstance(step.run, Layer))
        self._steps = steps
        constants = [value for value in boundary if value in facts.known]
        self._constants = {str(value.name): _constant(value, model.graph, facts) for value in constants}
        self.needs = tuple(str(value.name) for value in boundary if value not in facts.known)

    def forward(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values called `names`, of the values called `needs`.

        Raises:
            ModelError: an operator fails.
        """
        values: dict[str | None, Any] = {None: None}
        values.update(self._constants)
        values.update(given)
        for step in self._steps:
            inputs = [values[name] for name in step.inputs]
            try:
                made = step.run(*inputs)
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
                raise ModelError(
                    f"{step.label} cannot be trained through: {one_line(error)}; "
                    "leave out the layers before it"
                ) from None
            made = (made,) if isinstance(made, Tensor) else made
            values.update(zip(step.outputs, made, strict=False))
        return {name: values[name] for name in self.names}


def tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor of its own memory; all floats become float32."""
    floats = array.dtype.kind in "fV"  # V: bfloat16
    return torch.from_numpy(np.array(array, np.float32 if floats else array.dtype))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from node.outputs


def _moving(graph: ir.Graph, heads: set[ir.Value]) -> set[ir.Value]:
    """Return the values that training changes."""
    moving = set(heads)
    for node in graph:
        if node.op_type not in _SHAPES and any(value in moving for value in reads(node)):
            moving.update(node.outputs)
    return moving


def _way(
    graph: ir.Graph, heads: Mapping[ir.Value, Layer], moving: set[ir.Value], targets: set[str]
) -> tuple[list[_Step], list[ir.Value]]:
    """Return the steps to the targets, in order, and the values that they start from."""
    wanted = {value for value in _values(graph) if value.name in targets}
    steps: list[_Step] = []
    boundary: dict[ir.Value, None] = {}
    for node in reversed(graph):
        if not any(value in wanted for value in node.outputs):
            continue
        layer = next((heads[value] for value in node.outputs if value in heads), None)
        reads = node.inputs if layer is None else (layer.linear.x, layer.linear.addend)
        steps.append(_step(node, layer, reads))
        for value in reads:
            if value in moving:
                wanted.add(value)
            elif value is not None:
                boundary[value] = None
    return steps[::-1], list(boundary)


def _step(node: ir.Node, layer: Layer | None, reads: Sequence[ir.Value | None]) -> _Step:
    what = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    label = f"node {node.name or node.outputs[0].name!r} ({what})"
    names = tuple(None if value is None else str(value.name) for value in reads)
    outputs = tuple(str(value.name) for value in node.outputs)
    if layer is not None:
        return _Step(label, names, outputs, layer)
    function = None if node.domain else OPERATORS.get(node.op_type)
    if function is None:
        raise ModelError(
            f"{label} cannot be trained through: the operator is none of those that torch computes here; "
            "leave out the layers before it"
        )
    return _Step(label, names, outputs, lambda *inputs: function(node, *inputs))


def _constant(value: ir.Value, graph: ir.Graph, facts: Facts) -> Tensor:
    return tensor(find(value, graph.opset_imports, facts.functions).array())


def _reshaped(x: Tensor, reshaping: Reshaping) -> Tensor:
    """Do to a tensor what replace.Edit.reshape does to a value."""
    if reshaping.op_type == "Transpose":
        return x.permute(reshaping.value)
    if reshaping.op_type == "Unsqueeze":
        for axis in reshaping.value:
            x = x.unsqueeze(axis)
        return x
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(reshaping.value)])
