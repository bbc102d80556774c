"""Convert a model: the only place that knows the order of the steps."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_bitnet import files
from onnx_bitnet.activations import LayerStatistics
from onnx_bitnet.calibrate import Calibration
from onnx_bitnet.decide import Keep, check_rules, decide, keep_unseen, way
from onnx_bitnet.errors import DataError, EvaluationError, Refused
from onnx_bitnet.formats import panel_shape
from onnx_bitnet.moments import Inputs, measuring
from onnx_bitnet.quantize import LayerSpec, Quantized, quantize_layer
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.report import KEPT, Layer, Reason, Report
from onnx_bitnet.rewrite.cleanup import cleanup
from onnx_bitnet.rewrite.fuse import Placed, fuse
from onnx_bitnet.rewrite.records import Activations, Linear, Refusal
from onnx_bitnet.rewrite.replace import Shared, replace
from onnx_bitnet.rewrite.scan import prepare, scan
from onnx_bitnet.rotation import Rotation, rotation
from onnx_bitnet.verify import verify

Progress = Callable[[int, int, str], None]

# What `strict` does not complain about: the user asked for it, or there is no weight that could be packed.
_EXPECTED = {Reason.KEPT_BY_RULE, Reason.KEPT_FIRST, Reason.KEPT_LAST, Reason.WEIGHT_NOT_CONSTANT}


def convert(
    source: str | Path,
    output: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    data: object = None,
    force: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert a model's linear layers to packed ops and write it to a new file.

    The input is never changed. The output, and its data file when the weights are large, appear only after
    they have been read back and checked.

    Args:
        source: an ONNX model.
        output: where to write; weights of more than 1 MiB go to `<output>.data` beside it.
        recipe: a Recipe, a dict of its fields, or a path to a `.toml` or `.json` file; None for the defaults.
        data: feeds as `bn.calibrate` takes them, or a Calibration: what static activation scales and the
            roundings `gptq` and `weighted` need. With feeds gptq runs the model as it is converted, layer by
            layer, so that each makes good the errors of those before; a Calibration knows the float model
            only. The report says so when data was not used.
        force: overwrite existing output files.
        strict: raise Refused, and write nothing, if a layer with a constant weight cannot be packed.
        progress: called as progress(done, total, layer name) before each layer and once at the end.

    Returns:
        What became of each linear layer.

    Raises:
        RecipeError: the recipe is wrong, or one of its rules matches nothing.
        ModelError: the model, its external data or a weight cannot be used.
        OutputError: the output exists, cannot be written, or does not read back as meant.
        Refused: see strict.
    """
    recipe, output = Recipe.parse(recipe), Path(output)
    file = files.read(source)
    files.check_output(file, output, force=force)
    widened = prepare(file.model)
    shared = Shared.of(file.model)
    steps, notes = _pack(file, recipe, data, progress, shared, widened=widened)
    layers = [step.layer for step in steps]
    placed = [
        Placed(step.linear.name, step.node, step.quantized, step.linear.root, (step.linear.name,))
        for step in steps
        if step.linear and step.quantized and step.node
    ]
    if strict:
        _refuse(layers)
    if recipe.fuse:
        placed = fuse(placed, shared)
        layers = _with_ops(layers, placed)
    cleanup(file.model)
    file.model.metadata_props["onnx_bitnet.version"] = version("onnx-bitnet")
    file.model.metadata_props["onnx_bitnet.recipe"] = json.dumps(recipe.to_dict(), sort_keys=True)
    file.model.metadata_props[KEPT] = json.dumps(
        {layer.name: layer.reason.value for layer in layers if layer.reason is not None}
    )
    with files.staged(file.model, output) as written:
        verify(written, {op.name: op.quantized for op in placed})
    nbytes = sum(path.stat().st_size for path in (output, files.data_path(output)) if path.exists())
    return Report(str(source), str(output), recipe.to_dict(), tuple(layers), notes, file.nbytes, nbytes)


def plan(
    source: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    data: object = None,
    progress: Progress | None = None,
) -> Report:
    """Say what `convert` would do to each layer, without writing anything.

    The report's output_bytes is a prediction: the input's size less the weights that would be packed, plus
    their packed bytes. Arguments and errors are those of `convert`.
    """
    recipe = Recipe.parse(recipe)
    file = files.read(source)
    widened = prepare(file.model)
    steps, notes = _pack(file, recipe, data, progress, Shared.of(file.model), widened=widened)
    layers = [step.layer for step in steps]
    unique = [step for step in steps if step.linear is not None and step.layer.shared_with is None]
    saved = sum(step.linear.weight.file_bytes - step.layer.packed_bytes for step in unique if step.linear)
    return Report(str(source), None, recipe.to_dict(), tuple(layers), notes, file.nbytes, file.nbytes - saved)


@dataclass(frozen=True)
class _Step:
    """One candidate: its line of the report, and for a layer to be packed what goes into the graph."""

    layer: Layer
    linear: Linear | None = None
    quantized: Quantized | None = None
    rotation: Rotation | None = None
    bias_shift: np.ndarray | None = None
    node: ir.Node | None = None


def _pack(
    file: files.ModelFile,
    recipe: Recipe,
    data: object,
    progress: Progress | None,
    shared: Shared,
    *,
    widened: bool,
) -> tuple[list[_Step], tuple[str, ...]]:
    """Replace all layers of a model in memory; return what was done and the report's notes."""
    steps = []
    with measuring(file, recipe, data) as (calibration, inputs):
        for step in _walk(file.model, recipe, calibration, inputs, progress):
            if step.linear is not None and step.quantized is not None:
                node = replace(
                    file.model,
                    step.linear,
                    step.quantized,
                    activation_bits=step.layer.activation_bits,
                    activation_scale=step.layer.activation_scale,
                    layout=recipe.layout,
                    rotation=step.rotation,
                    bias_shift=step.bias_shift,
                    shared=shared,
                )
                step = dataclasses.replace(step, node=node)
                if inputs is not None:
                    inputs.replaced()
            steps.append(step)
    unused = data if calibration is None and inputs is None else None
    return steps, _notes(recipe, [step.layer for step in steps], unused, calibration, widened=widened)


def _statistics(linear: Linear, calibration: Calibration | None) -> LayerStatistics | None:
    statistics = calibration.layers.get(linear.name) if calibration is not None else None
    if statistics is not None and calibration is not None and statistics.k != linear.weight.k:
        raise DataError(
            f"layer {linear.name!r} has {linear.weight.k} inputs, {statistics.k} in the calibration of "
            f"{calibration.source}; calibrate this model"
        )
    return statistics


def _walk(
    model: ir.Model,
    recipe: Recipe,
    calibration: Calibration | None,
    inputs: Inputs | None,
    progress: Progress | None,
) -> Iterator[_Step]:
    found = scan(model)
    check_rules(recipe, found)
    linears = [item for item in found if isinstance(item, Linear)]
    positions = iter(range(len(linears)))
    done: dict[Hashable, tuple[str, Quantized]] = {}
    for item in found:
        if isinstance(item, Refusal):
            yield _Step(_left(item, item.reason, item.detail, item.n, item.k))
            continue
        index = next(positions)
        if progress is not None:
            progress(index, len(linears), item.name)
        statistics = _statistics(item, calibration)
        yield _step(item, keep_unseen(index, linears, recipe), recipe, statistics, inputs, done)
    if progress is not None:
        progress(len(linears), len(linears), "")


def _step(
    linear: Linear,
    keep: Keep | None,
    recipe: Recipe,
    statistics: LayerStatistics | None,
    inputs: Inputs | None,
    done: dict[Hashable, tuple[str, Quantized]],
) -> _Step:
    """Decide one layer and quantize it; `done` holds what was packed before, for tied weights to share."""
    weight = linear.weight
    if keep is not None:
        return _Step(_left(linear, keep.reason, keep.detail, weight.n, weight.k))
    seen, linear = linear.x, way(linear, recipe)
    weight = linear.weight
    try:
        array = weight.array()
    except EvaluationError as error:
        return _Step(_left(linear, Reason.WEIGHT_NOT_EVALUATED, str(error), weight.n, weight.k))
    measured = inputs is not None and linear.x is seen and inputs.reach(linear.name)
    decision = decide(linear, array, recipe, statistics, measured=measured)
    if isinstance(decision, Keep):
        return _Step(_left(linear, decision.reason, decision.detail, weight.n, weight.k))
    moments = inputs.of(linear.name) if inputs is not None and decision.measured else None
    float_bytes = array.nbytes
    turned = rotation(weight.k, decision.rotation) if decision.rotation else None
    if turned is not None:
        array, moments = turned.rows(array), moments and moments.rotated(turned)
    key = (weight.key, decision.settings)
    first, quantized = done.get(key) or (None, quantize_layer(array, decision, moments))
    done.setdefault(key, (linear.name, quantized))
    bias_shift = moments.bias_shift(array, quantized.dequantize()) if moments else None
    layer = Layer(
        name=linear.name,
        op_type=linear.node.op_type,
        where=linear.where,
        n=weight.n,
        k=weight.k,
        detail=decision.format_reason,
        format=quantized.format,
        granularity=quantized.granularity,
        planes=quantized.planes,
        activation_bits=decision.activation_bits,
        activation_scale=decision.activation_scale,
        activations=_activations(linear, decision),
        lossless=quantized.lossless,
        sqnr_db=quantized.sqnr_db,
        zeros=quantized.zeros,
        rotation=turned.block_size if turned else 0,
        float_bytes=float_bytes,
        packed_bytes=quantized.nbytes + _padding(quantized, recipe.layout),
        shared_with=first,
    )
    return _Step(layer, linear, quantized, turned, bias_shift)


def _padding(quantized: Quantized, layout: str) -> int:
    """Bytes that a layout adds to the codes."""
    whole = math.prod(panel_shape(quantized.n, quantized.k)) * quantized.planes
    return whole - quantized.weight.nbytes if layout == "panel" else 0


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


def _with_ops(layers: Sequence[Layer], placed: Sequence[Placed]) -> list[Layer]:
    """Note down in which op each fused layer is."""
    names = {name: op.name for op in placed for name in op.layers if len(op.layers) > 1}
    return [dataclasses.replace(layer, fused=names.get(layer.name)) for layer in layers]


def _refuse(layers: Sequence[Layer]) -> None:
    refused = [layer for layer in layers if layer.reason is not None and layer.reason not in _EXPECTED]
    if refused:
        first = refused[0]
        raise Refused(
            f"strict: {len(refused)} of {len(layers)} layers are refused, the first is {first.name!r}: "
            f"{first.reason.value if first.reason else ''}; keep them with rules, or leave out strict"
        )


def _notes(
    recipe: Recipe, layers: Sequence[Layer], unused: object, calibration: Calibration | None, *, widened: bool
) -> tuple[str, ...]:
    notes = list(calibration.notes) if calibration is not None else []
    if widened:
        notes.append(
            "the model computes in bfloat16, for which onnxruntime has no CPU kernels: its activations, "
            "inputs and outputs are float32 now, under the same names"
        )
    folded = Counter(layer.activations for layer in layers if layer.activations)
    notes += [
        f"the activations of {count} layer{'s' * (count > 1)} are quantized in the graph: {what}"
        for what, count in folded.most_common()
    ]
    kept = sum(layer.reason is Reason.NOT_TERNARY for layer in layers)
    if recipe.mode == "auto" and kept:
        notes.append(
            f"mode 'auto' left {kept} layers float because they are not ternary; "
            "mode 'ternary' packs them at a loss, which `validate` measures"
        )
    elif not any(layer.converted for layer in layers):
        notes.append(_nothing_converted(layers))
    if unused is not None:
        notes.append("the calibration data was not used: no step of this recipe needs any")
    return tuple(notes)


def _nothing_converted(layers: Sequence[Layer]) -> str:
    reasons = Counter(layer.reason for layer in layers if layer.reason)
    if not reasons:
        return "nothing was converted: the model has no linear layers"
    reason, count = reasons.most_common(1)[0]
    return f"nothing was converted; for {count} of {len(layers)} layers: {reason.explanation}"
