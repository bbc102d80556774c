"""Padding: which rows of activations belong to no token, by the mask among a model's inputs.

Batches of text are filled up to one length. What layers read at the places filled up is of no consequence
for the outputs, so it is none to calibrate by, and what they give there is none to judge by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_bitnet.data.inputs import Batch, Input
from onnx_bitnet.errors import DataError

USUAL, NONE = "attention_mask", "none"


def check_mask(mask: str, inputs: Sequence[Input]) -> None:
    """Check the name of a mask: an input's, NONE, or USUAL, which a model need not have.

    Raises:
        DataError: the model has no such input.
    """
    names = [item.name for item in inputs]
    if mask not in (USUAL, NONE, *names):
        raise DataError(
            f"mask {mask!r} is no input of the model; its inputs are {', '.join(names)}; {NONE!r} is for none"
        )


def tokens(batch: Batch, mask: str) -> np.ndarray | None:
    """Return where a batch has tokens: bool (batch, sequence), or None where all is to be counted.

    That is where the input `mask` is 1; one that is of another shape, or not of 0 and 1, says nothing.
    """
    given = batch.get(mask)
    if mask == NONE or given is None or given.ndim != 2:
        return None
    there = given == 1
    return None if there.all() or not (there | (given == 0)).all() else there


def counted(rows: np.ndarray, shape: tuple[int, ...], there: np.ndarray | None) -> np.ndarray:
    """Return the rows (rows, K) without those of padding.

    Args:
        rows: of a value.
        shape: of the value without its last axis. One that begins (batch, sequence), or is their product,
            goes with the mask; the rows of any other are all kept.
        there: see `tokens`.
    """
    if there is None:
        return rows
    if shape == (there.size,) or shape[:2] == there.shape:
        rows = rows[np.repeat(there.ravel(), rows.shape[0] // there.size)]
    return rows


def compared(array: np.ndarray, there: np.ndarray | None) -> np.ndarray:
    """Return what a value (..., N) has at tokens, as rows (rows, N); all of it, as it is, if all counts.

    One number for each token, shaped as the mask, becomes a vector of those at tokens.
    """
    if there is None or array.size == 0:
        return array
    if array.shape == there.shape:
        vector: np.ndarray = array[there]
        return vector
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array
    left = counted(rows, array.shape[:-1], there)
    return array if left is rows else left
