"""What the command line prints: results as lines and tables, and as JSON where a record has no to_dict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from onnx_bitnet.calibration.calibration import Calibration
from onnx_bitnet.decoder import Built, Times
from onnx_bitnet.doctor import Check
from onnx_bitnet.inspection import Inspection
from onnx_bitnet.kernels import Kernel
from onnx_bitnet.planning.planner import Sensitivity
from onnx_bitnet.report import FrontierPoint, Layer, Report, size
from onnx_bitnet.timing.bench import Bench, ModelTimes
from onnx_bitnet.validation.metrics import Metrics
from onnx_bitnet.validation.validation import Validation

Output = list[str | Table]

_FRONTIER_ROWS = 12
_LONGEST_VALUE = 1000  # characters of metadata


def report(report: Report, *, verbose: bool) -> Output:
    """Show a conversion or a plan: every layer when verbose, a summary, and reasons."""
    converted = report.converted
    verdict = "lossless" if report.lossless else "lossy" if converted else "nothing converted"
    weights = sum(layer.float_bytes for layer in converted)
    packed = sum(layer.packed_bytes for layer in converted if layer.shared_with is None)
    lines = [
        f"{verdict}: {len(converted)} of {len(report.layers)} linear layers packed, "
        f"their weights {size(weights)} -> {size(packed)}",
        f"model {size(report.source_bytes)} -> {size(report.output_bytes)}"
        f"{f': {report.output}' if report.output else ' (predicted)'}",
    ]
    lines += [
        f"left {count}: {reason.explanation} [{reason.value}]" for reason, count in report.reasons().items()
    ]
    tables = [*([_layers(report.layers)] if verbose else []), *frontier(report.frontier)]
    return [*tables, *lines, *report.notes]


def frontier(points: Sequence[FrontierPoint]) -> list[str | Table]:
    """Show what there was to choose from: the chosen point, and others evenly by size."""
    if not points:
        return []
    table = _table("size", "time", "loss", "measured", "")
    marks = {round(index * (len(points) - 1) / _FRONTIER_ROWS) for index in range(_FRONTIER_ROWS + 1)}
    for index, point in enumerate(points):
        if index in marks or point.chosen:
            measured, mark = _number(point.measured, "", ".2e"), "chosen" * point.chosen
            table.add_row(size(point.nbytes), f"{point.time:.2f}", f"{point.loss:.2e}", measured, mark)
    return [table]


def sensitivity(found: Sensitivity) -> Output:
    """Show layers from the most sensitive on, and the loss of each option."""
    names = list(dict.fromkeys(option.name for layer in found.layers for option in layer.options))
    table = _table("layer", "N x K", *names)
    for layer in found.layers:
        losses = {option.name: f"{option.loss:.1e}" for option in layer.options}
        table.add_row(
            " = ".join(layer.names), f"{layer.n} x {layer.k}", *(losses.get(name, "") for name in names)
        )
    return [table, *frontier(found.frontier), *found.notes]


def _layers(layers: Sequence[Layer]) -> Table:
    table = _table("layer", "op", "N x K", "format", "scales", "weights", "bytes", "left because")
    for layer in layers:
        how = f"{layer.format} x{layer.planes} a{layer.activation_bits}" if layer.converted else ""
        how += f" h{layer.rotation}" if layer.rotation else ""
        quality = "" if not layer.converted else "lossless" if layer.lossless else f"{layer.sqnr_db:.1f} dB"
        table.add_row(
            layer.name,
            layer.op_type,
            f"{layer.n} x {layer.k}" if layer.n else "",
            how,
            layer.granularity or "",
            quality,
            size(layer.packed_bytes) if layer.converted and not layer.shared_with else "",
            f"shared with {layer.shared_with}" if layer.shared_with else _why(layer),
        )
    return table


def _why(layer: Layer) -> str:
    if layer.reason is None:
        return ""
    return f"{layer.reason.value}: {layer.detail}" if layer.detail else layer.reason.value


def calibration(found: Calibration, path: Path) -> Output:
    """Show what each layer reads."""
    table = _table("layer", "rows", "K", "min", "max", "mean", "deviation", "kurtosis", "99.9 %")
    for name, item in found.layers.items():
        numbers = (item.min, item.max, item.mean, item.variance**0.5, item.kurtosis)
        percentile = item.magnitude_percentile(99.9)
        table.add_row(
            name, str(item.rows), str(item.k), *(f"{number:.3g}" for number in (*numbers, percentile))
        )
    warning = (
        ["random feeds: these statistics say nothing about real activations"] if found.random_data else []
    )
    return [table, f"{found.samples} samples of {found.data}: {path}", *found.notes, *warning]


def inspection(found: Inspection) -> Output:
    """Show what a model file holds."""
    table = _table(
        "packed layer", "N x K", "format", "scales", "activations", "bits/weight", "codes 0 1 2 3 %"
    )
    for layer in found.packed:
        table.add_row(
            layer.name,
            f"{layer.n} x {layer.k}",
            f"{layer.format} x{layer.planes}",
            layer.granularity,
            f"{layer.activation_bits} bits",
            f"{layer.bits_per_weight:.2f}",
            " ".join(f"{100 * share:.0f}" for share in layer.codes),
        )
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in found.opsets.items())
    lines = [
        f"{found.path}: {size(found.nbytes)}, IR {found.ir_version}, opsets {opsets}",
        f"producer: {found.producer or 'unknown'}",
    ]
    if found.float_layers:
        weights = sum(n * k for _, n, k in found.float_layers)
        lines.append(f"float linear layers: {len(found.float_layers)} with {weights:,} weights")
    lines += [f"{key}: {_shortened(value)}" for key, value in sorted(found.metadata.items())]
    return [*lines, table] if found.packed else [*lines]


def _shortened(text: str) -> str:
    """Cut off what no line holds, such as recipes with a rule for each layer."""
    left = len(text) - _LONGEST_VALUE
    return text if left <= 0 else f"{text[:_LONGEST_VALUE]} ... ({left} characters more with --json)"


def validation(result: Validation) -> Output:
    """Show how far apart two models are: outputs, then layers from the worst on."""
    outputs = _table("output", "SQNR dB", "cosine", "relative L2", "max abs", "top-1", "KL")
    for output in result.outputs:
        metrics = output.metrics
        outputs.add_row(
            output.name,
            _sqnr(metrics),
            _number(metrics.cosine, "-", ".6f"),
            _number(metrics.relative_l2, "-", ".2e"),
            _number(metrics.max_abs, "-", ".2e"),
            _number(metrics.top1, "-", ".4f"),
            _number(metrics.kl, "-", ".2e"),
        )
    parts: Output = [outputs]
    if result.layers:
        columns = ("layer", "blame", "weight dB", "activations dB", "local dB", "accumulated dB", "cosine")
        layers = _table(*columns, "note")
        for layer in result.layers:
            sources = (layer.weight, layer.activations, layer.local, layer.accumulated)
            layers.add_row(
                layer.name,
                _number(layer.blame, "-", ".1%"),
                *(_sqnr(metrics) for metrics in sources),
                _number(layer.accumulated.cosine if layer.accumulated else None, "-", ".6f"),
                layer.note,
            )
        parts.append(layers)
    if result.task:
        parts.append(f"{result.task.name}: {result.task.reference:.6g} -> {result.task.got:.6g}")
    return [*parts, f"data: {result.data}", *result.notes]


def bench(result: Bench, *, verbose: bool) -> Output:
    """Show models side by side; every packed op when verbose."""
    models = _table(
        "model", "file", "memory", "median ms", "min ms", "rows/s", "against the first", "packed ops"
    )
    for model in result.models:
        models.add_row(
            model.name,
            size(model.nbytes),
            "-" if model.memory_bytes is None else size(model.memory_bytes),
            f"{model.median_ms:.3f}",
            f"{model.min_ms:.3f}",
            f"{model.rows_per_second:.1f}",
            f"{result.models[0].median_ms / model.median_ms:.2f} x as fast",
            "" if model.packed_share is None else f"{model.packed_share:.0%} of the time",
        )
    parts: Output = [models]
    for model in result.models:
        if model.packed:
            parts += [_packed_line(result, model), *([_packed_ops(model)] if verbose else [])]
    threads = result.threads or "its own choice of"
    return [
        *parts,
        f"{result.cpu}, {result.cpus} CPUs; onnxruntime {result.onnxruntime}, {threads} threads",
        f"first batch of {result.data}",
        *result.notes,
    ]


def _packed_line(result: Bench, model: ModelTimes) -> str:
    assert model.packed_gbps is not None
    assert result.read_gbps is not None
    isas = ", ".join(sorted({op.isa for op in model.packed}))
    took = sum(op.microseconds for op in model.packed) / 1e3
    return (
        f"{model.name}: {len(model.packed)} packed ops ({isas}) take {took:.3f} ms of the fastest profiled "
        f"run and read {model.packed_gbps:.1f} GB/s of weights; memory gives {result.read_gbps:.1f} GB/s"
    )


def _packed_ops(model: ModelTimes) -> Table:
    table = _table("packed op", "N x K", "rows", "ISA", "microseconds", "GB/s")
    for op in model.packed:
        table.add_row(
            op.name, f"{op.n} x {op.k}", str(op.m), op.isa, f"{op.microseconds:.1f}", f"{op.gbps:.1f}"
        )
    return table


def kernels(listed: Sequence[Kernel]) -> Output:
    """Show every compiled kernel."""
    table = _table("op", "format", "ISA", "runs here", "chosen")
    for kernel in listed:
        table.add_row(kernel.op, kernel.format, kernel.isa, _yes(kernel.runs_here), _yes(kernel.chosen))
    return [table]


def kernels_document(listed: Sequence[Kernel]) -> dict[str, Any]:
    """Return the kernels as one JSON-able document."""
    return {"schema": "onnx_bitnet.kernels/1", "kernels": [dataclasses.asdict(kernel) for kernel in listed]}


def doctor(checks: Sequence[Check]) -> Output:
    """Show the checks of an installation."""
    table = _table("", "check", "found")
    for check in checks:
        table.add_row(Text("ok", "green") if check.ok else Text("FAIL", "red"), check.name, check.found)
    return [table]


def doctor_document(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the checks as one JSON-able document."""
    return {
        "schema": "onnx_bitnet.doctor/1",
        "ok": all(check.ok for check in checks),
        "checks": [dataclasses.asdict(check) for check in checks],
    }


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _number(value: float | None, missing: str, form: str) -> str:
    return missing if value is None else format(value, form)


def _sqnr(metrics: Metrics | None) -> str:
    if metrics is None:
        return "-"
    if metrics.identical:
        return "identical"
    if metrics.agreement is not None:
        return f"{metrics.agreement:.2%} equal"
    return _number(metrics.sqnr_db, "-", ".1f")


def _yes(value: bool) -> str:
    return "yes" if value else ""


def built(built: Built) -> Output:
    """Show what was built."""
    of = built.architecture
    return [
        f"{built.folder}: {of.layers} layers, hidden {of.hidden}, ffn {of.ffn}, "
        f"heads {of.heads}/{of.kv_heads}, vocabulary {of.vocabulary}; {size(built.nbytes)}",
        f"embedding {built.options.embedding}, head {built.options.head}, layers {built.options.format}, "
        f"{of.activation_bits}-bit activations; {'tokenizer copied' if built.tokenizer else 'no tokenizer'}",
    ]


def built_document(built: Built) -> dict[str, Any]:
    """Return the same as plain JSON-able values."""
    return {
        "schema": "onnx_bitnet.built/1",
        "folder": str(built.folder),
        "architecture": dataclasses.asdict(built.architecture),
        "options": dataclasses.asdict(built.options),
        "nbytes": built.nbytes,
        "tokenizer": built.tokenizer,
    }


def generated_document(text: str, times: Times) -> dict[str, Any]:
    """Return a text and how long it took as plain JSON-able values."""
    return {"schema": "onnx_bitnet.generated/1", "text": text, **dataclasses.asdict(times)}
