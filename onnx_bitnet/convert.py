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
from onnx_bitnet.compensate import Moments
from onnx_bitnet.decide import Keep, check_rules, decide, keep_unseen, way
from onnx_bitnet.errors import DataError, EvaluationError, Refused
from onnx_bitnet.floats import Floats, quantize_floats
from onnx_bitnet.formats import panel_shape
from onnx_bitnet.granularity import block_rows
from onnx_bitnet.moments import Inputs, measuring
from onnx_bitnet.quantize import LayerSpec, Quantized, quantize_layer
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.report import KEPT, Layer, Reason, Report
from onnx_bitnet.rewrite.cleanup import cleanup
from onnx_bitnet.rewrite.fuse import Placed, fuse
from onnx_bitnet.rewrite.plain import Plain, restore, spell_out
from onnx_bitnet.rewrite.records import Activations, Linear, Refusal
from onnx_bitnet.rewrite.replace import Shared
from onnx_bitnet.rewrite.scan import prepare, scan
from onnx_bitnet.rotation import Rotation, rotation
from onnx_bitnet.spill import Spill
from onnx_bitnet.targets import Stored, put, store
from onnx_bitnet.verify import verify

Progress = Callable[[int, int, str], None]

UNUSED = "the calibration data was not used: no step of this recipe needs any"
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
    with Spill(output.parent) as spill:
        layers, meant, notes = _transform(file, recipe, data, progress, spill, widened=widened)
        if strict:
            _refuse(layers)
        with files.staged(file.model, output, between=spill.release) as written:
            verify(written, meant, between=spill.release)
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

    The report's output_bytes is what the files of `convert` would have, to the byte if their name is
    `default_output`. Arguments and errors are those of `convert`.
    """
    recipe = Recipe.parse(recipe)
    file = files.read(source)
    widened = prepare(file.model)
    with Spill() as spill:
        layers, _, notes = _transform(file, recipe, data, progress, spill, widened=widened)
    nbytes = files.size_of(file.model, default_output(source))
    return Report(str(source), None, recipe.to_dict(), tuple(layers), notes, file.nbytes, nbytes)


def default_output(source: str | Path) -> Path:
    """Return where a conversion goes if nothing else is said."""
    return Path(source).with_name(f"{Path(source).stem}.bitnet.onnx")


_Layers = tuple[list[Layer], dict[str, Stored]]


def _transform(
    file: files.ModelFile,
    recipe: Recipe,
    data: object,
    progress: Progress | None,
    spill: Spill,
    *,
    widened: bool,
) -> tuple[list[Layer], dict[str, Stored], tuple[str, ...]]:
    """Do everything to a model in memory; return the report's layers, the weights put in, and notes."""
    model = file.model
    if recipe.target == "float":
        layers, meant = _restore(model, recipe, progress)
        notes = _notes(recipe, layers, data, None, widened=widened)
    else:
        layers, meant, notes = _rewrite(file, recipe, data, progress, spill, widened=widened)
    cleanup(model)
    model.metadata_props["onnx_bitnet.version"] = version("onnx-bitnet")
    model.metadata_props["onnx_bitnet.recipe"] = json.dumps(recipe.to_dict(), sort_keys=True)
    model.metadata_props[KEPT] = json.dumps(
        {layer.name: layer.reason.value for layer in layers if layer.reason is not None}
    )
    return layers, meant, notes


def _restore(model: ir.Model, recipe: Recipe, progress: Progress | None) -> _Layers:
    """Do the opposite of `_rewrite` for a model with packed ops."""
    layers: list[Layer] = []
    meant: dict[str, Stored] = {}
    given = recipe.activation_bits
    for packed, plain, bits in restore(model, None if isinstance(given, str) else given):
        if progress is not None:
            progress(len(layers), 0, packed.layer)
        first = next((layer.name for layer in layers if meant[layer.name] is plain), None)
        meant[packed.layer] = plain
        layers.append(
            Layer(
                name=packed.layer,
                op_type=packed.node.op_type,
                n=packed.n,
                k=packed.k,
                format=plain.format,
                activation_bits=bits,
                lossless=True,
                float_bytes=packed.nbytes,
                packed_bytes=plain.nbytes,
                shared_with=first,
            )
        )
    return layers, meant


@dataclass(frozen=True)
class _Step:
    """One candidate: its line of the report, and for a layer to be replaced what goes into the graph."""

    layer: Layer
    linear: Linear | None = None
    spec: LayerSpec | None = None
    stored: Stored | None = None
    rotation: Rotation | None = None
    bias_shift: np.ndarray | None = None


def _rewrite(
    file: files.ModelFile,
    recipe: Recipe,
    data: object,
    progress: Progress | None,
    spill: Spill,
    *,
    widened: bool,
) -> tuple[list[Layer], dict[str, Stored], tuple[str, ...]]:
    """Replace what is to be replaced; return the report's layers, the weights put in, and notes."""
    layers: list[Layer] = []
    meant: dict[str, Stored] = {}
    placed: list[Placed] = []
    shared = Shared.of(file.model)
    with measuring(file, recipe, data) as (calibration, inputs):
        for step in _walk(file.model, recipe, calibration, inputs, progress, spill):
            layers.append(step.layer)
            file.release()
            spill.release()
            if step.linear is None or step.spec is None or step.stored is None:
                continue
            extras: dict[str, Any] = {
                "rotation": step.rotation,
                "bias_shift": step.bias_shift,
                "shared": shared,
            }
            node = put(file.model, step.linear, step.stored, step.spec, layout=recipe.layout, **extras)
            meant[step.linear.name] = step.stored
            if node is not None and isinstance(step.stored, Quantized):
                name, root = step.linear.name, step.linear.root
                placed.append(Placed(name, node, step.stored, root, (name,)))
            if inputs is not None:
                inputs.replaced()
    if recipe.fuse:
        placed = fuse(placed, shared)
        layers = _with_ops(layers, placed)
        meant = {op.name: op.quantized for op in placed}
    if recipe.target != "custom":
        spell_out(file.model)
    unused = data if calibration is None and inputs is None else None
    return layers, meant, _notes(recipe, layers, unused, calibration, widened=widened)


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
    spill: Spill,
) -> Iterator[_Step]:
    found = scan(model)
    check_rules(recipe, found)
    linears = [item for item in found if isinstance(item, Linear)]
    positions = iter(range(len(linears)))
    done = _Done(spill)
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
    done: _Done,
) -> _Step:
    """Decide one layer and quantize it; `done` holds what was stored before, for tied weights to share."""
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
    first, quantized, stored = done.store(array, linear, decision, moments, recipe.target)
    bias_shift = moments.bias_shift(array, quantized.dequantize()) if moments else None
    layer = Layer(
        name=linear.name,
        op_type=linear.node.op_type,
        where=linear.where,
        n=weight.n,
        k=weight.k,
        detail=decision.format_reason,
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
    return _Step(layer, linear, decision, stored, turned, bias_shift)


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
    elif recipe.target == "float" and not layers:
        notes.append("nothing was restored: the model has no packed layers")
    elif not any(layer.converted for layer in layers):
        notes.append(_nothing_converted(layers))
    if unused is not None:
        notes.append(UNUSED)
    return tuple(notes)


def _nothing_converted(layers: Sequence[Layer]) -> str:
    reasons = Counter(layer.reason for layer in layers if layer.reason)
    if not reasons:
        return "nothing was converted: the model has no linear layers"
    reason, count = reasons.most_common(1)[0]
    return f"nothing was converted; for {count} of {len(layers)} layers: {reason.explanation}"
