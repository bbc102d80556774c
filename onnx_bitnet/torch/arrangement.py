"""ONNX operators that move values about without computing with them, as torch functions.

Each takes the node, for its attributes, and its inputs; what newer opsets pass as inputs and older ones as
attributes may be either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional


def ints(node: ir.Node, name: str, given: Tensor | None = None) -> list[int] | None:
    """Return numbers that are an input or else an attribute, None if they are neither."""
    if given is not None:
        return [int(i) for i in given.flatten()]
    values = node.attributes.get_ints(name)
    return None if values is None else list(values)


def cast(node: ir.Node, x: Tensor, *_: Tensor) -> Tensor:
    """Cast; all floats are float32 here."""
    to = ir.DataType(node.attributes.get_int("to", int(ir.DataType.FLOAT)))
    return x.float() if to.is_floating_point() else x.to(getattr(torch, to.numpy().name))


def concat(node: ir.Node, *parts: Tensor) -> Tensor:
    """Concat."""
    return torch.cat(parts, node.attributes.get_int("axis", 1))


def expand(_: ir.Node, x: Tensor, shape: Tensor) -> Tensor:
    """Expand: both ways, as broadcasting does."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(int(i) for i in shape)))


def flatten(node: ir.Node, x: Tensor) -> Tensor:
    """Flatten to a matrix."""
    axis = node.attributes.get_int("axis", 1)
    rows = x.shape[:axis].numel()
    return x.reshape(rows, -1) if x.numel() else x.reshape(rows, x.shape[axis:].numel())


def gather(node: ir.Node, x: Tensor, indices: Tensor) -> Tensor:
    """Gather slices of x; negative indices count from the end."""
    axis = node.attributes.get_int("axis", 0) % x.ndim
    found = x.index_select(axis, indices.flatten() % x.shape[axis])
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_elements(node: ir.Node, x: Tensor, indices: Tensor) -> Tensor:
    """GatherElements."""
    axis = node.attributes.get_int("axis", 0) % x.ndim
    return x.gather(axis, indices % x.shape[axis])


def identity(_: ir.Node, x: Tensor, *__: Tensor) -> Tensor:
    """Identity, and Dropout as it is when nothing is trained."""
    return x


def pad(node: ir.Node, x: Tensor, pads: Tensor | None = None, *rest: Tensor | None) -> Tensor:
    """Pad: begins of all axes, then ends; torch wants pairs, last axis first."""
    value, axes = (*rest, None, None)[:2]
    amounts = ints(node, "pads", pads) or []
    half = len(amounts) // 2
    begin, end = [0] * x.ndim, [0] * x.ndim
    for axis, first, last in zip(
        ints(node, "", axes) or range(half), amounts[:half], amounts[half:], strict=True
    ):
        begin[axis], end[axis] = first, last
    pairs = [amount for axis in reversed(range(x.ndim)) for amount in (begin[axis], end[axis])]
    mode = node.attributes.get_string("mode", "constant")
    if mode == "constant":
        filling = node.attributes.get_float("value", 0.0) if value is None else float(value)
        return functional.pad(x, pairs, value=filling)
    while pairs[-2:] == [0, 0]:
        pairs = pairs[:-2]
    return functional.pad(x, pairs, {"edge": "replicate", "wrap": "circular"}.get(str(mode), str(mode)))


def reshape(node: ir.Node, x: Tensor, shape: Tensor | None = None) -> Tensor:
    """Reshape: 0 copies a dimension unless allowzero, -1 is what is left."""
    target = ints(node, "shape", shape) or []
    if not node.attributes.get_int("allowzero", 0):
        target = [x.shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    return x.reshape(target)


def slices(node: ir.Node, x: Tensor, *given: Tensor | None) -> Tensor:
    """Slice: starts, ends, axes and steps, which may be negative."""
    names = ("starts", "ends", "axes", "steps")
    starts, ends, axes, steps = (
        ints(node, name, item) for name, item in zip(names, (*given, *[None] * (4 - len(given))), strict=True)
    )
    count = len(starts or [])
    for start, end, axis, step in zip(
        starts or [], ends or [], axes or range(count), steps or [1] * count, strict=True
    ):
        if step > 0:
            x = x[(*[slice(None)] * (axis % x.ndim), slice(start, end, step))]
        else:
            # torch has no negative steps; an end before the first element is a very negative number in ONNX
            size = x.shape[axis]
            chosen = range(size)[start : None if end < -size else end : step]
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x


def split(node: ir.Node, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    """Split into given sizes, or into as many parts as there are outputs, the last one smaller."""
    axis = node.attributes.get_int("axis", 0)
    given = ints(node, "split", sizes)
    return x.split(given or -(-x.shape[axis] // len(node.outputs)), axis)


def squeeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Squeeze some axes, or all of size 1."""
    given = ints(node, "axes", axes)
    return x.squeeze() if given is None else x.squeeze(tuple(given))


def tile(_: ir.Node, x: Tensor, repeats: Tensor) -> Tensor:
    """Tile."""
    return x.tile(tuple(int(i) for i in repeats))


def transpose(node: ir.Node, x: Tensor) -> Tensor:
    """Transpose, by default to the opposite order."""
    return x.permute(ints(node, "perm") or list(range(x.ndim))[::-1])


def unsqueeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Unsqueeze: axes count in the result."""
    given = ints(node, "axes", axes) or []
    for axis in sorted(axis % (x.ndim + len(given)) for axis in given):
        x = x.unsqueeze(axis)
    return x


def where(_: ir.Node, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Where."""
    return torch.where(condition, x, y)


ARRANGEMENT: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "Cast": cast,
        "Concat": concat,
        "Dropout": identity,
        "Expand": expand,
        "Flatten": flatten,
        "Gather": gather,
        "GatherElements": gather_elements,
        "Identity": identity,
        "Pad": pad,
        "Reshape": reshape,
        "Slice": slices,
        "Split": split,
        "Squeeze": squeeze,
        "Tile": tile,
        "Transpose": transpose,
        "Unsqueeze": unsqueeze,
        "Where": where,
    }
)
"""Standard operator -> function."""
