"""The result of a validation: how far two models are apart, and which layers are to blame."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_bitnet import outputs
from onnx_bitnet.inspection import PackedLayer
from onnx_bitnet.report import FrontierPoint
from onnx_bitnet.validation.metrics import Metrics

SCHEMA = "onnx_bitnet.validation/1"
_PARTS = ("local", "weight", "activations", "accumulated")
_CSV_METRICS = ("sqnr_db", "cosine", "relative_l2", "max_abs")


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
        local: the converted layer's result on the reference's own inputs: what this layer alone costs.
        weight: the same with float activations: what rounding the weights costs; None if `note` says that it
            cannot be told apart.
        activations: the converted layer as it is against itself with float activations: what rounding the
            activations costs; identical if they are not rounded, None like `weight`.
        accumulated: its result inside the converted model: what all layers so far cost.
        note: why there are no numbers, or not all; empty if there are.
        index: position among the packed layers in graph order.
        blame: share of this layer in the sum of the local noise-to-signal ratios of all layers, 0 to 1.
    """

    name: str
    local: Metrics | None = None
    weight: Metrics | None = None
    activations: Metrics | None = None
    accumulated: Metrics | None = None
    note: str = ""
    index: int = 0
    blame: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values."""
        parts = {part: getattr(self, part) for part in _PARTS}
        return {
            "name": self.name,
            "index": self.index,
            "blame": self.blame,
            **{part: metrics.to_dict() if metrics else None for part, metrics in parts.items()},
            "note": self.note,
        }


@dataclass(frozen=True)
class FloatLayer:
    """A linear layer of the converted model that was not converted.

    Args:
        name: name of the layer.
        n: outputs.
        k: inputs.
        reason: why it was left, as the conversion noted it in the file; empty if it did not.
    """

    name: str
    n: int
    k: int
    reason: str = ""


@dataclass(frozen=True)
class Task:
    """The user's own metric of both models.

    Args:
        name: name of the function.
        reference: its value on the reference's outputs.
        got: its value on the converted model's outputs.
    """

    name: str
    reference: float
    got: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values; NaN and infinity, which JSON lacks, become None."""
        numbers = {"reference": self.reference, "got": self.got}
        return {"name": self.name} | {
            key: number if math.isfinite(number) else None for key, number in numbers.items()
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
        reference_bytes: size of the reference and its external data.
        got_bytes: the same of the converted model.
        packed: how each converted layer is packed, in graph order.
        floats: the linear layers that were left as they were, in graph order.
        task: the user's own metric, if one was given.
    """

    reference: str
    got: str
    data: str
    random_data: bool
    batches: int
    outputs: tuple[OutputMetrics, ...]
    layers: tuple[LayerMetrics, ...] = ()
    notes: tuple[str, ...] = ()
    reference_bytes: int = 0
    got_bytes: int = 0
    packed: tuple[PackedLayer, ...] = ()
    floats: tuple[FloatLayer, ...] = ()
    task: Task | None = None

    def failures(
        self,
        min_sqnr: float | None = None,
        min_cosine: float | None = None,
        min_metric: float | None = None,
    ) -> tuple[str, ...]:
        """Return a sentence for every gate that is missed.

        Every float output must reach the gates. Outputs of other types have neither SQNR nor cosine; they
        must be identical if the model has no float output at all.

        Args:
            min_sqnr: smallest SQNR in dB.
            min_cosine: smallest cosine of the flattened output.
            min_metric: smallest value of the user's own metric; missed if none was computed.
        """
        return failures(self.outputs, self.task, min_sqnr, min_cosine, min_metric)

    def passes(
        self,
        min_sqnr: float | None = None,
        min_cosine: float | None = None,
        min_metric: float | None = None,
    ) -> bool:
        """Return whether every output reaches the gates, see `failures`."""
        return not self.failures(min_sqnr, min_cosine, min_metric)

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
            "reference_bytes": self.reference_bytes,
            "got_bytes": self.got_bytes,
            "task": self.task.to_dict() if self.task else None,
            "outputs": [output.to_dict() for output in self.outputs],
            "layers": [layer.to_dict() for layer in self.layers],
            "packed": [dataclasses.asdict(layer) for layer in self.packed],
            "floats": [dataclasses.asdict(layer) for layer in self.floats],
        }

    def to_csv(self, path: str | Path) -> None:
        """Write a table of the layers, packed and float: one line each, metrics by column.

        An existing file is replaced, unless it is one of the models.

        Raises:
            OutputError: the file cannot be written.
        """
        self._check_apart(path)
        packed = {layer.name: layer for layer in self.packed}
        columns = [f"{part}_{metric}" for part in _PARTS for metric in _CSV_METRICS]
        header = ["name", "n", "k", "format", "planes", "granularity", "activation_bits", "bits_per_weight"]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*header, "blame", "note", *columns])
        for layer in sorted(self.layers, key=lambda layer: layer.index):
            how = packed.get(layer.name)
            described = [getattr(how, name) if how else None for name in header[1:]]
            parts = (getattr(layer, part) for part in _PARTS)
            numbers = (part.to_dict() if part else {} for part in parts)
            values = [metrics.get(name) for metrics in numbers for name in _CSV_METRICS]
            writer.writerow([layer.name, *described, layer.blame, layer.note, *values])
        for left in self.floats:
            unpacked = [None] * (len(header) - 3)
            writer.writerow([left.name, left.n, left.k, *unpacked, None, left.reason, *[None] * len(columns)])
        outputs.write_text(Path(path), text.getvalue())

    def _check_apart(self, path: str | Path) -> None:
        outputs.check_inputs(Path(path), models=(self.reference, self.got))

    def to_html(
        self,
        path: str | Path,
        *,
        min_sqnr: float | None = None,
        min_cosine: float | None = None,
        min_metric: float | None = None,
        frontier: Sequence[FrontierPoint] = (),
    ) -> None:
        """Write a page for people: verdict, sizes, plots, and every layer. It needs no network.

        Args:
            path: where to write; an existing file is replaced, unless it is one of the models.
            min_sqnr: gate to show as passed or failed, see `failures`.
            min_cosine: likewise.
            min_metric: likewise.
            frontier: of the conversion's Report, if it had goals: what there was to choose from, to be drawn.

        Raises:
            RuntimeMissing: jinja2 or matplotlib is not installed.
            OutputError: the file cannot be written.
        """
        self._check_apart(path)
        # Imported here because the page needs packages that nothing else does.
        from onnx_bitnet.validation import html_report

        gates = {"min_sqnr": min_sqnr, "min_cosine": min_cosine, "min_metric": min_metric}
        given = {name: gate for name, gate in gates.items() if gate is not None}
        html_report.write(self, Path(path), given, frontier)


def failures(
    outputs: Sequence[OutputMetrics],
    task: Task | None,
    min_sqnr: float | None,
    min_cosine: float | None,
    min_metric: float | None,
) -> tuple[str, ...]:
    """Return a sentence for every gate that outputs and a task miss, see `Validation.failures`."""
    missed = [] if min_metric is None else _task_failures(task, min_metric)
    if min_sqnr is None and min_cosine is None:
        return tuple(missed)
    graded = any(output.metrics.agreement is None for output in outputs)
    for output in outputs:
        metrics = output.metrics
        if metrics.agreement is None:
            missed += _misses(output.name, "SQNR", " dB", metrics.sqnr_db, min_sqnr)
            missed += _misses(output.name, "cosine", "", metrics.cosine, min_cosine)
        elif not graded and not metrics.identical:
            missed.append(f"output {output.name!r}: only {metrics.agreement:.2%} of its elements agree")
    return tuple(missed)


def _task_failures(task: Task | None, least: float) -> list[str]:
    if task is None:
        return ["no metric was computed: give one (--metric FILE.py:FUNCTION) with min_metric"]
    if task.got >= least:  # NaN misses every gate
        return []
    return [f"{task.name} is {task.got:.6g}, below {least:g} (reference {task.reference:.6g})"]


def with_blame(layers: Sequence[LayerMetrics]) -> tuple[LayerMetrics, ...]:
    """Return the layers with their share of all local noise, the worst first, those without numbers last."""
    noise = {layer.name: _noise_to_signal(layer.local) for layer in layers if layer.local is not None}
    total = math.fsum(noise.values())
    rated = []
    for layer in layers:
        share = noise.get(layer.name)
        if share is not None:
            share = share / total if 0.0 < total < math.inf else float(math.isinf(share))
        rated.append(dataclasses.replace(layer, blame=share))
    return tuple(sorted(rated, key=_rank))


def _noise_to_signal(metrics: Metrics) -> float:
    if metrics.sqnr_db is None or metrics.sqnr_db == -math.inf:
        return math.inf
    return float(10.0 ** (-metrics.sqnr_db / 10.0))


def _rank(layer: LayerMetrics) -> tuple[bool, float]:
    sqnr = layer.local.sqnr_db if layer.local else None
    return sqnr is None, sqnr if sqnr is not None else 0.0


def _misses(output: str, what: str, unit: str, value: float | None, least: float | None) -> list[str]:
    if least is None or value is None or value >= least:
        return []
    return [f"output {output!r}: {what} {value:.6g}{unit} is below {least:.9g}{unit}"]
