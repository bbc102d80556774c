"""What few bits cost models that read images: PP-OCRv4 text recognition and a classifier of pages, PP-LCNet.

    python bench/vision.py [--images 48]

Both see rendered text: the share of characters read, and of pages whose turn is found, is of texts that were
not calibrated with. The cosine, and how often the largest output is the same, is to the float model. Their
1x1 convolutions and matrices are quantized, of PP-OCR all but the last, which is its alphabet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import onnx_bitnet as bn

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import installed
import ocr
import orientation

RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"action": "int8", "granularity": "channel"},
    "int8, A8": {"action": "int8", "granularity": "channel", "activation_bits": 8},
    "int4": {"action": "int4", "granularity": "block:64"},
    "int4, A8": {"action": "int4", "granularity": "block:64", "activation_bits": 8},
    "2 planes": {"mode": "ternary", "planes": 2, "granularity": "block:64"},
    "four levels": {"mode": "ternary", "levels": 4, "granularity": "block:64"},
    "ternary": {"mode": "ternary", "granularity": "block:64"},
}
KEPT = {"PP-OCR": "p2o.MatMul.24"}


@dataclass(frozen=True)
class Task:
    """A model, feeds to calibrate and to measure with, and what makes a score of its outputs."""

    name: str
    model: Path
    calibration: list[dict[str, np.ndarray]]
    evaluation: list[dict[str, np.ndarray]]
    score: Callable[[np.ndarray], float]


def batches(feeds: dict[str, np.ndarray], size: int = 16) -> list[dict[str, np.ndarray]]:
    """Return the feeds in batches."""
    return [{"x": feeds["x"][start : start + size]} for start in range(0, len(feeds["x"]), size)]


def tasks(images: int) -> list[Task]:
    """Return what to measure."""
    model = installed.need(ocr.WHEEL, ocr.FILE)
    metadata = bn.session(model).get_modelmeta().custom_metadata_map
    lines, texts = ocr.printed(images)
    turned, classes = orientation.pages(images // 4)
    return [
        Task(
            "PP-OCR",
            model,
            batches(ocr.printed(32, held_out=False)[0]),
            batches(lines),
            lambda got: ocr.accuracy(ocr.read(got, metadata), texts),
        ),
        Task(
            "PP-LCNet",
            installed.need(orientation.WHEEL, orientation.FILE),
            batches(orientation.pages(12, held_out=False)[0]),
            batches(turned),
            lambda got: float((got.argmax(axis=-1) == classes).mean()),
        ),
    ]


def row(task: Task, name: str, folder: Path) -> str:
    """Convert by a recipe, with and without data, and return a row of the table."""
    packed, what = folder / "packed.onnx", RECIPES[name]
    kept = [(KEPT[task.name], "keep")] if task.name in KEPT else []
    recipe = {"rules": [*kept, what]} if "action" in what else what | {"rules": kept}
    scores: list[float] = []

    def score(_: Any, outputs: Sequence[dict[str, np.ndarray]]) -> float:
        got = np.concatenate([next(iter(batch.values())) for batch in outputs])
        scores.append(100 * task.score(got))
        return scores[-1]

    cells = []
    for data in (None, task.calibration):
        report = bn.convert(task.model, packed, recipe, data=data, force=True)
        (output,) = bn.validate(task.model, packed, task.evaluation, metric=score, layers=False).outputs
        same, cosine = 100 * (output.metrics.top1 or 0), output.metrics.cosine or 0
        cells.append(f"{scores[-1]:.1f} / {same:.1f} / {cosine:.4f}")
    weights = sum(layer.n * layer.k for layer in report.converted)
    bits = 8 * sum(layer.packed_bytes for layer in report.converted) / weights
    size = f"{report.output_bytes / 1e6:.2f}"
    return f"| {task.name}, {name} | {scores[0]:.1f} | {bits:.2f} | {size} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=48)
    arguments = parser.parse_args()
    print("right / same as float, % / cosine of the output")
    print("| model, recipe | float right, % | bits per weight | file, MB | rounded | calibrated |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks(arguments.images):
            for name in RECIPES:
                print(row(task, name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
