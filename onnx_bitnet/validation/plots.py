"""Draw the frontier that a plan chose from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx_bitnet.errors import OutputError, RuntimeMissing, one_line
from onnx_bitnet.report import FrontierPoint


def frontier(points: Sequence[FrontierPoint], path: Path) -> None:
    """Draw size against predicted and measured loss, the choice marked, as `.svg` or `.png`.

    Raises:
        OutputError: there is nothing to draw, or the file cannot be written.
        RuntimeMissing: matplotlib is not installed.
    """
    if not points:
        raise OutputError(f"{path}: nothing to draw; only a plan with a goal has a frontier")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeMissing("a plot needs matplotlib; pip install onnx-bitnet[report]") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    draw_frontier(figure.subplots(), points)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot write the plot: {one_line(error)}") from None


def draw_frontier(axes: Any, points: Sequence[FrontierPoint]) -> None:
    """Draw the points on matplotlib's axes. The last, all float, has no loss that a logarithm could show."""
    drawn = [point for point in points if point.loss > 0]
    axes.plot(
        [point.nbytes / 1e6 for point in drawn], [point.loss for point in drawn], ".-", label="predicted"
    )
    measured = [(point.nbytes / 1e6, point.measured) for point in points if point.measured]
    if measured:
        axes.plot(*zip(*measured, strict=True), "x", label="measured")
    for point in points:
        if point.chosen:
            axes.axvline(point.nbytes / 1e6, color="gray", linewidth=1, label="chosen")
    axes.set(yscale="log", xlabel="size of the files, MB", ylabel="loss of the worst output")
    axes.legend(frameon=False)
