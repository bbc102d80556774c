"""Draws how near kernels and peers come to what the machine can do: a roofline.

    python bench/layers.py --json layers.json
    python bench/kernels.py --op dot --json kernels.json
    python bench/roofline.py layers.json kernels.json --out docs/roofline

Each point is a layer with some number of rows M. Its x is operations per byte of weights: 2 M by the bytes of
one weight. Its y is operations per second. Lines that rise are read bandwidths, flat ones peaks of byte dot
products. Of points and limits that are in several files the best counts. There is one panel for each kind of
result and number of threads. Writes .svg and .png; needs matplotlib (pip install '.[report]').
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

INK, PALE, GRID = "#1f2430", "#8a91a0", "#e9ebf0"
STYLES = (  # by name: colour, marker; the first that matches
    (r"amx", "#c2255c", "o"),
    (r"^ours A8|avx512vnni|i8mm", "#d9480f", "o"),
    (r"^ours A16|avxvnni|dotprod", "#f59f00", "o"),
    (r"ORT 2-bit|avx512$", "#1c7ed6", "s"),
    (r"ORT 4-bit|avx2|neon", "#74c0fc", "s"),
    (r"ORT int8", "#5f3dc4", "D"),
    (r"ORT 8-bit", "#b197fc", "D"),
    (r"ORT fp32|scalar", "#868e96", "^"),
    (r"llama.cpp T", "#2b8a3e", "v"),
    (r"", "#8ce99a", "v"),
)
DASHES = (0, (5, 3))
Point = tuple[float, float]
Panel = tuple[str, dict[str, Any], dict[str, list[Point]]]  # title, limits, points by name


def series(documents: list[dict[str, Any]], threads: int, where: str) -> dict[str, list[Point]]:
    """Return (operations per byte, TOPS) by name, in the order of rows; `where` is hot, cold or kernels."""
    best: dict[str, dict[float, float]] = {}

    def add(name: str, x: float, tops: float) -> None:
        points = best.setdefault(name, {})
        points[x] = max(tops, points.get(x, 0.0))

    for document in documents:
        for cell in document.get("layers", ()):
            if (cell["threads"], cell["where"]) == (threads, where):
                operations = 2 * cell["m"] * cell["n"] * cell["k"]
                for result in cell["results"]:
                    add(
                        result["name"],
                        operations / result["weight_bytes"],
                        operations / result["min_us"] / 1e6,
                    )
        for row in document.get("kernels", ()):
            if row["tops"] and (threads, where) == (1, "kernels"):
                add(row["kernel"], 8.0 * row["m"], row["tops"])
    return {name: sorted(points.items()) for name, points in best.items()}


def best_limits(documents: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the limits for each number of threads: what else a machine does can only lower them."""
    best: dict[int, dict[str, Any]] = {}
    for limits in (limits for document in documents for limits in document["limits"]):
        mine = best.setdefault(limits["threads"], {"read_gbps": {}, "tops": {}})
        for kind, values in mine.items():
            for key, value in limits[kind].items():
                values[key] = max(value, values.get(key, 0.0))
    return best


def panels(documents: list[dict[str, Any]]) -> list[Panel]:
    """Return what is in each panel; those without a point are left out."""
    places = {"hot": "weights in cache", "cold": "weights from DRAM", "kernels": "kernels alone"}
    found = [
        (f"{title}, {threads} thread{'s' * (threads > 1)}", limits, series(documents, threads, where))
        for where, title in places.items()
        for threads, limits in sorted(best_limits(documents).items())
    ]
    return [panel for panel in found if panel[2]]


def style(name: str) -> tuple[str, str]:
    return next((colour, marker) for pattern, colour, marker in STYLES if re.search(pattern, name))


def draw_limits(axes: Axes, limits: dict[str, Any], x: Point, y: Point) -> None:
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    text = {"fontsize": 8, "color": PALE, "va": "center", "zorder": 1.5, "bbox": paper}
    peak = max(limits["tops"].values())
    for isa, tops in limits["tops"].items():
        axes.plot(x, (tops, tops), color=PALE, lw=1.4 if tops == peak else 0.8, zorder=1)
        axes.text(x[0] * 1.08, tops, f"{isa} {tops:.2f} TOPS", **text)
    for level, gbps in limits["read_gbps"].items():
        tops_by_x = gbps / 1e3
        axes.plot((x[0], peak / tops_by_x), (x[0] * tops_by_x, peak), color=PALE, lw=0.9, ls=DASHES, zorder=1)
        at = max(x[0], y[0] / tops_by_x) * 1.3
        angle = math.degrees(math.atan(tops_by_x))
        turned = {"rotation": angle, "rotation_mode": "anchor", "transform_rotates_text": True}
        axes.text(at, at * tops_by_x, f"{level} {gbps:.0f} GB/s", **turned, **text)


def draw_panel(
    axes: Axes, x: Point, y: Point, title: str, limits: dict[str, Any], found: dict[str, list[Point]]
) -> None:
    axes.set(xscale="log", yscale="log", xlim=x, ylim=y)
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    draw_limits(axes, limits, x, y)
    for name, line in found.items():
        colour, marker = style(name)
        own = name.startswith(("ours", "dot"))
        axes.plot(
            *zip(*line, strict=True),
            color=colour,
            marker=marker,
            ms=5.5 if own else 4.5,
            mec="white",
            mew=0.6,
            lw=2 if own else 1.1,
            zorder=3 if own else 2,
            label=name,
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("operations per byte of weights", fontsize=8.5, color=INK)
    axes.set_ylabel("TOPS", fontsize=8.5, color=INK)
    axes.set_axisbelow(True)
    axes.grid(which="major", color=GRID, lw=0.8)
    axes.tick_params(which="both", color=GRID, labelcolor=INK, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)


def draw(documents: list[dict[str, Any]], out: Path) -> None:
    found = panels(documents)
    points = [point for _, _, lines in found for line in lines.values() for point in line]
    x = min(p[0] for p in points) / 1.5, max(p[0] for p in points) * 1.5
    y = min(p[1] for p in points) / 2, max(p[1] for p in points) * 2
    plt.rcParams |= {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "roofline"}
    lines = len(found) // 2 + 1  # the last cell is for the legend
    figure, grid = plt.subplots(lines, 2, figsize=(11.5, 4.6 * lines), squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, found, strict=False):
        draw_panel(axes, x, y, *panel)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    machine = documents[0]["machine"]
    legend = {
        "loc": "center",
        "ncols": 2,
        "frameon": False,
        "fontsize": 10,
        "labelcolor": INK,
        "labelspacing": 0.9,
    }
    title = f"{machine['cpu']}, {machine['cpus']} CPUs\n"
    grid.flat[len(found)].legend(handles.values(), handles, title=title, title_fontsize=9, **legend)
    for suffix in (".svg", ".png"):
        figure.savefig(out.with_suffix(suffix), dpi=110, metadata={"Date": None} if suffix == ".svg" else {})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON of bench/layers.py and bench/kernels.py")
    parser.add_argument("--out", type=Path, default=Path("roofline"), help="without a suffix")
    arguments = parser.parse_args()
    draw([json.loads(path.read_text()) for path in arguments.results], arguments.out)


if __name__ == "__main__":
    main()
