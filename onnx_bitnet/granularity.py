"""Granularity: what shares a scale, as a recipe names it."""

from __future__ import annotations

import re

from onnx_bitnet.errors import RecipeError

_LARGEST_BLOCK = 65536


def block_size(granularity: str) -> int:
    """Return B of `block:B` and `block:RxB`, and 0 for `auto`, `tensor` and `channel`."""
    return 0 if granularity in ("auto", "tensor", "channel") else _block(granularity)[1]


def stored_block_size(granularity: str, k: int) -> int:
    """Return the inputs of K that share a scale in a file; 0 for all."""
    size = block_size(granularity)
    return 0 if size >= k else size


def block_rows(granularity: str) -> int:
    """Return how many outputs share a block's scale: R of `block:RxB`, else 1."""
    return 1 if granularity in ("auto", "tensor", "channel") else _block(granularity)[0]


def _block(granularity: str) -> tuple[int, int]:
    match = re.fullmatch(r"block:(?:(\d+)x)?(\d+)", str(granularity))
    rows, size = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if not 16 <= size <= _LARGEST_BLOCK or size % 16 or not 1 <= rows <= _LARGEST_BLOCK // size:
        raise RecipeError(
            f"granularity {granularity!r} is none of auto, tensor, channel, block:B or block:RxB with B a "
            f"multiple of 16 and at most {_LARGEST_BLOCK} weights in a block"
        )
    return rows, size
