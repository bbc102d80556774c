"""Validate: run a model and its conversion on the same data, and say how far apart they are and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_bitnet import files
from onnx_bitnet.errors import ModelError
from onnx_bitnet.feeds import Feeds, open_feeds
from onnx_bitnet.inputs import Batch, model_inputs
from onnx_bitnet.metrics import Accumulator, Metrics
from onnx_bitnet.runner import Runner, start
from onnx_bitnet.taps import Tap, expose, find_taps, layers_alone, output_name

SCHEMA = "onnx_bitnet.validation/1"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class OutputMetrics:
    """How far one output of the models is apart."""

    name: str
    metrics: Metrics

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values."""
        return {"name": self.name} | self.metrics.to_dict()


@dataclass(frozen=True)
class LayerMetrics:
    """How far one converted layer is apart.

    Args:
        name: name of the layer.
        local: the packed layer's result on the reference's own inputs: what this layer alone costs.
        accumulated: its result inside the converted model: what all layers so far cost.
        note: why there are no numbers; empty if there are.
    """

    name: str
    local: Metrics | None = None
    accumulated: Metrics | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values."""
        return {
            "name": self.name,
            "local": self.local.to_dict() if self.local else None,
            "accumulated": self.accumulated.to_dict() if self.accumulated else None,
            "note": self.note,
        }


@dataclass(frozen=True)
class Validation:
    """How far a converted model is from its reference.

    Args:
        reference: path of the reference.
        got: path of the converted model.
        data: where the feeds came from.
        random_data: no data was given; random feeds say that the conversion works, not how good it is.
        batches: number of batches run.
        outputs: every output of the models, in their order.
        layers: every converted layer, the worst local SQNR first.
        notes: sentences the user should read.
    """

    reference: str
    got: str
    data: str
    random_data: bool
    batches: int
    outputs: tuple[OutputMetrics, ...]
    layers: tuple[LayerMetrics, ...] = ()
    notes: tuple[str, ...] = ()

    def failures(self, min_sqnr: float | None = None, min_cosine: float | None = None) -> tuple[str, ...]:
        """Return a sentence for every output that misses a gate.

        Every float output must reach the gates. Outputs of other types have neither SQNR nor cosine; they
        must be identical if the model has no float output at all.

        Args:
            min_sqnr: smallest SQNR in dB.
            min_cosine: smallest cosine of the flattened output.
        """
        if min_sqnr is None and min_cosine is None:
            return ()
        failures = []
        graded = any(output.metrics.agreement is None for output in self.outputs)
        for output in self.outputs:
            metrics = output.metrics
            if metrics.agreement is None:
                failures += _misses(output.name, "SQNR", " dB", metrics.sqnr_db, min_sqnr)
                failures += _misses(output.name, "cosine", "", metrics.cosine, min_cosine)
            elif not graded and not metrics.identical:
                failures.append(f"output {output.name!r}: only {metrics.agreement:.2%} of its elements agree")
        return tuple(failures)

    def passes(self, min_sqnr: float | None = None, min_cosine: float | None = None) -> bool:
        """Return whether every output reaches the gates, see `failures`."""
        return not self.failures(min_sqnr, min_cosine)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as one JSON-able document."""
        return {
            "schema": SCHEMA,
            "reference": self.reference,
            "got": self.got,
            "data": self.data,
            "random_data": self.random_data,
            "batches": self.batches,
            "notes": list(self.notes),
            "outputs": [output.to_dict() for output in self.outputs],
            "layers": [layer.to_dict() for layer in self.layers],
        }


def validate(
    reference: str | Path,
    got: str | Path,
    data: object = None,
    *,
    threads: int = 0,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    layers: bool = True,
    progress: Progress | None = None,
) -> Validation:
    """Run a model and its conversion in onnxruntime on the same data and compare them.

    One batch is in memory at a time, with the activations of all converted layers if `layers` is set. The
    data is read once.

    Args:
        reference: the model that was converted.
        got: the converted model; any other model with the same inputs and outputs can be compared, too.
        data: see `onnx_bitnet.feeds.open_feeds`; None for random feeds.
        threads: for onnxruntime, 0 for its own choice.
        seed: of random feeds.
        dims: sizes of symbolic dimensions in random feeds, by name.
        layers: compare every converted layer as well.
        progress: called as progress(done, total, what) before each batch and at the end; total is 0 when the
            number of batches is not known.

    Raises:
        ModelError: a model cannot be read or run, or the two have different inputs or outputs.
        DataError: the data cannot be read or does not fit.
        RuntimeMissing: onnxruntime or the custom-op library cannot be used.
    """
    left, right = files.read(reference), files.read(got)
    _check_same_ends(left, right)
    notes = tuple(
        f"output {value.name!r} is no tensor and was not compared"
        for value in left.model.graph.outputs
        if not isinstance(value.type, ir.TensorType)
    )
    feeds = open_feeds(left.model, data, seed=seed, dims=dims)
    comparison = _Comparison(left, right, find_taps(left.model, right.model) if layers else (), threads)
    batches = 0
    for batch in feeds:
        if progress:
            progress(batches, feeds.count, f"batch {batches}")
        comparison.add(batch, f"batch {batches} of {feeds.description}", _hint(feeds))
        batches += 1
    if progress:
        progress(batches, batches, "done")
    return Validation(
        str(reference),
        str(got),
        feeds.description,
        feeds.random,
        batches,
        comparison.outputs(),
        comparison.layers(),
        notes,
    )


def _hint(feeds: Feeds) -> str:
    """Return what to do if a model fails on these feeds."""
    if not feeds.random:
        return ""
    symbols = dict.fromkeys(
        size for item in feeds.inputs for size in item.shape or () if isinstance(size, str)
    )
    sizes = f", or sizes (dims) of {', '.join(symbols)}" if symbols else ""
    return f"; random feeds may not suit it: give data{sizes}"


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
    """The two models in sessions, a third with the packed layers alone, and the sums over batches."""

    def __init__(
        self, reference: files.ModelFile, got: files.ModelFile, taps: Sequence[Tap], threads: int
    ) -> None:
        graph_outputs = reference.model.graph.outputs
        self._names = [str(value.name) for value in graph_outputs if isinstance(value.type, ir.TensorType)]
        self._all_taps = taps
        self._taps = [tap for tap in taps if not tap.note]
        expose(reference.model, (name for tap in self._taps for name in (*tap.inputs, tap.y)))
        expose(got.model, (tap.y for tap in self._taps))
        self._reference = start(reference.model, reference.path, threads)
        self._got = start(got.model, got.path, threads)
        self._alone: Runner | None = None
        if self._taps:
            alone = layers_alone(got.model, self._taps, self._reference.types())
            self._alone = start(alone, got.path, threads)
        self._apart = {name: Accumulator() for name in self._names}
        self._accumulated = {tap.layer: Accumulator() for tap in self._taps}
        self._local = {tap.layer: Accumulator() for tap in self._taps}

    def add(self, batch: Batch, label: str, hint: str) -> None:
        """Run one batch through everything and add up the distances."""
        ys = [tap.y for tap in self._taps]
        wanted = dict.fromkeys([*self._names, *ys, *(name for tap in self._taps for name in tap.inputs)])
        names = [name for name in wanted if name not in batch]
        reference = batch | self._reference.run(names, batch, label, hint)
        got = self._got.run(list(dict.fromkeys([*self._names, *ys])), batch, label, hint)
        for name in self._names:
            self._update(self._apart[name], reference[name], got[name], f"output {name!r} on {label}")
        for tap in self._taps:
            where = f"layer {tap.layer!r} on {label}"
            self._update(self._accumulated[tap.layer], reference[tap.y], got[tap.y], where)
        if self._alone is not None:
            del got  # with long sequences the activations of all layers are large
            alone_names = [output_name(index, tap.y) for index, tap in enumerate(self._taps)]
            fed = {name: reference[name] for tap in self._taps for name in tap.inputs}
            alone = self._alone.run(alone_names, fed, f"its layers alone, {label}")
            for tap, name in zip(self._taps, alone_names, strict=True):
                where = f"layer {tap.layer!r} alone on {label}"
                self._update(self._local[tap.layer], reference[tap.y], alone[name], where)

    def _update(self, accumulator: Accumulator, reference: np.ndarray, got: np.ndarray, where: str) -> None:
        try:
            accumulator.update(reference, got)
        except ValueError as error:
            path = self._reference.path
            raise ModelError(f"{self._got.path}: {where}: {error} as in {path}; convert it again") from None

    def outputs(self) -> tuple[OutputMetrics, ...]:
        """Return the metrics of the outputs, in their order."""
        return tuple(OutputMetrics(name, self._apart[name].result()) for name in self._names)

    def layers(self) -> tuple[LayerMetrics, ...]:
        """Return the metrics of the layers, the worst local SQNR first, those without numbers last."""
        found = [
            LayerMetrics(tap.layer, note=tap.note)
            if tap.note
            else LayerMetrics(
                tap.layer, self._local[tap.layer].result(), self._accumulated[tap.layer].result()
            )
            for tap in self._all_taps
        ]
        return tuple(sorted(found, key=_rank))


def _rank(layer: LayerMetrics) -> tuple[bool, float]:
    sqnr = layer.local.sqnr_db if layer.local else None
    return sqnr is None, sqnr if sqnr is not None else 0.0


def _misses(output: str, what: str, unit: str, value: float | None, least: float | None) -> list[str]:
    if least is None or value is None or value >= least:
        return []
    return [f"output {output!r}: {what} {value:.6g}{unit} is below {least:g}{unit}"]
