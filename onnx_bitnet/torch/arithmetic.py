"""ONNX operators that compute, as torch functions that gradients go through; see arrangement.py.

Operators whose gradient is nothing, such as Round, are missing on purpose: what stands before them would
never learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from onnx_bitnet.rewrite.origins import opset_version
from onnx_bitnet.torch.arrangement import ints

Operator = Callable[..., Any]

_ONE_AXIS_SINCE = 13  # opset; before, Softmax was over all axes from `axis` on


def _simple(function: Callable[..., Tensor]) -> Operator:
    """An operator without attributes that has a twin in torch."""
    return lambda _, *inputs: function(*inputs)


def _with(function: Callable[..., Tensor], **defaults: float) -> Operator:
    """A function of one value with float attributes, in the order of the function's arguments."""

    def run(node: ir.Node, x: Tensor) -> Tensor:
        return function(x, *(node.attributes.get_float(name, value) for name, value in defaults.items()))

    return run


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator of any number of inputs."""
    return lambda _, *inputs: reduce(function, inputs)


def _mean(_: ir.Node, *inputs: Tensor) -> Tensor:
    return reduce(torch.add, inputs) / len(inputs)


def _div(_: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    floats = a.is_floating_point() or b.is_floating_point()
    return a / b if floats else torch.div(a, b, rounding_mode="trunc")


def _clip(node: ir.Node, x: Tensor, least: Tensor | None = None, most: Tensor | None = None) -> Tensor:
    low = node.attributes.get_float("min") if least is None else float(least)
    high = node.attributes.get_float("max") if most is None else float(most)
    return x if low is None and high is None else x.clamp(low, high)


def _gelu(node: ir.Node, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=str(node.attributes.get_string("approximate", "none")))


def _hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _prelu(_: ir.Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def _swish(x: Tensor, alpha: float) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    def run(node: ir.Node, x: Tensor) -> Tensor:
        graph = node.graph
        if not isinstance(graph, ir.Graph) or opset_version(graph) >= _ONE_AXIS_SINCE:
            return function(x, node.attributes.get_int("axis", -1))
        return function(x.flatten(node.attributes.get_int("axis", 1)), -1).reshape(x.shape)

    return run


def _reduce(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    """A reduction over axes that are an attribute or an input; over all if there are none."""

    def run(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = ints(node, "axes", axes)
        none = node.attributes.get_int("noop_with_empty_axes", 0)
        if none and not chosen:
            return x
        return function(x, tuple(chosen or range(x.ndim)), bool(node.attributes.get_int("keepdims", 1)))

    return run


def _norm(order: int) -> Operator:
    return _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, order, axes, keep))


def _gemm(node: ir.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    factors = node.attributes.get_float
    a, b = (x.T if node.attributes.get_int(name, 0) else x for name, x in (("transA", a), ("transB", b)))
    y = factors("alpha", 1.0) * (a @ b)
    return y if c is None else y + factors("beta", 1.0) * c


def _einsum(node: ir.Node, *inputs: Tensor) -> Tensor:
    return torch.einsum(node.attributes["equation"].as_string().replace(" ", ""), *inputs)


ARITHMETIC: Mapping[str, Operator] = MappingProxyType(
    {
        "Abs": _simple(torch.abs),
        "Add": _simple(torch.add),
        "And": _simple(torch.logical_and),
        "Celu": _with(functional.celu, alpha=1.0),
        "Clip": _clip,
        "Cos": _simple(torch.cos),
        "Div": _div,
        "Einsum": _einsum,
        "Elu": _with(functional.elu, alpha=1.0),
        "Equal": _simple(torch.eq),
        "Erf": _simple(torch.erf),
        "Exp": _simple(torch.exp),
        "Gelu": _gelu,
        "Gemm": _gemm,
        "Greater": _simple(torch.gt),
        "GreaterOrEqual": _simple(torch.ge),
        "HardSigmoid": _with(_hard_sigmoid, alpha=0.2, beta=0.5),
        "HardSwish": _simple(functional.hardswish),
        "LeakyRelu": _with(functional.leaky_relu, alpha=0.01),
        "Less": _simple(torch.lt),
        "LessOrEqual": _simple(torch.le),
        "Log": _simple(torch.log),
        "LogSoftmax": _softmax(torch.log_softmax),
        "MatMul": _simple(torch.matmul),
        "Max": _many(torch.maximum),
        "Mean": _mean,
        "Min": _many(torch.minimum),
        "Mish": _simple(functional.mish),
        "Mul": _simple(torch.mul),
        "Neg": _simple(torch.neg),
        "Not": _simple(torch.logical_not),
        "Or": _simple(torch.logical_or),
        "PRelu": _prelu,
        "Pow": _simple(torch.pow),
        "Reciprocal": _simple(torch.reciprocal),
        "ReduceL1": _norm(1),
        "ReduceL2": _norm(2),
        "ReduceLogSumExp": _reduce(torch.logsumexp),
        "ReduceMax": _reduce(torch.amax),
        "ReduceMean": _reduce(torch.mean),
        "ReduceMin": _reduce(torch.amin),
        "ReduceSum": _reduce(torch.sum),
        "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
        "Relu": _simple(torch.relu),
        "Selu": _simple(torch.selu),
        "Sigmoid": _simple(torch.sigmoid),
        "Sin": _simple(torch.sin),
        "Softmax": _softmax(torch.softmax),
        "Softplus": _simple(functional.softplus),
        "Softsign": _simple(functional.softsign),
        "Sqrt": _simple(torch.sqrt),
        "Sub": _simple(torch.sub),
        "Sum": _many(torch.add),
        "Swish": _with(_swish, alpha=1.0),
        "Tan": _simple(torch.tan),
        "Tanh": _simple(torch.tanh),
    }
)
"""Standard operator -> function."""
