"""What the linear layers of a model read: each value once, with the layers that share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_bitnet.data.padding import counted
from onnx_bitnet.rewrite.records import Linear, Refusal, Reshaping

INSIDE = "inside a subgraph or function, whose values are out of reach"
OUT_OF_REACH = f"it is {INSIDE}"


@dataclass(frozen=True)
class Source:
    """A value of the main graph that linear layers read, seen in one way.

    Args:
        value: its name.
        before: how it is turned so that its last axis is K, see rewrite.records.Linear.
        k: K.
        layers: names of the layers, in graph order.
    """

    value: str
    before: tuple[Reshaping, ...]
    k: int
    layers: tuple[str, ...]

    def rows(self, array: np.ndarray, there: np.ndarray | None = None) -> np.ndarray:
        """Return the value's array as float32 (rows, K), contiguous.

        Args:
            array: of one batch.
            there: where the batch has tokens, see padding.py; rows of padding are left out.

        Raises:
            ValueError: the array does not have K inputs.
        """
        for reshaping in self.before:
            array = _reshaped(array, reshaping)
        if array.ndim == 0 or array.shape[-1] != self.k:
            raise ValueError(f"has shape {list(array.shape)}, its layers read {self.k} inputs")
        rows = np.ascontiguousarray(array, np.float32).reshape(-1, self.k)
        return counted(rows, array.shape[:-1], there)


def _reshaped(array: np.ndarray, reshaping: Reshaping) -> np.ndarray:
    match reshaping.op_type:
        case "Transpose":
            return array.transpose(reshaping.value)
        case "Unsqueeze":
            return np.expand_dims(array, reshaping.value)
        case _:
            sizes = (array.shape[axis] if size == 0 else size for axis, size in enumerate(reshaping.value))
            return array.reshape(tuple(sizes))


def find_sources(
    found: Sequence[Linear | Refusal], graph: ir.Graph
) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """Return the sources in graph order, and the names of the layers that have none within reach.

    Args:
        found: what `scan` found.
        graph: the main graph.
    """
    shared: dict[tuple[str, tuple[Reshaping, ...], int], list[str]] = {}
    unreachable = []
    for linear in found:
        if isinstance(linear, Refusal):
            continue
        if linear.node.graph is not graph:
            unreachable.append(linear.name)
            continue
        key = (str(linear.x.name), linear.before, linear.weight.k)
        shared.setdefault(key, []).append(linear.name)
    return tuple(Source(*key, tuple(layers)) for key, layers in shared.items()), tuple(unreachable)
