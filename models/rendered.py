"""Draws text: input for models that read images."""

from __future__ import annotations

import re

import numpy as np
from minilm import sentences

DPI = 100


def drawn(text: str, height: int, width: int, size: float, left: float = 8) -> np.ndarray:
    """Return black text on white, float32 (height, width) from 0 to 1, in matplotlib's DejaVu Sans.

    Args:
        text: one or several lines, which begin at the top; one line is in the middle.
        height: of the image.
        width: of the image; text beyond it is cut off.
        size: of the letters in pixels, from the highest to the lowest.
        left: pixels before the text.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    several = "\n" in text
    figure.text(
        left / width,
        1 - left / height if several else 0.5,
        text,
        fontsize=size * 72 / DPI,
        va="top" if several else "center_baseline",
        parse_math=False,
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].mean(axis=-1, dtype=np.float32) / 255


def texts(count: int, length: int, held_out: bool) -> list[str]:
    """Return lines of at most `length` characters, cut between words out of Python's reference text.

    Those held out are of other sentences than the others.
    """
    lines = [re.match(rf".{{1,{length}}}(?!\S)", sentence) for sentence in sentences()[held_out]]
    return [line.group() for line in lines if line is not None][:count]
