"""What each recipe costs on an ordinary model: size and agreement of all-MiniLM-L6-v2 with itself in fp32.

    python bench/quality.py [--sentences 200]

The model was not trained for few bits, and nothing is calibrated: this is what rounding alone leaves. The
data are sentences of Python's reference text; the cosine is the mean over sentences, between the embedding of
the packed model and that of the float model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

import onnx_bitnet as bn

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import minilm

RECIPES = {
    "ternary": bn.Recipe(mode="ternary"),
    "ternary, 2 planes": bn.Recipe(mode="ternary", planes=2),
    "ternary, 3 planes": bn.Recipe(mode="ternary", planes=3),
    "int4": bn.Recipe(rules=(bn.Rule(action="int4"),)),
    "int8": bn.Recipe(rules=(bn.Rule(action="int8"),)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=200)
    arguments = parser.parse_args()
    sentences = minilm.sentences()[1][: arguments.sentences]
    batches = [minilm.tokenize(sentences[start : start + 20]) for start in range(0, len(sentences), 20)]
    print(f"| recipe | bits per weight | linear layers, MB | mean cosine of {len(sentences)} embeddings |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source, packed = Path(folder, "minilm.onnx"), Path(folder, "packed.onnx")
        onnx.save(minilm.build(), source)
        for name, recipe in RECIPES.items():
            report = bn.convert(source, packed, recipe, force=True)
            weights = sum(layer.n * layer.k for layer in report.converted)
            nbytes = sum(layer.packed_bytes for layer in report.converted)
            result = bn.validate(source, packed, batches, layers=False)
            cosine = {output.name: output.metrics.row_cosine for output in result.outputs}[
                "sentence_embedding"
            ]
            print(f"| {name} | {8 * nbytes / weights:.2f} | {nbytes / 1e6:.1f} | {cosine or np.nan:.4f} |")


if __name__ == "__main__":
    main()
