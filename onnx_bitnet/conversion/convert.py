"""Convert a model as a recipe without goals tells: the only place that knows the order of the steps."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from onnx_bitnet import files, outputs
from onnx_bitnet.calibration.calibration import Calibration
from onnx_bitnet.conversion.moments import measuring
from onnx_bitnet.conversion.steps import walk
from onnx_bitnet.conversion.targets import Stored, put
from onnx_bitnet.conversion.verify import verify
from onnx_bitnet.errors import Refused
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.report import KEPT, Layer, Progress, Reason, Report, named
from onnx_bitnet.rewrite.attention import fuse_attention
from onnx_bitnet.rewrite.cleanup import cleanup
from onnx_bitnet.rewrite.fuse import Placed, fuse
from onnx_bitnet.rewrite.plain import restore, spell_out
from onnx_bitnet.rewrite.replace import Shared
from onnx_bitnet.rewrite.scan import prepare
from onnx_bitnet.spill import Spill

# What `strict` does not complain about: the user asked for it, or there is no weight that could be packed.
_EXPECTED = {Reason.KEPT_BY_RULE, Reason.KEPT_FIRST, Reason.KEPT_LAST, Reason.WEIGHT_NOT_CONSTANT}


def convert_as_told(
    source: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    data: object = None,
    force: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert a model; see planner.convert, which finds out first what reaches a recipe's goals.

    Args:
        source: an ONNX model.
        output: where to write.
        recipe: what to do; goals are not looked at.
        data: feeds, or a Calibration, for what the recipe needs to know about activations.
        force: overwrite existing output files.
        strict: raise Refused, and write nothing, if a layer with a constant weight cannot be packed.
        progress: called as progress(done, total, layer name).
    """
    output = Path(output)
    file = files.read(source)
    outputs.check_output(file, output, force=force)
    widened = prepare(file.model)
    with Spill(output.parent) as spill:
        found = _transform(file, recipe, data, progress, spill, widened=widened)
        if strict:
            _refuse(found.layers)
        with files.staged(file.model, output, between=spill.release) as written:
            verify(written, found.meant, between=spill.release)
    nbytes = sum(path.stat().st_size for path in (output, files.data_path(output)) if path.exists())
    return found.report(file, str(output), recipe, nbytes, data)


def plan_as_told(
    source: str | Path,
    recipe: Recipe,
    *,
    data: object = None,
    progress: Progress | None = None,
) -> Report:
    """Say what `convert_as_told` would do to each layer, without writing anything.

    The report's output_bytes is what its files would have, to the byte if their name is `default_output`.
    """
    file = files.read(source)
    widened = prepare(file.model)
    with Spill() as spill:
        found = _transform(file, recipe, data, progress, spill, widened=widened)
    nbytes = files.size_of(file.model, default_output(source))
    return found.report(file, None, recipe, nbytes, data)


def default_output(source: str | Path) -> Path:
    """Return where a conversion goes if nothing else is said."""
    return Path(source).with_name(f"{Path(source).stem}.bitnet.onnx")


@dataclass(frozen=True, eq=False)
class _Transformed:
    """What was done to a model in memory: the layers of the report, the weights put in, and notes."""

    layers: list[Layer]
    meant: dict[str, Stored]
    notes: tuple[str, ...]
    data_used: bool

    def report(
        self, file: files.ModelFile, output: str | None, recipe: Recipe, nbytes: int, data: object
    ) -> Report:
        return Report(
            source=str(file.path),
            output=output,
            recipe=recipe.to_dict(),
            layers=tuple(self.layers),
            notes=self.notes,
            source_bytes=file.nbytes,
            output_bytes=nbytes,
            data_unused=data is not None and not self.data_used,
        )


def _transform(
    file: files.ModelFile,
    recipe: Recipe,
    data: object,
    progress: Progress | None,
    spill: Spill,
    *,
    widened: bool,
) -> _Transformed:
    """Do everything to a model in memory."""
    model = file.model
    if recipe.target == "float":
        layers, meant = _restore(model, recipe, progress)
        found = _Transformed(layers, meant, _notes(recipe, layers, widened=widened), data_used=False)
    else:
        found = _rewrite(file, recipe, data, progress, spill, widened=widened)
    cleanup(model)
    model.metadata_props["onnx_bitnet.version"] = version("onnx-bitnet")
    model.metadata_props["onnx_bitnet.recipe"] = json.dumps(recipe.to_dict(), sort_keys=True)
    model.metadata_props[KEPT] = json.dumps(
        {layer.name: layer.reason.value for layer in found.layers if layer.reason is not None}
    )
    return found


def _restore(
    model: ir.Model, recipe: Recipe, progress: Progress | None
) -> tuple[list[Layer], dict[str, Stored]]:
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


def _rewrite(
    file: files.ModelFile,
    recipe: Recipe,
    data: object,
    progress: Progress | None,
    spill: Spill,
    *,
    widened: bool,
) -> _Transformed:
    """Replace what is to be replaced."""
    layers: list[Layer] = []
    meant: dict[str, Stored] = {}
    placed: list[Placed] = []
    shared = Shared.of(file.model)
    without: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    with measuring(file, recipe, data) as known:
        for step in walk(file.model, recipe, known, spill, progress):
            layers.append(step.layer)
            file.release()
            spill.release()
            if step.linear is None or step.spec is None or step.stored is None:
                continue
            if step.spec.lacks:
                why = step.unseen or "given no rows"
                without.setdefault((why, step.spec.lacks), []).append(step.layer.name)
            node = put(
                file.model,
                step.linear,
                step.stored,
                step.spec,
                step.basis,
                layout=recipe.layout,
                shared=shared,
            )
            meant[step.linear.name] = step.stored
            if node is not None and isinstance(step.stored, Quantized):
                name, root = step.linear.name, step.linear.root
                placed.append(Placed(name, node, step.stored, root, (name,)))
            if known.twin is not None and step.quantized is not None and step.packed is not None:
                known.twin.replace(step.layer.name, step.quantized, step.packed, step.basis)
            if known.inputs is not None:
                known.inputs.replaced()
    if recipe.fuse:
        placed = fuse(placed, shared)
        layers = _with_ops(layers, placed)
        meant = {op.name: op.quantized for op in placed}
    attentions = fuse_attention(file.model, shared) if _fuses_attention(recipe, layers) else 0
    if recipe.target != "custom":
        spell_out(file.model)
    notes = (*_data_notes(known.given, without), *_notes(recipe, layers, widened=widened))
    return _Transformed(layers, meant, (*notes, *_attention_note(attentions)), known.something)


def _fuses_attention(recipe: Recipe, layers: Sequence[Layer]) -> bool:
    """Whether attention becomes one op: by itself where layers lose more than its own rounding."""
    if recipe.target != "custom" or recipe.attention == "keep":
        return False
    return recipe.attention == "fused" or any(layer.converted and not layer.lossless for layer in layers)


def _attention_note(count: int) -> list[str]:
    what = f"{count} attention{'s are' if count > 1 else ' is'} one op each, in float32"
    return [f"{what}; attention 'keep' leaves the graph's own nodes"] if count else []


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


def _data_notes(
    given: Calibration | None, without: Mapping[tuple[str, tuple[str, ...]], Sequence[str]]
) -> list[str]:
    """Say what was done for want of data, and of what worth a calibration is.

    Args:
        given: the user's calibration.
        without: the layers that went without data, by why they did and what was done instead.
    """
    return [
        *([given.warning] if given is not None and given.warning else []),
        *(f"no data for {named(names)}, {why}: {', '.join(done)}" for (why, done), names in without.items()),
    ]


def _notes(recipe: Recipe, layers: Sequence[Layer], *, widened: bool) -> tuple[str, ...]:
    notes = []
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
        notes.append(nothing_converted(layers))
    return tuple(notes)


def nothing_converted(layers: Sequence[Layer]) -> str:
    """Return the note of a model whose layers are all left, with the reason most have."""
    reasons = Counter(layer.reason for layer in layers if layer.reason)
    if not reasons:
        return "nothing was converted: the model has no linear layers"
    reason, count = reasons.most_common(1)[0]
    return f"nothing was converted; for {count} of {len(layers)} layers: {reason.explanation}"
