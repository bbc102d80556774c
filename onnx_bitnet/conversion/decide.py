"""Decide what becomes of a linear layer: how it is packed, or the reason why it stays float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_bitnet.calibration.activations import LayerStatistics
from onnx_bitnet.calibration.ranges import activation_step
from onnx_bitnet.conversion.nearly import nearly
from onnx_bitnet.errors import RecipeError
from onnx_bitnet.granularity import block_rows
from onnx_bitnet.quantization.detect import check_weight, detect
from onnx_bitnet.quantization.format_choice import with_format
from onnx_bitnet.quantization.spec import LayerSpec, activation_bits
from onnx_bitnet.recipe import FLOAT_ACTIONS, MEASURED_ROUNDINGS, Recipe, Rule
from onnx_bitnet.recipe_values import near_misses
from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.origins import opset_version
from onnx_bitnet.rewrite.records import Linear, Refusal

_INTEGER_BITS = {"int4": 4, "int8": 8}
# Inputs that may share a scale with integer activations: BN_MAX_GROUP in ext/layout.h.
MAX_GROUP = 1 << 18
# Opsets from which DequantizeLinear takes floats of 8 bits, and blocks.
_FLOAT8_SINCE, _BLOCKS_SINCE = 19, 21


@dataclass(frozen=True)
class Keep:
    """The decision to leave a layer float."""

    reason: Reason
    detail: str = ""


def check_rules(recipe: Recipe, found: Sequence[Linear | Refusal]) -> None:
    """Raise RecipeError for a rule that fits no layer of the model, with the names that come near."""
    for rule in recipe.rules:
        if not any(_fits(rule, layer) for layer in found):
            names = [layer.name for layer in found]
            what = f"rule {rule.match!r}{f' for {rule.op_type}' if rule.op_type else ''}"
            raise RecipeError(f"{what} matches no layer; {near_misses(rule.match, names)}")


def keep_unseen(index: int, linears: Sequence[Linear], recipe: Recipe) -> Keep | None:
    """Decide what can be decided without reading the weight: position and `keep` rules."""
    if recipe.keep_first and index == 0:
        return Keep(Reason.KEPT_FIRST)
    if recipe.keep_last and index == len(linears) - 1:
        return Keep(Reason.KEPT_LAST)
    rule = rule_for(linears[index], recipe)
    if rule is not None and rule.action == "keep":
        return Keep(Reason.KEPT_BY_RULE, f"rule {rule.match!r}")
    return None


def way(linear: Linear, recipe: Recipe) -> Linear:
    """Return the layer with the quantization of its activations in the op, where it can be and may be.

    It may be if the recipe asks for 8 activation bits with a scale of each row, or leaves the bits open.
    """
    if linear.folded is None:
        return linear
    recipe = _for_layer(linear, recipe)
    folds = recipe.activation_bits in ("auto", 8) and recipe.activation_scale == "dynamic"
    return linear.folded if folds else linear


def decide(
    linear: Linear,
    weight: np.ndarray,
    recipe: Recipe,
    statistics: LayerStatistics | None = None,
    *,
    measured: bool = False,
    unseen: str = "",
) -> LayerSpec | Keep:
    """Decide how to pack one layer, from its weight (N, K), the recipe, and what calibration knows of it.

    A weight that is exactly ternary is packed as it is, in every mode, and one that is so but for rounding
    in every mode but `lossless`. Other weights are packed when the mode is `ternary` or a rule names 4 or 8
    bits for them. The layer is as `way` returns it.

    Args:
        linear: the layer.
        weight: its weight.
        recipe: what was asked for.
        statistics: what calibration knows of its inputs; None if nothing.
        measured: the moments of its inputs can be had.
        unseen: why they cannot be had although there is data, after "the layer is".

    Raises:
        ModelError: the weight is empty or holds NaN or infinity.
        RecipeError: the recipe asks for what the layer cannot have.
    """
    check_weight(weight, linear.name)
    rule = rule_for(linear, recipe)
    recipe = _for_layer(linear, recipe)
    if rule is not None and rule.action in FLOAT_ACTIONS:
        return _with_step(_as_floats(rule.action, linear, recipe), recipe, statistics)
    spec = _with_activations(LayerSpec.from_recipe(recipe), linear, recipe)
    if rule is not None and rule.action in _INTEGER_BITS:
        spec = replace(
            spec,
            integer_bits=_INTEGER_BITS[rule.action],
            format="i2s",
            detail=f"{rule.action} needs four levels, which only i2s holds",
        )
    elif rule is None or rule.scale is None:
        spec = replace(spec, exact=detect(weight))
        if spec.exact is None and recipe.mode != "lossless":
            spec = _nearly_ternary(spec, weight)
        if spec.exact is None and recipe.mode != "ternary":
            return Keep(Reason.NOT_TERNARY)
    if rule is not None and rule.scale is not None:
        spec = _with_scale(spec, rule, linear)
    else:
        spec = replace(spec, rotation=0) if spec.exact is not None else spec
        spec = _with_data(spec, linear, recipe, measured, unseen) if spec.exact is None else spec
    length = spec.group_length(linear.weight.k)
    if spec.activation_bits != 32 and length > MAX_GROUP:
        return Keep(Reason.WEIGHT_TOO_WIDE, f"{length} inputs share a scale, {MAX_GROUP} may")
    if recipe.target == "ort" and spec.exact is None and spec.planes > 1 and not spec.integer_bits:
        return Keep(Reason.NO_STOCK_OP, f"{spec.planes} planes")
    return _with_step(with_format(spec, linear.weight.n, linear.weight.k, recipe), recipe, statistics)


def as_packed(
    spec: LayerSpec, linear: Linear, recipe: Recipe, statistics: LayerStatistics | None
) -> LayerSpec:
    """Return how the packed op of a layer rounds activations, whatever the target; floats have no such op."""
    if spec.float_type:
        return spec
    recipe = _for_layer(linear, recipe)
    is_wide = spec.group_length(linear.weight.k) > MAX_GROUP
    bits = 32 if is_wide else activation_bits(recipe, "custom")
    own = replace(spec, activation_bits=bits, activation_scale=0.0)
    packed = _with_step(_with_activations(own, linear, recipe), recipe, statistics)
    assert isinstance(packed, LayerSpec)
    return packed


def _with_step(
    spec: LayerSpec | Keep, recipe: Recipe, statistics: LayerStatistics | None
) -> LayerSpec | Keep:
    """Settle the step of static activations."""
    if isinstance(spec, Keep) or recipe.activation_scale == "dynamic" or spec.activation_bits == 32:
        return spec
    if statistics is None:
        by_row = "activations by each row's peak"
        return spec if spec.activation_scale else replace(spec, lacks=(*spec.lacks, by_row))
    step = activation_step(statistics, spec.activation_bits, recipe.activation_scale)
    return replace(spec, activation_scale=step)


def _as_floats(action: str, linear: Linear, recipe: Recipe) -> LayerSpec | Keep:
    """Take floats of 8 or 4 bits; whatever the target, MatMul and activations are those of a simulation."""
    spec = LayerSpec.from_recipe(recipe.replace(target="simulate"))
    spec = replace(_with_activations(spec, linear, recipe), float_type=action)
    have = opset_version(linear.root)
    need = _BLOCKS_SINCE if spec.settled_granularity.startswith("block") else _FLOAT8_SINCE
    if recipe.target == "ort" and have < need:
        return Keep(
            Reason.OPSET_TOO_OLD,
            f"DequantizeLinear of {action} by {spec.settled_granularity} needs opset {need}, this is {have}",
        )
    return spec


def _with_data(spec: LayerSpec, linear: Linear, recipe: Recipe, measured: bool, unseen: str) -> LayerSpec:
    """Settle what depends on data being there."""
    by_output = spec.granularity != "tensor" and block_rows(spec.settled_granularity) == 1
    is_open = recipe.rounding == "auto" and (measured or bool(unseen))
    if is_open and not by_output and not spec.needs_data:
        return replace(spec, detail="rounding mse: gptq fits each output, and here some share scales")
    if is_open:
        spec = replace(spec, rounding="gptq")
    what = "offset and levels = 9" if spec.needs_data else f"rounding {spec.rounding!r}"
    if not spec.measured:
        if spec.needs_data:
            raise RecipeError(f"{what} need calibration data and rounding gptq or weighted")
        return spec
    if not measured:
        if spec.needs_data:
            raise RecipeError(
                f"layer {linear.name!r}: {what} need data of its inputs, and it is {unseen}; keep it, or "
                "give it other levels, with a rule"
            )
        rounded = "weights rounded as without any"
        return replace(spec, rounding="mse", detail=f"rounding mse: it is {unseen}", lacks=(rounded,))
    if not by_output:
        fit = "fit" if spec.needs_data else "fits"
        raise RecipeError(f"{what} {fit} each output; use granularity channel or block:B")
    return spec


def needs_moments(recipe: Recipe) -> bool:
    """Return whether some layer is to be rounded by what its inputs do."""
    roundings = [recipe.rounding, *(rule.overrides.get("rounding") for rule in recipe.rules)]
    return any(rounding in MEASURED_ROUNDINGS for rounding in roundings)


def may_use_moments(recipe: Recipe) -> bool:
    """Return whether some layer that is not ternary may be packed, with the rounding left open."""
    lossy = recipe.mode == "ternary" or any(
        rule.action in _INTEGER_BITS or rule.overrides.get("mode") == "ternary" for rule in recipe.rules
    )
    roundings = [recipe.rounding, *(rule.overrides.get("rounding") for rule in recipe.rules)]
    return lossy and "auto" in roundings


def needs_calibration(recipe: Recipe) -> bool:
    """Return whether some layer is to have a static activation scale."""
    scales = [recipe.activation_scale, *(rule.overrides.get("activation_scale") for rule in recipe.rules)]
    return any(scale not in (None, "dynamic") for scale in scales)


def _nearly_ternary(spec: LayerSpec, weight: np.ndarray) -> LayerSpec:
    """Take a weight that is ternary but for rounding for ternary, and say so."""
    exact = nearly(weight)
    if exact is None:
        return spec
    return replace(spec, exact=exact, detail="the weight is ternary up to rounding")


def _with_activations(spec: LayerSpec, linear: Linear, recipe: Recipe) -> LayerSpec:
    """Settle the bits of `auto`: 8 where the graph has 8 of its own; its integers need no scale."""
    integer = linear.reader is None and linear.activations is not None and linear.activations.integer
    if recipe.activation_bits == "auto" and (linear.reader is not None or integer):
        spec = replace(spec, activation_bits=8)
    return replace(spec, activation_scale=1.0) if integer and spec.activation_bits == 8 else spec


def _with_scale(spec: LayerSpec, rule: Rule, linear: Linear) -> LayerSpec:
    """Take the scales that a rule gives."""
    assert rule.scale is not None
    scale = rule.scale if isinstance(rule.scale, tuple) else (rule.scale,)
    if len(scale) not in (1, linear.weight.n):
        raise RecipeError(
            f"rule {rule.match!r} gives {len(scale)} scales, layer {linear.name!r} has "
            f"{linear.weight.n} outputs"
        )
    if spec.planes != 1:
        raise RecipeError(
            f"rule {rule.match!r} gives scales for one plane; use it with planes = 1, int4 or int8"
        )
    return replace(spec, scale=scale, granularity="tensor" if len(scale) == 1 else "channel")


def _for_layer(linear: Linear, recipe: Recipe) -> Recipe:
    rule = rule_for(linear, recipe)
    return recipe if rule is None else recipe.replace(**rule.overrides)


def rule_for(linear: Linear, recipe: Recipe) -> Rule | None:
    """Return the rule that decides a layer, if any."""
    return next((rule for rule in recipe.rules if _fits(rule, linear)), None)


def _fits(rule: Rule, layer: Linear | Refusal) -> bool:
    size = layer.n * layer.k if isinstance(layer, Refusal) else layer.weight.n * layer.weight.k
    return rule.fits(layer.name, layer.node.op_type, size)
