"""Random feeds, made from the types of a model's inputs when there is no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_bitnet.arguments import is_whole
from onnx_bitnet.data.inputs import Batch, Input, show_shape
from onnx_bitnet.errors import DataError

# Enough rows to make a mean of, few enough to be quick with a language model.
BATCHES = 4
_BATCH_SIZE = 2
_OTHER_SIZE = 16

# What indices may pass through on their way to a lookup, and what a table may with its rows as they are.
_INDICES_PASS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten")
_TABLES_PASS = ("Cast", "Identity", "DequantizeLinear")


def random_feeds(
    graph: ir.Graph, inputs: Sequence[Input], seed: int, dims: Mapping[str, int]
) -> tuple[str, Callable[[], Iterator[Batch]]]:
    """Return a description of random feeds, and what yields them: the same ones each time.

    Floats are standard normal, booleans true. An input whose name has `mask` in it is all ones; an integer
    one with `position` counts up along its last axis; one that looks rows up in a constant table has random
    legal indices; other integers are 0 or 1.

    Args:
        graph: the model's graph, where the tables are.
        inputs: what the model expects; the optional ones are not fed.
        seed: decides everything random.
        dims: sizes of symbolic dimensions; otherwise 2 for a first axis or a name with `batch` in it and 16
            for others. A symbol such as `past + 1` is the sum of its terms.

    Raises:
        DataError: a name in dims does not exist, or an input cannot be made up.
    """
    inputs = [item for item in inputs if item.required]
    sizes = _sizes(inputs, dims)
    shapes = {item.name: _shape(item, sizes) for item in inputs}
    rows = {value.name: _table_rows(value) for value in graph.inputs}

    def batches() -> Iterator[Batch]:
        for index in range(BATCHES):
            rng = np.random.default_rng((seed, index))
            yield {item.name: _made(item, shapes[item.name], rows[item.name], rng) for item in inputs}

    made = ", ".join(f"{item.name} {item.dtype} {show_shape(shapes[item.name])}" for item in inputs)
    return f"{BATCHES} batches of random feeds (seed {seed}): {made}", batches


def _sizes(inputs: Sequence[Input], dims: Mapping[str, int]) -> dict[str, int]:
    """Return a size for every symbolic dimension."""
    sizes: dict[str, int] = {}
    for item in inputs:
        for axis, symbol in enumerate(item.shape or ()):
            if isinstance(symbol, str):
                name = symbol.lower()
                batch = "batch" in name or (axis == 0 and "seq" not in name)
                sizes[symbol] = min(sizes.get(symbol, _OTHER_SIZE), _BATCH_SIZE if batch else _OTHER_SIZE)
    for name, size in dims.items():
        if name not in sizes:
            raise DataError(
                f"dims: the model has no symbolic dimension {name!r}; it has {', '.join(sizes) or 'none'}"
            )
        if not is_whole(size, 1):
            raise DataError(f"dims: {name} = {size!r} leaves nothing to feed; give at least 1")
    sizes |= dims
    for symbol in [symbol for symbol in sizes if symbol not in dims]:
        terms = [term.strip() for term in symbol.split("+")]
        if len(terms) > 1 and all(term.isdigit() or term in sizes for term in terms):
            sizes[symbol] = sum(int(term) if term.isdigit() else sizes[term] for term in terms)
    return sizes


def _shape(item: Input, sizes: Mapping[str, int]) -> tuple[int, ...]:
    if item.dtype is None or item.dtype.hasobject or item.shape is None:
        raise DataError(f"input {item.name!r} is {item}: no random feeds can be made for it; give data")
    return tuple(sizes[size] if isinstance(size, str) else size for size in item.shape)


def _table_rows(ids: ir.Value) -> int | None:
    """Return the rows of the smallest constant table that these indices look up, None if there is none."""
    found: list[int | None] = []
    for node, index in ids.uses():
        if node.op_type == "Gather" and index == 1:
            found.extend(_table_shape(node.inputs[0])[node.attributes.get_int("axis", 0) :][:1])
        elif node.op_type in _INDICES_PASS and index == 0:
            found.append(_table_rows(node.outputs[0]))
    return min((rows for rows in found if rows), default=None)


def _table_shape(table: ir.Value | None) -> tuple[int, ...]:
    """Return the shape of a constant, () if it is none."""
    while table is not None:
        tensor = ir.convenience.get_const_tensor(table)
        if tensor is not None:
            return tuple(tensor.shape.numpy())
        node = table.producer()
        table = node.inputs[0] if node is not None and node.op_type in _TABLES_PASS else None
    return ()


def _made(item: Input, shape: tuple[int, ...], rows: int | None, rng: np.random.Generator) -> np.ndarray:
    try:
        return _array(item, shape, rows, rng)
    except (MemoryError, OverflowError, ValueError):  # what NumPy says of shapes that are too large
        raise DataError(
            f"input {item.name!r}: random feeds of shape {show_shape(shape)} do not fit into memory; give "
            "smaller dims"
        ) from None


def _array(item: Input, shape: tuple[int, ...], rows: int | None, rng: np.random.Generator) -> np.ndarray:
    assert item.dtype is not None
    name = item.name.lower()
    if item.dtype.kind == "b" or "mask" in name:
        return np.ones(shape, item.dtype)
    if item.dtype.kind not in "iu":
        return np.asarray(rng.standard_normal(shape)).astype(item.dtype)
    if "position" in name:
        return _positions(shape, rows).astype(item.dtype)
    return np.asarray(rng.integers(0, rows or 2, shape)).astype(item.dtype)


def _positions(shape: tuple[int, ...], rows: int | None) -> np.ndarray:
    if not shape:
        return np.zeros((), np.int64)
    counted = np.arange(shape[-1])
    return np.broadcast_to(counted % rows if rows else counted, shape)
