"""Write a validation as a web page of one file: verdict, sizes, plots and a table of the layers."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from onnx_bitnet import outputs
from onnx_bitnet.errors import RuntimeMissing
from onnx_bitnet.report import FrontierPoint, size
from onnx_bitnet.validation.metrics import Metrics
from onnx_bitnet.validation.plots import draw_frontier
from onnx_bitnet.validation.validation import LayerMetrics, Validation

try:
    import jinja2
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise RuntimeMissing(f"the HTML report needs {error.name}: pip install 'onnx-bitnet[report]'") from None

_COLOURS = {
    "weight": "#4c78a8",
    "activations": "#f58518",
    "local": "#54a24b",
    "accumulated": "#b279a2",
}
_CODES = ("#c44e52", "#d9d9d9", "#4c72b0", "#8172b3")
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "onnx_bitnet", "font.size": 9}
_BLAMED = 12  # layers named in the plot of who is to blame


def write(
    result: Validation, path: Path, gates: Mapping[str, float], frontier: Sequence[FrontierPoint] = ()
) -> None:
    """Write the page.

    Args:
        result: what to show.
        path: the file, which is replaced if it exists.
        gates: arguments of Validation.failures to show as passed or failed.
        frontier: what the conversion was chosen from, to draw.

    Raises:
        OutputError: the file cannot be written.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"size": size, "number": _number, "decibel": _decibel}
    template = environment.from_string(resources(__package__).joinpath("report.html").read_text("utf-8"))
    page = template.render(
        result=result,
        gates=gates,
        failures=result.failures(**gates),
        version=version("onnx-bitnet"),
        rows=_rows(result),
        figures=[
            *((title, text, _svg(partial(draw, result=result))) for title, text, draw in _FIGURES),
            ("Size against error", _FRONTIER, _svg(partial(_frontier, points=frontier))),
        ],
    )
    outputs.write_text(path, page)


def _rows(result: Validation) -> list[dict[str, Any]]:
    """Return the packed layers in graph order, each with its metrics and how it is packed."""
    packed = {layer.name: layer for layer in result.packed}
    measured = sorted(result.layers, key=lambda layer: layer.index)
    layers: Sequence[LayerMetrics] = measured or [LayerMetrics(layer.name) for layer in result.packed]
    return [{"layer": layer, "packed": packed.get(layer.name)} for layer in layers]


def _by_depth(axes: Any, result: Validation) -> bool:
    layers = [layer for layer in sorted(result.layers, key=lambda layer: layer.index) if layer.local]
    for part, colour in _COLOURS.items():
        points = [(layer.index, _finite_sqnr(getattr(layer, part))) for layer in layers]
        drawn = [(index, sqnr) for index, sqnr in points if sqnr is not None]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), "o-", color=colour, label=part, markersize=3, linewidth=1.2)
    if not axes.lines:
        return False
    axes.set(xlabel="layer, in graph order", ylabel="SQNR of its result, dB")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return True


def _blamed(axes: Any, result: Validation) -> bool:
    ranked = sorted((layer for layer in result.layers if layer.blame), key=lambda layer: -(layer.blame or 0))
    worst = ranked[:_BLAMED][::-1]
    axes.barh(
        [_short(layer.name) for layer in worst],
        [100 * (layer.blame or 0) for layer in worst],
        color=_COLOURS["local"],
    )
    axes.set(xlabel="share of all local noise, %")
    axes.grid(axis="y", visible=False)
    return bool(worst)


def _codes(axes: Any, result: Validation) -> bool:
    if not result.packed:
        return False
    positions, bottom = range(len(result.packed)), [0.0] * len(result.packed)
    for code, colour in enumerate(_CODES):
        shares = [100 * layer.codes[code] for layer in result.packed]
        if any(shares):
            axes.bar(positions, shares, 0.9, bottom, color=colour, label=f"code {code}")
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set(xlabel="packed layer, in graph order", ylabel="share of its codes, %", ylim=(0, 100))
    axes.grid(visible=False)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return True


def _waterfall(axes: Any, result: Validation) -> bool:
    codes = sum(layer.code_bytes for layer in result.packed)
    scales = sum(layer.nbytes for layer in result.packed) - codes
    rest = result.got_bytes - codes - scales
    steps = (
        ("reference", 0, result.reference_bytes, "#7f7f7f"),
        ("float weights\nremoved", rest, result.reference_bytes - rest, "#54a24b"),
        ("codes", rest, codes, "#f58518"),
        ("scales and\nzero points", rest + codes, scales, "#eeca3b"),
        ("converted", 0, result.got_bytes, "#4c78a8"),
    )
    for position, (_, bottom, height, colour) in enumerate(steps):
        axes.bar(position, height / 1e6, 0.6, bottom / 1e6, color=colour)
        axes.text(position, (bottom + height) / 1e6, size(abs(height)), ha="center", va="bottom")
    axes.set_xticks(range(len(steps)), [label for label, *_ in steps])
    axes.set(ylabel="MB")
    axes.margins(y=0.1)
    axes.grid(axis="x", visible=False)
    return bool(result.packed) and result.reference_bytes > 0


def _frontier(axes: Any, points: Sequence[FrontierPoint]) -> bool:
    if points:
        draw_frontier(axes, points)
    return bool(points)


_FRONTIER = (
    "What the layers' bits were chosen from: 1 - cosine, or noise over signal, predicted and, where a "
    "choice was converted, measured."
)
_FIGURES: tuple[tuple[str, str, Callable[..., bool]], ...] = (
    (
        "Error by depth",
        "Signal to noise of each layer's result. Weight: rounded weights alone; activations: rounded "
        "activations alone; local: both, on the reference's inputs; accumulated: inside the converted model.",
        _by_depth,
    ),
    ("Layers to blame", "Share of each layer in the sum of the local noise-to-signal ratios.", _blamed),
    ("Size", "From the reference's files to the converted ones.", _waterfall),
    ("Codes", "How often each code occurs; for ternary layers code 1 is zero.", _codes),
)


def _svg(draw: Callable[[Any], bool]) -> str | None:
    """Return a drawing as SVG, None if there is nothing to draw."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(color="#e5e5e5")
        if not draw(axes):
            return None
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the XML declaration, which HTML does not know


def _finite_sqnr(metrics: Metrics | None) -> float | None:
    sqnr = metrics.sqnr_db if metrics else None
    return sqnr if sqnr is not None and math.isfinite(sqnr) else None


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"…{name[-39:]}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _decibel(metrics: Metrics | None) -> str:
    if metrics is None:
        return "–"
    if metrics.identical:
        return "identical"
    return "–" if metrics.sqnr_db is None else f"{metrics.sqnr_db:.1f}"
