"""The records that travel from scan to rewrite: a linear layer found, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_bitnet.errors import EvaluationError
from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.constants import Constant, find
from onnx_bitnet.rewrite.origins import Facts, NotConstant, why_not
from onnx_bitnet.rewrite.types import element_type


@dataclass(frozen=True)
class Reshaping:
    """A node to put before or after the packed op.

    Args:
        op_type: `Transpose`, `Reshape` or `Unsqueeze`.
        value: permutation, target shape (0 copies a dimension) or new axes.
    """

    op_type: str
    value: tuple[int, ...]


@dataclass(frozen=True)
class Activations:
    """How a graph quantizes the activations of a layer, compared with the op's own way.

    Args:
        unlike: why it is not the op's way, so that it stays in the graph; empty if it is.
        rounding: where the graph rounds otherwise than the op does; empty if nowhere, so that results are
            equal bit for bit if the weights are integers before `factor`.
        integer: what multiplies the weight are integers from -128 to 127.
        factor: what the graph multiplies integer products with, besides the step of the row; one number, or
            one for each output.
    """

    unlike: str = ""
    rounding: str = ""
    integer: bool = False
    factor: float | tuple[float, ...] = 1.0


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer y = after(x W^T + bias) + addend_factor * addend with constant W, as found in a graph.

    Args:
        name: unique in the model; the node's own name where it has one.
        node: the node that multiplies.
        x_index: which input of the node the activations are.
        weight: the constant (N, K); its array is loaded only when asked for. The factors of the graph, such
            as Gemm's alpha, are in it.
        root: the main graph, or the body of the function that the node is in.
        absorbed: nodes that vanish together with `node`: an Add of a constant bias, a Mul or Div by a
            constant that is in the weight instead.
        bias: a constant that broadcasts to (N,), or None.
        before: what to do to x so that its last axis is K.
        after: what to do to the op's output (..., N) to get y's layout.
        addend_index: which input of the node to add at the end because it is no constant per output
            (Gemm's C), or None.
        addend_factor: factor on the addend (Gemm's beta).
        where: see report.Layer.
        reader: the node that reads the activations, if it is not `node` because a quantization between them
            is folded into the op.
        activations: what the graph does to quantize the activations, see activation.py; None if nothing.
        folded: the same layer with that quantization folded into the op, where this is possible.
    """

    name: str
    node: ir.Node
    x_index: int
    weight: Constant
    root: ir.Graph
    absorbed: tuple[ir.Node, ...] = ()
    bias: Constant | None = None
    before: tuple[Reshaping, ...] = ()
    after: tuple[Reshaping, ...] = ()
    addend_index: int | None = None
    addend_factor: float = 1.0
    where: str = ""
    reader: ir.Node | None = None
    activations: Activations | None = None
    folded: Linear | None = None

    @property
    def x(self) -> ir.Value:
        """The activations as they are in the graph now."""
        return operand(self.reader or self.node, self.x_index)

    @property
    def y(self) -> ir.Value:
        """The value to be produced."""
        last = self.absorbed[-1] if self.absorbed else self.node
        return last.outputs[0]

    @property
    def addend(self) -> ir.Value | None:
        """The value to add at the end, or None."""
        return None if self.addend_index is None else operand(self.node, self.addend_index)

    @property
    def dtype(self) -> ir.DataType:
        """Type of the activations; where the model does not tell it, that of the weight."""
        return element_type(self.x) or self.weight.dtype


@dataclass(frozen=True, eq=False)
class Refusal:
    """A node that looks like a linear layer and cannot be one of ours."""

    name: str
    node: ir.Node
    reason: Reason
    detail: str = ""
    where: str = ""
    n: int = 0
    k: int = 0


@dataclass(frozen=True)
class Site:
    """Where a candidate stands, and what a matcher may ask about its surroundings.

    Args:
        node: the candidate.
        name: its unique name.
        where: see report.Layer.
        root: the main graph, or the body of the function that the node is in.
        facts: what is known about the model.
    """

    node: ir.Node
    name: str
    where: str
    root: ir.Graph
    facts: Facts

    def constant(self, value: ir.Value | None) -> Constant | NotConstant:
        """Return an operand as a constant, or why it is none."""
        if value is None:
            return NotConstant(Reason.WEIGHT_NOT_CONSTANT, "the operand is missing")
        if value not in self.facts.known:
            return why_not(value, self.facts)
        try:
            return find(value, self.root.opset_imports, self.facts.functions)
        except EvaluationError as error:
            return NotConstant(Reason.WEIGHT_NOT_EVALUATED, str(error))

    def refuse(self, reason: Reason, detail: str = "", weight: Constant | None = None) -> Refusal:
        """Make the refusal of this candidate."""
        n, k = weight.shape if weight is not None and len(weight.shape) == 2 else (0, 0)
        return Refusal(self.name, self.node, reason, detail, self.where, n, k)

    def linear(self, x_index: int, weight: Constant) -> Linear:
        """Make the record of this candidate; what is special about it is added with dataclasses.replace."""
        return Linear(self.name, self.node, x_index, weight, self.root, where=self.where)

    def matrix(self, weight: Constant) -> Constant | Refusal:
        """Return the matrix that a weight of any rank is, without its batch dimensions of one."""
        if len(weight.shape) < 2:
            return self.refuse(
                Reason.WEIGHT_RANK, f"weight {weight.name!r} of shape {list(weight.shape)} is no matrix"
            )
        *batch, rows, columns = weight.shape
        if any(dim != 1 for dim in batch):
            return self.refuse(
                Reason.WEIGHT_BATCHED,
                f"weight {weight.name!r} of shape {list(weight.shape)} is a batch of matrices",
            )
        return weight.reshape(rows, columns)


def made_by(value: ir.Value, *op_types: str, inputs: int = 1) -> ir.Node | None:
    """Return the node that makes a value if it is one of these standard ops and has its first inputs."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in op_types:
        return None
    return node if len(node.inputs) >= inputs and None not in node.inputs[:inputs] else None


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return an input that must be there."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} lacks input {index}"
    return value


def constant_operand(node: ir.Node, index: int) -> np.ndarray:
    """Return the values of an input that must be a constant."""
    tensor = ir.convenience.get_const_tensor(operand(node, index))
    assert tensor is not None, f"input {index} of {node.op_type} is not constant"
    return tensor.numpy()


def unique(name: str, taken: set[str]) -> str:
    """Return the name, or the first of name_2, name_3, ... that is free, and take it."""
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    taken.add(free)
    return free


def rank(value: ir.Value) -> int | None:
    """Return how many dimensions a value has, None if the model does not state it."""
    return None if value.shape is None else len(value.shape)
