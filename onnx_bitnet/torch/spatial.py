"""ONNX operators on channels and pixels: normalizations, convolutions, pools; see arrangement.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional


def _layer_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[node.attributes.get_int("axis", -1) :]
    bias = None if bias is None else bias.expand(shape)
    return functional.layer_norm(x, shape, scale.expand(shape), bias, _epsilon(node))


def _rms_norm(node: ir.Node, x: Tensor, scale: Tensor) -> Tensor:
    shape = x.shape[node.attributes.get_int("axis", -1) :]
    return functional.rms_norm(x, shape, scale.expand(shape), _epsilon(node))


def _batch_norm(node: ir.Node, x: Tensor, *parameters: Tensor) -> Tensor:
    scale, bias, mean, variance = parameters
    return functional.batch_norm(x, mean, variance, scale, bias, eps=_epsilon(node))


def _instance_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=_epsilon(node))


def _group_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = node.attributes.get_int("num_groups", 1)
    # until opset 20 there is a scale for each group, not for each channel
    scale, bias = (item.repeat_interleave(x.shape[1] // len(item)) for item in (scale, bias))
    return functional.group_norm(x, groups, scale, bias, _epsilon(node))


def _epsilon(node: ir.Node) -> float:
    return node.attributes.get_float("epsilon", 1e-5)


def _conv(node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank, ints = x.ndim - 2, node.attributes.get_ints
    function: Callable[..., Tensor] = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    strides, dilations = ints("strides") or [1] * rank, ints("dilations") or [1] * rank
    x = functional.pad(x, _pairs(node, x, weight.shape[2:], strides, dilations))
    return function(x, weight, bias, tuple(strides), 0, tuple(dilations), node.attributes.get_int("group", 1))


def _pairs(
    node: ir.Node, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Return what to pad spatial axes with, in torch's order: begin and end of the last axis first."""
    rank = len(kernel)
    pads = list(node.attributes.get_ints("pads") or [0] * 2 * rank)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
            for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
        ]
        less, more = [amount // 2 for amount in total], [amount - amount // 2 for amount in total]
        pads = less + more if auto == "SAME_UPPER" else more + less
    return [pads[axis + end * rank] for axis in reversed(range(rank)) for end in (0, 1)]


def _pool(node: ir.Node, x: Tensor, *, average: bool) -> Tensor:
    """AveragePool and MaxPool without ceil_mode; windows are made of slices, so that any padding will do."""
    if node.attributes.get_int("ceil_mode", 0):
        raise NotImplementedError("its ceil_mode is not known here")
    ints = node.attributes.get_ints
    kernel = list(ints("kernel_shape") or [])
    strides, dilations = (list(ints(name) or [1] * len(kernel)) for name in ("strides", "dilations"))
    pairs = _pairs(node, x, kernel, strides, dilations)
    counted = node.attributes.get_int("count_include_pad", 0)
    windows = _windows(
        functional.pad(x, pairs, value=0.0 if average else -torch.inf), kernel, strides, dilations
    )
    if not average:
        return windows.amax(-1)
    if counted or not any(pairs):
        return windows.mean(-1)
    there = _windows(functional.pad(torch.ones_like(x), pairs), kernel, strides, dilations)
    return windows.sum(-1) / there.sum(-1)


def _windows(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Return what each window sees, on a last axis."""
    for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), 2):
        x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x.flatten(-len(kernel))


def _average_pool(node: ir.Node, x: Tensor) -> Tensor:
    return _pool(node, x, average=True)


def _max_pool(node: ir.Node, x: Tensor) -> Tensor:
    return _pool(node, x, average=False)


def _global_average(_: ir.Node, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def _global_max(_: ir.Node, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


SPATIAL: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "AveragePool": _average_pool,
        "BatchNormalization": _batch_norm,
        "Conv": _conv,
        "GlobalAveragePool": _global_average,
        "GlobalMaxPool": _global_max,
        "GroupNormalization": _group_norm,
        "InstanceNormalization": _instance_norm,
        "LayerNormalization": _layer_norm,
        "MaxPool": _max_pool,
        "RMSNormalization": _rms_norm,
    }
)
"""Standard operator -> function."""
