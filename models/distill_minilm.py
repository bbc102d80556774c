"""Turns all-MiniLM-L6-v2 purely ternary by distillation: one scale for 128 weights, 8-bit activations.

    python models/distill_minilm.py ternary.onnx [--steps 400] [--text FILE ...]

All it takes of the model is the ONNX file that minilm.py writes: its 36 linear layers, made ternary, learn to
give the embeddings and hidden states that the float model gives. The only data are sentences without labels:
those of Python's reference text, of the doc strings of its standard library, and of `--text` files; never
minilm.py's 200 evaluation sentences. What it writes is the same graph with the new weights, in plain ONNX,
which `onnx-bitnet convert ternary.onnx` packs without loss. Needs the extra [torch].
"""

from __future__ import annotations

import argparse
import ast
import re
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import minilm
import numpy as np
import onnx

import onnx_bitnet as bn
from onnx_bitnet.torch import Distilled, Settings, Step, distill_onnx

MAX_TOKENS = 64
BATCH_TOKENS = 1024


def texts(files: list[Path]) -> list[str]:
    """Return sentences to learn from, none of them an evaluation sentence; in the same order every time."""
    sources = list(topics.values())
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        sources += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    sources += [file.read_text(errors="replace") for file in files]
    found = set()
    for source in sources:
        for paragraph in re.split(r"\n\s*[\n%]", source):
            found |= set(re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())))
    sentences = {text for text in found if 20 <= len(text) <= 400 and re.search(r"[a-z]{3}", text)}
    held_out = minilm.sentences()[1]
    return sorted(text for text in sentences if not any(test in text for test in held_out))


class Batches:
    """Sentences in batches of equal length of about BATCH_TOKENS tokens, each pass in another order."""

    def __init__(self, sentences: list[str]) -> None:
        feeds = minilm.tokenize(sentences, length=MAX_TOKENS)
        self.rows = [
            row[: mask.sum()] for row, mask in zip(feeds["input_ids"], feeds["attention_mask"], strict=True)
        ]
        self.rng = np.random.default_rng(0)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        order = self.rng.permutation(len(self.rows))
        by_length: dict[int, list[int]] = {}
        for index in order:
            by_length.setdefault(len(self.rows[index]), []).append(index)
        batches = []
        for length, members in by_length.items():
            size = max(1, BATCH_TOKENS // length)
            batches += [members[start : start + size] for start in range(0, len(members), size)]
        for index in self.rng.permutation([i for i, batch in enumerate(batches) if len(batch) >= 4]):
            ids = np.stack([self.rows[i] for i in batches[index]])
            yield {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def distil(
    model: Path, out: Path, data: Batches, steps: int, on_step: Callable[[Step], None] = lambda _: None
) -> Distilled:
    """Write the ternary model."""
    settings = Settings(steps, match=("encoder.layer.?.output.LayerNorm",), bfloat16=True)
    return distill_onnx(model, out, data, settings, batch_size=BATCH_TOKENS, on_step=on_step)


def cosine(model: Path, ternary: Path, folder: Path) -> float:
    """Return the mean cosine of the packed model's evaluation embeddings with the float ones."""
    packed = folder / "packed.onnx"
    assert bn.convert(ternary, packed, bn.Recipe(mode="lossless")).lossless
    feeds = minilm.tokenize(minilm.sentences()[1])
    expected, got = (bn.session(path).run(["sentence_embedding"], feeds)[0] for path in (model, packed))
    return float((expected * got).sum(axis=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="ONNX file to write")
    parser.add_argument("--steps", type=int, default=400, help="batches of 1024 tokens to learn from")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="more text to learn from")
    arguments = parser.parse_args()

    batches = Batches(texts(arguments.text))
    print(f"{len(batches.rows)} sentences of {sum(map(len, batches.rows))} tokens to learn from")
    started = time.monotonic()

    def show(step: Step) -> None:
        if step.number % 50 == 0 or step.number in (1, arguments.steps):
            print(
                f"step {step.number}: loss {step.output_loss:.4f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary, "minilm.onnx")
        onnx.save(minilm.build(), model)
        distil(model, arguments.out, batches, arguments.steps, show)
        reached = cosine(model, arguments.out, Path(temporary))
        print(f"{arguments.out}: packed, a cosine of {reached:.4f} on 200 other sentences")


if __name__ == "__main__":
    main()
