"""The two roundings of a BitLinear layer, forward as the packed ops define them, backward straight through.

The forward arithmetic is that of `quantize_rows` and, for rounding `absmean`, `fit_group` in reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST = 1e-5  # of a row's largest magnitude and of a group's mean one, as in BitNet


def round_activations(x: Tensor, bits: int = 8) -> Tensor:
    """Return x rounded to integers of a row's own scale and back, spelled in the ops that exporters know.

    Args:
        x: float (..., K); each row of K has its own scale s = (1 / max(max|x|, 1e-5)) * (2^(bits - 1) - 1).
        bits: 8 or 16, or 32 to leave x as it is.
    """
    if bits == 32:
        return x
    q, _, s = _quantized(x, bits)
    return q / s


def integers(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the integers (..., K) that x is rounded to, as floats, and their step (..., 1): x ~ q * step."""
    q, peak, _ = _quantized(x, bits)
    return q, peak / _levels(bits)


def _quantized(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    peak = x.abs().amax(dim=-1, keepdim=True).clamp(min=_SMALLEST)
    s = peak.reciprocal() * _levels(bits)
    return (x * s).round().clamp(-_levels(bits) - 1, _levels(bits)), peak, s


def _levels(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def absmean(weight: Tensor, granularity: str) -> Tensor:
    """Return the mean magnitude of each group, at least 1e-5: float (N or 1, G), see `grouped`."""
    if granularity == "tensor":
        return weight.abs().mean().clamp(min=_SMALLEST).reshape(1, 1)
    groups = grouped(weight, granularity)
    sizes = torch.full(groups.shape[1:2], groups.shape[2]).to(weight)
    sizes[-1] -= _padding(weight, granularity)
    return (groups.abs().sum(dim=-1) / sizes).clamp(min=_SMALLEST)


def round_weights(weight: Tensor, scale: Tensor, granularity: str) -> Tensor:
    """Return scale * clamp(rint(weight / scale), -1, 1).

    The gradient with respect to weight passes as it is; the one with respect to scale is that of learned
    step sizes [LSQ, Esser et al. 2020]: t for clamped weights, t - weight / scale for the others.

    Args:
        weight: float (N, K).
        scale: positive float (N or 1, G), one for each group of `granularity`.
        granularity: `tensor`, `channel` or `block:B`.
    """
    rounded: Tensor = _Ternary.apply(grouped(weight, granularity), scale.unsqueeze(-1))
    return rounded.flatten(1)[:, : weight.shape[1]]


def storable(scale: Tensor) -> Tensor:
    """Return scales rounded to float16, in which files store those of blocks; the gradient passes as it is.

    Scales that are no normal numbers there stay as they are: the layer's will then be stored as float32.
    """
    half = scale.detach().half().to(scale.dtype)
    normal = (half >= torch.finfo(torch.float16).smallest_normal) & half.isfinite()
    return straight_through(scale, torch.where(normal, half, scale.detach()))


def grouped(weight: Tensor, granularity: str) -> Tensor:
    """Return the weights (N, K) as (N, G, B): B inputs that share a scale, the last ones filled up with 0."""
    size = _block_size(granularity) or weight.shape[1]
    padding = _padding(weight, granularity)
    padded = functional.pad(weight, (0, padding)) if padding else weight
    return padded.unflatten(1, (-1, size))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return rounded, whose gradient goes to x."""
    result: Tensor = _StraightThrough.apply(x, rounded)
    return result


def _block_size(granularity: str) -> int:
    return int(granularity.removeprefix("block:")) if granularity.startswith("block:") else 0


def _padding(weight: Tensor, granularity: str) -> int:
    return -weight.shape[1] % (_block_size(granularity) or weight.shape[1])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor, rounded: Tensor) -> Tensor:  # noqa: ARG004
        return rounded.view_as(rounded)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Ternary(torch.autograd.Function):
    """Round groups (N, G, B) of weights with scales (N or 1, G, 1); both get gradients."""

    @staticmethod
    def forward(ctx: Any, groups: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(groups, scale)
        return _codes(groups * scale.reciprocal()) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        if not ctx.needs_input_grad[1]:
            return gradient, None
        groups, scale = ctx.saved_tensors
        ratio = groups * scale.reciprocal()
        codes = _codes(ratio)
        error = torch.where(ratio.abs() > 1.5, codes, codes - ratio)
        return gradient, (gradient * error).sum_to_size(scale.shape)


def _codes(ratio: Tensor) -> Tensor:
    return ratio.round().clamp_(-1, 1)
