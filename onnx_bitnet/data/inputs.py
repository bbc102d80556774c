"""What a model expects of its inputs, and whether a batch fits."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_bitnet.errors import DataError, one_line

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Input:
    """What a model expects of one of its inputs.

    Args:
        name: name of the input.
        dtype: element type, `object` for strings; None if the input is no tensor.
        shape: a size or the name of a symbolic dimension for each axis; None if the rank is free. A dimension
            without a name is called `<input>:<axis>`.
        required: False for an initializer that a caller may override.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str, ...] | None
    required: bool = True

    def __str__(self) -> str:
        return f"{self.dtype} {show_shape(self.shape)}"


def model_inputs(model: ir.Model) -> tuple[Input, ...]:
    """Return what the model expects of its inputs, in its order."""
    return tuple(_input(value) for value in model.graph.inputs)


def _input(value: ir.Value) -> Input:
    name = value.name or ""
    dtype = None
    if isinstance(value.type, ir.TensorType) and value.dtype is not None:
        dtype = np.dtype(object) if value.dtype == ir.DataType.STRING else value.dtype.numpy()
    shape = None
    if value.shape is not None:
        shape = tuple(
            size if isinstance(size, int) else size.value or f"{name}:{axis}"
            for axis, size in enumerate(value.shape)
        )
    return Input(name, dtype, shape, required=not value.is_initializer())


def check_batch(batch: object, inputs: tuple[Input, ...], label: str) -> Batch:
    """Return the batch as arrays that fit the inputs.

    Raises:
        DataError: it is no dict, a name is unknown or missing, or an array has a wrong type or shape.
    """
    if not isinstance(batch, Mapping):
        raise DataError(
            f"{label}: a {type(batch).__name__}, not a dict of {{input name: array}}; make it one"
        )
    known = {item.name: item for item in inputs}
    names = ", ".join(item.name for item in inputs if item.required)
    for name in batch:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(f"{label}: the model has no input {name!r}; {hint}its inputs are {names}")
    for item in inputs:
        if item.required and item.name not in batch:
            raise DataError(f"{label}: input {item.name!r} is missing; add it as {item}")
    return {name: _check_array(value, known[name], label) for name, value in batch.items()}


def _check_array(value: object, item: Input, label: str) -> np.ndarray:
    where = f"{label}: input {item.name!r}"
    if item.dtype is None:
        raise DataError(f"{where} of the model is no tensor; only models with tensor inputs can be fed")
    try:
        array = np.asarray(value)
    except Exception as error:  # frameworks raise what they like, for example for a tensor on a GPU
        raise DataError(
            f"{where}: cannot be made a NumPy array: {one_line(error)}; convert it first"
        ) from None
    if item.dtype.hasobject and array.dtype.kind in "US":
        array = array.astype(object)
    if array.dtype != item.dtype:
        raise DataError(
            f"{where} is {array.dtype}, the model takes {item.dtype}; use .astype({str(item.dtype)!r})"
        )
    if item.shape is not None and not _fits(array.shape, item.shape):
        raise DataError(
            f"{where} has shape {show_shape(array.shape)}, the model takes {show_shape(item.shape)}; "
            "reshape, pad or cut it"
        )
    return array


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, wanted, strict=True)
    )


def show_shape(shape: tuple[int | str, ...] | None) -> str:
    """Return a shape as `[batch, 3]`, or `of any shape`."""
    return "of any shape" if shape is None else f"[{', '.join(map(str, shape))}]"
