"""The records that travel from scan to rewrite: a linear layer found, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.constants import Constant


@dataclass(frozen=True)
class Reshaping:
    """A Transpose, Reshape, Unsqueeze or Squeeze to put before or after the packed op.

    Args:
        op_type: `Transpose` or `Reshape`.
        value: permutation, or target shape (0 copies a dimension, -1 infers one).
    """

    op_type: str
    value: tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """A linear layer y = alpha * x W^T + bias with constant W, as found in a graph.

    Args:
        name: unique in the model; the node's own name where it has one.
        node: the node that multiplies.
        absorbed: nodes that vanish together with `node`, such as an Add of a constant bias.
        x: the activations as they are in the graph.
        y: the value to be produced; the last absorbed node's output, or the node's own.
        weight: the constant, oriented (N, K); its array is loaded only when asked for.
        alpha: factor on the product; goes into the scales.
        bias: float32 (N,), or None.
        before: what to do to x so that its last axis is K.
        after: what to do to the op's output (..., N) to get the product in y's layout.
        addend: a value to add at the end that is no per-output constant (Gemm's dynamic C), or None.
        addend_factor: factor on the addend (Gemm's beta).
        where: see report.Layer.
    """

    name: str
    node: ir.Node
    x: ir.Value
    y: ir.Value
    weight: Constant
    absorbed: tuple[ir.Node, ...] = ()
    alpha: float = 1.0
    bias: np.ndarray | None = field(default=None, compare=False)
    before: tuple[Reshaping, ...] = ()
    after: tuple[Reshaping, ...] = ()
    addend: ir.Value | None = None
    addend_factor: float = 1.0
    where: str = ""


@dataclass(frozen=True)
class Refusal:
    """A node that looks like a linear layer and cannot be one of ours."""

    name: str
    node: ir.Node
    reason: Reason
    detail: str = ""
    where: str = ""
    n: int = 0
    k: int = 0
