"""Linear layers with ternary weights: `BitLinear` to train, `TernaryLinear` to export."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from onnx_bitnet.errors import RecipeError
from onnx_bitnet.quantization.quantize import quantize
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.torch import rounding


class BitLinear(nn.Linear):
    """A linear layer that computes with ternary weights and rounded activations and trains float ones.

    Forward: y = round(x) W'^T + bias with W' = scale * {-1, 0, 1}. Backward: both roundings are ignored (the
    straight-through estimator), so that optimizers move the float `weight` until its code changes.

    Attributes:
        progress: share of the rounding that is applied, 0 to 1: x + progress * (round(x) - x), and the same
            for weights. Raised step by step in training it hardens a float model gently; see `set_progress`.
        log_scale: with scale="learned", the logarithm of the scales (N or 1, G).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        granularity: str = "tensor",
        activation_bits: Literal[8, 16, 32] = 8,
        scale: Literal["absmean", "learned"] = "absmean",
        noise: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Make the layer with weights initialized as those of nn.Linear.

        Args:
            in_features: K.
            out_features: N.
            bias: add a float bias (N,).
            granularity: what shares a scale: `tensor` as in BitNet, `channel`, or `block:B` of B inputs.
            activation_bits: 8 as in BitNet, 16, or 32 for float activations.
            scale: `absmean` as in BitNet, max(mean|W|, 1e-5) of each group; or `learned`, a parameter that
                starts at the least-squares optimum of the weights.
            noise: share of the weights, drawn anew in each training step, that stay float.
            device: as for nn.Linear.
            dtype: as for nn.Linear.

        Raises:
            RecipeError: an option is none of these.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        Recipe(granularity=granularity, activation_bits=activation_bits)  # refuses what does not exist
        if "auto" in (granularity, activation_bits):
            raise RecipeError(
                "a BitLinear layer cannot choose granularity or activation_bits itself: name them"
            )
        if scale not in ("absmean", "learned"):
            raise RecipeError(f"scale {scale!r} does not exist; use absmean or learned")
        if not 0 <= noise <= 1:
            raise RecipeError(f"noise {noise} is no share of the weights; use 0 to 1")
        self.granularity = granularity
        self.activation_bits = activation_bits
        self.noise = noise
        self.progress = 1.0
        self.log_scale = nn.Parameter(self._least_squares().log()) if scale == "learned" else None

    @classmethod
    def of(cls, linear: nn.Linear, **options: Any) -> BitLinear:
        """Return a BitLinear with the weights of an ordinary layer; options as for the constructor."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            **options,
        )
        with torch.no_grad():
            layer.weight.copy_(linear.weight)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
            if layer.log_scale is not None:
                layer.log_scale.copy_(layer._least_squares().log())
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return float (..., N) of x (..., K)."""
        weight = self.ternary()
        if self.training and self.noise:
            weight = torch.where(torch.rand_like(weight) < self.noise, self.weight, weight)
        if self.progress < 1:
            weight = torch.lerp(self.weight, weight, self.progress)
        return functional.linear(self._rounded(x), weight, self.bias)

    def ternary(self) -> Tensor:
        """Return the weights (N, K) that the layer computes with: in each group only -s, 0 and s."""
        return rounding.round_weights(self.weight, self.scales(), self.granularity)

    def scales(self) -> Tensor:
        """Return the scale of each group, float (N or 1, G); those of blocks are such as float16 holds."""
        if self.log_scale is None:
            scale = rounding.absmean(self.weight.detach(), self.granularity)
        else:
            scale = self.log_scale.exp()
        return rounding.storable(scale) if self.granularity.startswith("block") else scale

    def extra_repr(self) -> str:
        """Return what print shows."""
        scale = "absmean" if self.log_scale is None else "learned"
        return f"{super().extra_repr()}, {self.granularity}, A{self.activation_bits}, scale={scale}"

    def _rounded(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wide = x.detach().float()
            rounded = rounding.round_activations(wide, self.activation_bits)
            if self.progress < 1:
                rounded = torch.lerp(wide, rounded, self.progress)
        return rounding.straight_through(x, rounded.to(x.dtype))

    def _least_squares(self) -> Tensor:
        recipe = Recipe(mode="ternary", granularity=self.granularity, rounding="mse")
        scale = quantize(self.weight.detach().float().cpu().numpy(), recipe).scale[0]
        return torch.from_numpy(scale).to(self.weight).clamp(min=1e-8)


class TernaryLinear(nn.Module):
    """What a trained BitLinear computes, in the plain ops that exporters write and `convert` recognizes.

    With 8-bit activations and one scale for a matrix or an output the product is one of integers, and the
    packed op computes the same bits. With a scale for a block of inputs, more bits, or half precision, which
    does not hold such integers, it is one of floats. The weights are exactly ternary in both.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: BitLinear) -> None:
        """Take the ternary weights and the bias of a layer; they train no more."""
        super().__init__()
        self.activation_bits = layer.activation_bits
        weight, scale = layer.ternary().detach(), layer.scales().detach()
        wide = weight.dtype in (torch.float32, torch.float64)
        integer = wide and scale.shape[1] == 1 and layer.activation_bits == 8
        self.register_buffer("weight", weight.sign() if integer else weight)
        self.register_buffer("scale", scale.flatten() if integer else None)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return float (..., N) of x (..., K)."""
        if self.scale is None:
            rounded = rounding.round_activations(x, self.activation_bits)
            return functional.linear(rounded, self.weight, self.bias)
        q, step = rounding.integers(x, self.activation_bits)
        y = functional.linear(q, self.weight) * (step * self.scale)
        return y if self.bias is None else y + self.bias
