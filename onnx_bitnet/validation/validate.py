"""Validate: run a model and its conversion on the same data, and say how far apart they are and where."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_bitnet import files
from onnx_bitnet.data.feeds import Feeds, open_feeds
from onnx_bitnet.data.inputs import Batch, model_inputs
from onnx_bitnet.data.padding import USUAL, check_mask, compared, tokens
from onnx_bitnet.errors import DataError, ModelError, one_line
from onnx_bitnet.inspection import describe
from onnx_bitnet.report import Progress
from onnx_bitnet.rewrite.bfloat16 import widen
from onnx_bitnet.rewrite.replaced import made_by_conversion
from onnx_bitnet.runner import Runner, start
from onnx_bitnet.taps import (
    Tap,
    expose,
    expose_shapes,
    find_taps,
    layers_alone,
    output_name,
    separates,
    shape_name,
)
from onnx_bitnet.validation.metrics import Accumulator
from onnx_bitnet.validation.validation import (
    FloatLayer,
    LayerMetrics,
    OutputMetrics,
    Task,
    Validation,
    with_blame,
)

# Bytes that the values of layers may take at a time, unless the caller says otherwise.
MEMORY = 1 << 30

_NOT_SEPARATED = (
    "not separated: it rounds activations in nodes that no conversion writes; local has both errors"
)

Metric = Callable[[Sequence[Batch], Sequence[Batch]], float]


def validate(
    reference: str | Path,
    got: str | Path,
    data: object = None,
    *,
    threads: int = 0,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    layers: bool = True,
    mask: str = USUAL,
    metric: Metric | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Validation:
    """Run a model and its conversion in onnxruntime on the same data and compare them.

    The data is read once, one batch is in memory at a time. Layers are compared in groups that fit into
    `memory`, each group in a run of its own. A bfloat16 model, which onnxruntime cannot run on CPUs, is run
    in float32.

    Args:
        reference: the model that was converted.
        got: the converted model; any other model with the same inputs and outputs can be compared, too.
        data: see `onnx_bitnet.data.feeds.open_feeds`; None for random feeds.
        threads: for onnxruntime, 0 for its own choice.
        seed: of random feeds.
        dims: sizes of symbolic dimensions in random feeds, by name.
        layers: compare every converted layer as well.
        mask: the input (batch, sequence) that is 0 where data is padding, of which nothing counts, neither in
            outputs nor in layers; it need not be there. `none` counts all.
        metric: called as metric(batches, outputs) with all batches and, in the same order, the outputs of one
            model for them, both as {name: array}; once for each model. Returns a number, such as an accuracy.
        memory: bytes that the values of the layers compared at a time may take, judged by the first batch; a
            single layer may take more.
        progress: called as progress(done, total, what) before each batch and at the end; total is 0 when the
            number of batches is not known.

    Raises:
        ModelError: a model cannot be read or run, or the two have different inputs or outputs.
        DataError: the data cannot be read or does not fit, or the metric fails.
        RuntimeMissing: onnxruntime or the custom-op library cannot be used.
    """
    left, right = files.read(reference), files.read(got)
    widened = [file.path for file in (left, right) if widen(file.model)]
    _check_same_ends(left, right)
    inspection = describe(right)
    made = made_by_conversion(right.model)
    notes = tuple(f"{path} computes in bfloat16 and was run in float32" for path in widened)
    notes += tuple(
        f"output {value.name!r} is no tensor and was not compared"
        for value in left.model.graph.outputs
        if not isinstance(value.type, ir.TensorType)
    )
    feeds = open_feeds(left.model, data, seed=seed, dims=dims)
    check_mask(mask, feeds.inputs)
    taps = find_taps(left.model, right.model) if layers else ()
    comparison = _Comparison(left, right, taps, threads, memory, mask)
    kept: list[tuple[Batch, Batch, Batch]] = []
    batches = 0
    for label, batch in feeds.labelled():
        if progress:
            progress(batches, feeds.count, f"batch {batches}")
        outputs = comparison.add(batch, label, _hint(feeds))
        if metric is not None:
            kept.append((batch, *outputs))
        batches += 1
    if progress:
        progress(batches, batches, "done")
    compared = comparison.outputs()
    return Validation(
        reference=str(reference),
        got=str(got),
        data=feeds.description,
        random_data=feeds.random,
        batches=batches,
        outputs=compared,
        layers=comparison.layers(),
        notes=notes + _not_finite(compared, feeds.description),
        reference_bytes=left.nbytes,
        got_bytes=right.nbytes,
        packed=inspection.packed,
        floats=tuple(
            FloatLayer(*layer, inspection.kept.get(layer[0], ""))
            for layer in inspection.float_layers
            if layer[0] not in made
        ),
        task=None if metric is None else _task(metric, kept),
    )


def load_metric(where: str) -> Metric:
    """Load a metric for `validate` from a script.

    Args:
        where: `FILE.py:FUNCTION`.

    Raises:
        DataError: there is no such file or function, or the script fails.
    """
    file, _, name = where.rpartition(":")
    if not file and Path(where).is_file():
        raise DataError(f"metric {where!r}: names no function; write FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise DataError(f"metric {where!r}: no such file; write FILE.py:FUNCTION")
    try:
        found = runpy.run_path(file).get(name)
    except Exception as error:  # the user's own code
        raise DataError(f"metric {where!r}: {type(error).__name__}: {one_line(error)}") from error
    if not callable(found):
        raise DataError(f"metric {where!r}: {file} has no function {name!r}")
    metric: Metric = found
    return metric


def _task(metric: Metric, kept: Sequence[tuple[Batch, Batch, Batch]]) -> Task:
    name = getattr(metric, "__name__", type(metric).__name__)
    batches, reference, got = (list(part) for part in zip(*kept, strict=True))
    try:
        return Task(name, float(metric(batches, reference)), float(metric(batches, got)))
    except Exception as error:  # the user's own code
        raise DataError(f"metric {name!r} fails: {type(error).__name__}: {one_line(error)}") from error


def _hint(feeds: Feeds) -> str:
    """Return what to do if a model fails on these feeds."""
    if not feeds.random:
        return ""
    symbols = dict.fromkeys(
        size for item in feeds.inputs for size in item.shape or () if isinstance(size, str)
    )
    sizes = f", or sizes (dims) of {', '.join(symbols)}" if symbols else ""
    return f"; random feeds may not suit it: give data{sizes}"


def _not_finite(outputs: Sequence[OutputMetrics], where: str) -> tuple[str, ...]:
    """Say in which outputs the reference is not finite; raise DataError if there is nothing else."""
    counts = {
        output.name: (output.metrics.nonfinite_reference, output.metrics.elements) for output in outputs
    }
    if counts and all(bad == elements for bad, elements in counts.values()):
        raise DataError(
            f"{where}: all outputs are empty, NaN or infinite: nothing was compared; give other data"
        )
    return tuple(
        f"output {name!r}: {bad} of {elements} elements are NaN or infinite in the reference"
        for name, (bad, elements) in counts.items()
        if bad
    )


def _check_same_ends(reference: files.ModelFile, got: files.ModelFile) -> None:
    """Raise ModelError unless the models have the same inputs and outputs, whatever their order."""
    for what, ends in (("inputs", _inputs), ("outputs", _outputs)):
        wanted, given = ends(reference.model), ends(got.model)
        if wanted != given:
            raise ModelError(
                f"{got.path}: its {what} are {_listed(given)}, those of {reference.path} are "
                f"{_listed(wanted)}; compare a model with its own conversion"
            )


def _inputs(model: ir.Model) -> dict[str, str]:
    return {item.name: str(item.dtype) for item in model_inputs(model) if item.required}


def _outputs(model: ir.Model) -> dict[str, str]:
    return {str(value.name): str(value.dtype or value.type) for value in model.graph.outputs}


def _listed(ends: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in ends.items()) or "none"


class _Comparison:
    """The two models in sessions, the packed layers alone in groups, and the sums over batches."""

    def __init__(
        self,
        reference: files.ModelFile,
        got: files.ModelFile,
        taps: Sequence[Tap],
        threads: int,
        memory: int,
        mask: str,
    ) -> None:
        graph_outputs = reference.model.graph.outputs
        self._names = [str(value.name) for value in graph_outputs if isinstance(value.type, ir.TensorType)]
        self._all_taps = taps
        self._taps = [tap for tap in taps if not tap.note]
        self._memory, self._threads, self._got_file, self._mask = memory, threads, got, mask
        values = [name for tap in self._taps for name in (*tap.inputs, tap.y)]
        expose(reference.model, values)
        expose_shapes(reference.model, values)
        expose(got.model, (tap.y for tap in self._taps))
        self._reference = start(reference.model, reference.path, threads)
        self._got = start(got.model, got.path, threads)
        self._groups: list[_Group] | None = None
        self._apart = {name: Accumulator() for name in self._names}
        self._sums = [_LayerSums() for _ in taps]

    def add(self, batch: Batch, label: str, hint: str) -> tuple[Batch, Batch]:
        """Run one batch through everything and add up the distances; return the outputs of both models."""
        reference = _run(self._reference, self._names, batch, label, hint)
        got = _run(self._got, self._names, batch, label, hint)
        there = tokens(batch, self._mask)
        for name in self._names:
            where = f"output {name!r} on {label}"
            self._update(self._apart[name], reference[name], got[name], there, where)
        if self._groups is None:
            self._groups = self._divide(batch, label)
        for group in self._groups:
            self._add_layers(group, batch, there, label)
        return reference, got

    def _divide(self, batch: Batch, label: str) -> list[_Group]:
        """Put layers that follow one another into groups whose values fit into memory."""
        names = [shape_name(name) for tap in self._taps for name in (*tap.inputs, tap.y)]
        shapes = _run(self._reference, names, batch, label)
        nbytes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
        groups: list[list[tuple[int, Tap]]] = []
        free = 0
        for index, tap in enumerate(self._all_taps):
            if tap.note:
                continue
            # the result is there four times: of both models, and of the layer alone with both activations
            needed = sum(nbytes[shape_name(name)] for name in tap.inputs) + 4 * nbytes[shape_name(tap.y)]
            if needed > free or not groups:
                groups.append([])
                free = max(self._memory, needed)
            groups[-1].append((index, tap))
            free -= needed
        types = self._reference.types()
        return [_Group(self._got_file, taps, types, self._threads) for taps in groups]

    def _add_layers(self, group: _Group, batch: Batch, there: np.ndarray | None, label: str) -> None:
        reference = _run(self._reference, [*group.inputs, *group.ys], batch, label)
        got = _run(self._got, group.ys, batch, label)
        packed, float_x = group.run({name: reference[name] for name in group.inputs}, label)
        for (index, tap), separated in zip(group.taps, group.separated, strict=True):
            sums, y, alone = self._sums[index], reference[tap.y], output_name(index, tap.y)
            self._update(sums.accumulated, y, got[tap.y], there, f"layer {tap.layer!r} on {label}")
            where = f"layer {tap.layer!r} alone on {label}"
            sums.separated = separated
            self._update(sums.local, y, packed[alone], there, where)
            if separated:
                self._update(sums.weight, y, float_x[alone], there, where)
                self._update(sums.activations, float_x[alone], packed[alone], there, where)

    def _update(
        self,
        accumulator: Accumulator,
        reference: np.ndarray,
        got: np.ndarray,
        there: np.ndarray | None,
        where: str,
    ) -> None:
        try:
            accumulator.update(compared(reference, there), compared(got, there))
        except ValueError as error:
            path = self._reference.path
            raise ModelError(f"{self._got.path}: {where}: {error} as in {path}; convert it again") from None

    def outputs(self) -> tuple[OutputMetrics, ...]:
        """Return the metrics of the outputs, in their order."""
        return tuple(OutputMetrics(name, self._apart[name].result()) for name in self._names)

    def layers(self) -> tuple[LayerMetrics, ...]:
        """Return the metrics of the layers, the worst local SQNR first, those without numbers last."""
        return with_blame(
            [
                LayerMetrics(tap.layer, note=tap.note, index=index)
                if tap.note
                else self._sums[index].result(tap.layer, index)
                for index, tap in enumerate(self._all_taps)
            ]
        )


def _run(runner: Runner, names: Sequence[str], batch: Batch, label: str, hint: str = "") -> Batch:
    """Return values by name; those that are fed need not be computed."""
    computed = [name for name in dict.fromkeys(names) if name not in batch]
    found = runner.run(computed, batch, label, hint) if computed else {}
    return {name: batch[name] if name in batch else found[name] for name in names}


class _Group:
    """Layers that are compared at a time, alone in two sessions: as they are, and with float activations."""

    def __init__(
        self,
        got: files.ModelFile,
        taps: Sequence[tuple[int, Tap]],
        types: Mapping[str, ir.DataType],
        threads: int,
    ) -> None:
        self.taps = taps
        self.inputs = [name for _, tap in taps for name in tap.inputs]
        self.ys = [tap.y for _, tap in taps]
        models = [layers_alone(got.model, taps, types, float_x=float_x) for float_x in (False, True)]
        self.separated = separates(models[1])
        self._sessions = [start(model, got.path, threads) for model in models]

    def run(self, fed: Batch, label: str) -> list[Batch]:
        """Return the results, called by `output_name`, of both sessions."""
        names = [output_name(index, tap.y) for index, tap in self.taps]
        return [session.run(names, fed, f"its layers alone, {label}") for session in self._sessions]


class _LayerSums:
    """What is summed up over batches for one layer, see LayerMetrics."""

    def __init__(self) -> None:
        sums = (Accumulator(scores=False) for _ in range(4))
        self.local, self.weight, self.activations, self.accumulated = sums
        self.separated = True

    def result(self, name: str, index: int) -> LayerMetrics:
        return LayerMetrics(
            name,
            self.local.result(),
            self.weight.result() if self.separated else None,
            self.activations.result() if self.separated else None,
            self.accumulated.result(),
            note="" if self.separated else _NOT_SEPARATED,
            index=index,
        )
