"""What each recipe costs on an ordinary model: size and agreement of all-MiniLM-L6-v2 with itself in fp32.

    python bench/quality.py [--sentences 200]

The model was not trained for few bits. Each recipe is measured twice: with rounding alone, and calibrated on
128 other sentences (rounding gptq). All are sentences of Python's reference text; the cosine is the mean over
sentences, between the embedding of the packed model and that of the float model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnx_bitnet as bn

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import minilm

ROTATED = {"mode": "ternary", "rotation": "hadamard:128"}
T5 = {"format": "t5", "granularity": "block:128"}
RECIPES: dict[str, dict[str, Any]] = {
    "ternary": {"mode": "ternary", **T5},
    "ternary, rotated": ROTATED | T5,
    "four levels, rotated": ROTATED | {"levels": 4, "granularity": "block:64"},
    "2 planes, rotated": ROTATED | T5 | {"planes": 2},
    "int4, rotated": {
        "rotation": "hadamard:128",
        "rules": [{"action": "int4", "granularity": "block:192"}],
    },
    "int8": {"rules": [{"action": "int8"}]},
    "auto, cosine 0.99": {"min_cosine": 0.99},
}


def batches(sentences: list[str], size: int) -> list[dict[str, np.ndarray]]:
    """Return tokens, sentences of like length together: padding is no text to calibrate with."""
    ordered = sorted(sentences, key=len)
    return [minilm.tokenize(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=200)
    arguments = parser.parse_args()
    known, held_out = minilm.sentences()
    calibration, evaluation = batches(known, 16), batches(held_out[: arguments.sentences], 20)
    print(f"| recipe | bits per weight | cosine, rounded | calibrated ({arguments.sentences} sentences) |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source, packed = Path(folder, "minilm.onnx"), Path(folder, "packed.onnx")
        onnx.save(minilm.build(), source)
        for name, recipe in RECIPES.items():
            cosines = []
            for data in (None, calibration):
                report = bn.convert(source, packed, recipe, data=data, force=True)
                weights = sum(layer.n * layer.k for layer in report.converted)
                bits = 8 * sum(layer.packed_bytes for layer in report.converted) / weights
                result = bn.validate(source, packed, evaluation, layers=False)
                row_cosine = {output.name: output.metrics.row_cosine for output in result.outputs}
                cosines.append(row_cosine["sentence_embedding"] or np.nan)
            print(f"| {name} | {bits:.2f} | {cosines[0]:.4f} | {cosines[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
