"""Go through the layers of a model: decide what becomes of each, and quantize it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_bitnet.calibration.sources import INSIDE
from onnx_bitnet.conversion.decide import Keep, as_packed, check_rules, decide, keep_unseen, way
from onnx_bitnet.conversion.moments import Known
from onnx_bitnet.conversion.targets import Basis, Stored, store
from onnx_bitnet.errors import EvaluationError
from onnx_bitnet.formats import panel_shape
from onnx_bitnet.granularity import block_rows
from onnx_bitnet.quantization.compensate import Moments
from onnx_bitnet.quantization.floats import Floats, quantize_floats
from onnx_bitnet.quantization.quantize import quantize_layer
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.quantization.rotation import rotation
from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.report import Layer, Progress, Reason
from onnx_bitnet.rewrite.plain import Plain
from onnx_bitnet.rewrite.records import Activations, Linear, Refusal
from onnx_bitnet.rewrite.scan import scan
from onnx_bitnet.spill import Spill


@dataclass(frozen=True)
class Step:
    """One candidate: its line of the report, and for a layer to be replaced what goes into the graph.

    Args:
        layer: the line.
        linear: the layer as it is replaced.
        spec: how it is packed.
        stored: its weight.
        basis: what the weight wants beside it.
        quantized: the weight before it got the form that the target wants.
        packed: how the packed op for it has activations, if there is a twin to put that into.
        unseen: why there is no data of its inputs, after "the layer is"; empty if there is, or none at all.
    """

    layer: Layer
    linear: Linear | None = None
    spec: LayerSpec | None = None
    stored: Stored | None = None
    basis: Basis = field(default_factory=Basis)
    quantized: Quantized | Floats | None = None
    packed: LayerSpec | None = None
    unseen: str = ""


def walk(
    model: ir.Model,
    recipe: Recipe,
    known: Known,
    spill: Spill,
    progress: Progress | None,
) -> Iterator[Step]:
    """Yield what becomes of each candidate of a model, in graph order; quantize each when it is asked for.

    Args:
        model: prepared for `scan`; the caller may replace a layer when it has its step.
        recipe: what to do.
        known: about activations.
        spill: where packed weights are kept.
        progress: called as progress(done, total, layer name) before each layer and once at the end.

    Raises:
        RecipeError: a rule matches nothing, or asks for what its layers cannot have.
        ModelError: a weight cannot be read or used.
        DataError: the calibration is that of another model.
    """
    found = scan(model)
    check_rules(recipe, found)
    linears = [item for item in found if isinstance(item, Linear)]
    positions = iter(range(len(linears)))
    done = _Done(spill)
    needy: list[str] = []
    foreign = known.given is not None and not any(item.name in known.given.layers for item in linears)
    for item in found:
        if isinstance(item, Refusal):
            yield Step(_left(item, item.reason, item.detail, item.n, item.k))
            continue
        index = next(positions)
        if progress is not None:
            progress(index, len(linears), item.name)
        step = _step(item, keep_unseen(index, linears, recipe), recipe, known, done)
        if not item.where and _needs_statistics(step):
            needy.append(item.name)
        if known.given is not None and (foreign or index == len(linears) - 1):
            known.given.check(needy)
        yield step
    if progress is not None:
        progress(len(linears), len(linears), "")


def _needs_statistics(step: Step) -> bool:
    """Whether a layer is, or would be, packed by what is known of its inputs."""
    spec = step.spec
    return spec is not None and (bool(spec.lacks) or spec.measured or bool(spec.activation_scale))


def _unseen(linear: Linear, seen: ir.Value, known: Known) -> str:
    """Say why there is no data of what a layer reads, after "the layer is"; empty if there is, or none."""
    if not known.something:
        return ""
    if linear.where:
        return INSIDE
    if linear.x is not seen:
        return "one whose activations are quantized in the graph"
    if known.calibration is not None and linear.name not in known.calibration.layers:
        return f"not in the calibration of {known.calibration.source}" if known.given else "given no rows"
    return ""


def _step(linear: Linear, keep: Keep | None, recipe: Recipe, known: Known, done: _Done) -> Step:
    """Decide one layer and quantize it; `done` holds what was stored before, for tied weights to share."""
    weight = linear.weight
    if keep is not None:
        return Step(_left(linear, keep.reason, keep.detail, weight.n, weight.k))
    seen, linear = linear.x, way(linear, recipe)
    weight = linear.weight
    try:
        array = weight.array()
    except EvaluationError as error:
        return Step(_left(linear, Reason.WEIGHT_NOT_EVALUATED, str(error), weight.n, weight.k))
    inputs, unseen = known.inputs, _unseen(linear, seen, known)
    statistics = known.calibration.of(linear.name, weight.k) if known.calibration is not None else None
    measured = inputs is not None and linear.x is seen and inputs.reach(linear.name)
    decision = decide(linear, array, recipe, statistics, measured=measured, unseen=unseen)
    if isinstance(decision, Keep):
        return Step(_left(linear, decision.reason, decision.detail, weight.n, weight.k))
    moments = inputs.of(linear.name) if inputs is not None and decision.measured else None
    float_bytes = array.nbytes
    turned = rotation(weight.k, decision.rotation) if decision.rotation else None
    if turned is not None:
        array, moments = turned.rows(array), moments and moments.rotated(turned)
    first, quantized, stored = done.store(array, linear, decision, moments, recipe.target)
    bias_shift = moments.bias_shift(array, quantized.dequantize()) if moments else None
    layer = Layer(
        name=linear.name,
        op_type=linear.node.op_type,
        where=linear.where,
        n=weight.n,
        k=weight.k,
        detail=decision.detail,
        format=stored.format,
        granularity=_granularity(quantized, decision),
        scale_type="" if isinstance(stored, Plain) else stored.scale.dtype.name,
        planes=quantized.planes,
        activation_bits=decision.activation_bits,
        activation_scale=decision.activation_scale,
        activations=_activations(linear, decision),
        lossless=quantized.lossless,
        sqnr_db=quantized.sqnr_db,
        zeros=quantized.zeros,
        rotation=turned.block_size if turned else 0,
        float_bytes=float_bytes,
        packed_bytes=stored.nbytes + _padding(stored, recipe.layout),
        shared_with=first,
    )
    packed = as_packed(decision, linear, recipe, statistics) if known.twin is not None else None
    return Step(layer, linear, decision, stored, Basis(turned, bias_shift), quantized, packed, unseen)


class _Done:
    """What was stored before, for tied weights to share; its arrays are in a spill."""

    def __init__(self, spill: Spill) -> None:
        self._spill = spill
        self._stored: dict[Hashable, tuple[str, Quantized | Floats, Stored]] = {}

    def store(
        self, array: np.ndarray, linear: Linear, spec: LayerSpec, moments: Moments | None, target: str
    ) -> tuple[str | None, Quantized | Floats, Stored]:
        """Return the name of the layer that had this weight first, if any, the weight, and its form."""
        key = (linear.weight.key, spec.settings)
        if key in self._stored:
            return self._stored[key]
        made = quantize_floats(array, spec) if spec.float_type else quantize_layer(array, spec, moments)
        quantized = self._spill.keep_arrays(made)
        stored = store(quantized, linear, spec, target)
        if stored is not quantized:
            stored = self._spill.keep_arrays(stored)
        self._stored[key] = (linear.name, quantized, stored)
        return None, quantized, stored


def _granularity(quantized: Quantized | Floats, spec: LayerSpec) -> str:
    """What shares a scale; several outputs may, though each has it in the file."""
    shared = spec.exact is None and block_rows(spec.settled_granularity) > 1
    return spec.settled_granularity if shared else quantized.granularity


def _padding(stored: Stored, layout: str) -> int:
    """Bytes that a layout adds to the codes."""
    if layout != "panel" or not isinstance(stored, Quantized):
        return 0
    return math.prod(panel_shape(stored.n, stored.k)) * stored.planes - stored.weight.nbytes


def _activations(linear: Linear, spec: LayerSpec) -> str:
    """Say what becomes of the quantization of activations that the graph does."""
    found = linear.activations
    if found is None:
        return ""
    if linear.reader is None:
        why = found.unlike or f"the recipe wants {spec.activation_bits} bits"
        return (
            f"left in the graph: {why}{'; its integers are used as they are' * bool(spec.activation_scale)}"
        )
    rounding = found.rounding
    if not rounding and not _is_unit(spec, found):
        rounding = "the weights of the graph are not -1, 0 and 1"
    return f"folded, equal within rounding: {rounding}" if rounding else "folded, equal bit for bit"


def _is_unit(spec: LayerSpec, found: Activations) -> bool:
    """Whether the weight is made of -1, 0 and 1 but for the factor that follows the product."""
    if spec.exact is None or spec.exact.block_size:
        return False
    factor = np.abs(np.asarray(found.factor, np.float32)).reshape(-1, 1)
    return bool(np.all((spec.exact.scale == factor) | (spec.exact.scale == 0)))


def _left(item: Linear | Refusal, reason: Reason, detail: str, n: int, k: int) -> Layer:
    return Layer(item.name, item.node.op_type, item.where, n, k, reason, detail)
