"""How one layer is packed: what a recipe says of it, settled."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from onnx_bitnet.granularity import block_rows, stored_block_size
from onnx_bitnet.quantization.detect import Exact
from onnx_bitnet.recipe import MEASURED_ROUNDINGS, Recipe
from onnx_bitnet.recipe_values import rotation_size

_AUTO_ACTIVATION_BITS = {"custom": 16, "ort": 8, "simulate": 32, "float": 32}
_DEFAULT_GRANULARITY = {0: "block:128", 4: "block:32", 8: "channel"}  # by integer_bits


def activation_bits(recipe: Recipe, target: str) -> int:
    """Return how many bits activations have with a target; `auto` becomes what suits it."""
    bits = recipe.activation_bits
    return bits if isinstance(bits, int) else _AUTO_ACTIVATION_BITS[target]


@dataclass(frozen=True)
class LayerSpec:
    """How to pack one layer.

    Args:
        format: name of the byte layout, see formats.py.
        granularity: what shares a scale: `tensor`, `channel`, `block:B`, `block:RxB`, or `auto` for what
            suits the bits.
        rounding: `absmean`, `twn`, `mse`, `weighted` or `gptq`, see recipe.Recipe.
        planes: 1 to 4.
        levels: 3, 4 or 9.
        activation_bits: 8, 16 or 32; not used here, but part of the decision.
        activation_scale: the step of statically quantized activations, 0 for dynamic; likewise.
        integer_bits: 4 or 8 for symmetric integers stored as 2 or 4 planes; 0 for `planes` of `levels`.
        dynamic_int8: with target `ort`, 8-bit weights without blocks go to DynamicQuantizeMatMul.
        scale: given scales, one or one for each output; none for those that `rounding` finds.
        rotation: most of the block size of a Hadamard transform, 0 for none; the weight comes rotated.
        offset: each group has a zero point of its own.
        float_type: `fp8e4m3`, `fp8e5m2` or `fp4e2m1` for such floats in place of codes, see floats.py.
        scale_type: `auto`, `float32`, `float16` or `bfloat16`, see recipe.Recipe.
        exact: what `detect` found; then the fields from granularity to levels and integer_bits do nothing.
        detail: what was settled for it where the recipe left it open, and why.
        lacks: what is done otherwise because there is no data of its inputs, in words.
    """

    format: str = "i2s"
    granularity: str = "auto"
    rounding: str = "mse"
    planes: int = 1
    levels: int = 3
    activation_bits: int = 16
    activation_scale: float = 0.0
    integer_bits: int = 0
    dynamic_int8: bool = False
    scale: tuple[float, ...] = ()
    rotation: int = 0
    offset: bool = False
    scale_type: str = "auto"
    float_type: str = ""
    exact: Exact | None = dataclasses.field(default=None, compare=False)
    detail: str = dataclasses.field(default="", compare=False)
    lacks: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> LayerSpec:
        """Take the per-layer fields of a recipe; `auto` becomes i2s, mse and what suits the target."""
        bits = activation_bits(recipe, recipe.target)
        if recipe.target == "ort" and bits == 16:
            bits = 32  # it has integer activations of 8 bits only
        return cls(
            format="i2s" if recipe.format == "auto" else recipe.format,
            granularity=recipe.granularity,
            rounding="mse" if recipe.rounding == "auto" else recipe.rounding,
            planes=2 if recipe.levels == 9 else recipe.planes,
            levels=recipe.levels,
            activation_bits=bits,
            dynamic_int8=recipe.target == "ort" and recipe.activation_bits == 8,
            rotation=rotation_size(recipe.rotation),
            offset=recipe.offset,
            scale_type=recipe.scale_type,
        )

    @property
    def settings(self) -> tuple[object, ...]:
        """What decides, together with the weight, how the packed weight looks."""
        return (
            *(self.format, self.granularity, self.rounding, self.planes, self.levels),
            *(self.integer_bits, self.dynamic_int8, self.scale, self.rotation, self.offset),
            *(self.scale_type, self.float_type),
        )

    @property
    def needs_data(self) -> bool:
        """Whether the levels can only be fitted by a rounding that has data."""
        return self.exact is None and (self.offset or self.levels == 9)

    @property
    def measured(self) -> bool:
        """Whether the weight cannot be quantized without the moments of its inputs."""
        return self.exact is None and not self.scale and self.rounding in MEASURED_ROUNDINGS

    def group_length(self, k: int) -> int:
        """Return how many of K inputs share a scale."""
        if self.exact is not None:
            return self.exact.block_size or k
        return stored_block_size(self.settled_granularity, k) or k

    def granularity_of(self, k: int) -> str:
        """What shares a scale in rows of K inputs: blocks that hold all of them are channels."""
        settled = self.settled_granularity
        in_one_block = settled.startswith("block") and not stored_block_size(settled, k)
        return "channel" if in_one_block and block_rows(settled) == 1 else settled

    @property
    def settled_granularity(self) -> str:
        """What shares a scale, with `auto` settled, for a weight that is not exactly ternary."""
        if self.granularity != "auto":
            return self.granularity
        if self.float_type:
            return "block:32" if self.float_type.startswith("fp4") else "channel"
        return _DEFAULT_GRANULARITY[self.integer_bits]
