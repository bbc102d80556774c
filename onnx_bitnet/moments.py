"""Second moments of what a layer reads, in the float model and in the one that is being converted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_bitnet.activations import LayerStatistics
from onnx_bitnet.errors import ModelError
from onnx_bitnet.replay import Replay
from onnx_bitnet.runner import Runner, start
from onnx_bitnet.sources import Source


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows x that a layer reads in the converted model and rows f that it reads in the float model.

    Args:
        rows: how many.
        second: float32 (K, K), sum of x x^T.
        cross: float32 (K, K), sum of x f^T; None where x and f are the same.
        mean: float64 (K,), of x.
        float_mean: float64 (K,), of f.
    """

    rows: int
    second: np.ndarray
    cross: np.ndarray | None
    mean: np.ndarray
    float_mean: np.ndarray

    @classmethod
    def of(cls, statistics: LayerStatistics) -> Moments | None:
        """Take those of the float model alone; None if the matrix was not collected."""
        if statistics.second_moment is None:
            return None
        mean = statistics.channel_mean.astype(np.float64)
        return cls(statistics.rows, statistics.second_moment, None, mean, mean)


def collect(
    converted: ir.Model, original: ir.Model | None, path: Path, source: Source, feeds: Replay, threads: int
) -> Moments:
    """Run the models up to a source over all feeds.

    Args:
        converted: the model as it is by now.
        original: the float model; None while the two do not differ before the source.
        path: where they come from.
        source: what to look at.
        feeds: the data.
        threads: for onnxruntime, 0 for its own choice.

    Raises:
        ModelError: a model cannot be run, or computes NaN or infinity.
    """
    ours = fetching(converted, path, [source.value], threads)
    theirs = fetching(original, path, [source.value], threads) if original is not None else None
    k = source.k
    second = np.zeros((k, k), np.float32)
    cross = np.zeros((k, k), np.float32) if theirs is not None else None
    sums, rows = np.zeros((2, k)), 0
    for index, batch in enumerate(feeds):
        label = f"batch {index} of {feeds.description}"
        x = source_rows(source, batch, ours, label)
        f = x if theirs is None else source_rows(source, batch, theirs, label)
        second += x.T @ x
        if cross is not None:
            cross += x.T @ f
        sums += [x.sum(axis=0, dtype=np.float64), f.sum(axis=0, dtype=np.float64)]
        rows += x.shape[0]
    if not np.isfinite(second).all() or not np.isfinite(sums).all():
        raise ModelError(f"{path}: the input {source.value!r} of layer {source.layers[0]!r} holds NaN or infinity")
    return Moments(rows, second, cross, *(sums / max(rows, 1)))


def source_rows(
    source: Source, batch: dict[str, np.ndarray], runner: Runner | None, label: str
) -> np.ndarray:
    """Return the rows (rows, K) of a source for one batch."""
    got = batch if runner is None else runner.run([source.value], batch, label)
    try:
        return source.rows(got[source.value])
    except ValueError as error:
        raise ModelError(
            f"layer {source.layers[0]!r} on {label}: its input {source.value!r} {error}; check the data"
        ) from None


def fetching(model: ir.Model, path: Path, names: Sequence[str], threads: int) -> Runner | None:
    """Return the part of a model that computes some values in a session; None if they all are fed."""
    fed = [str(value.name) for value in model.graph.inputs]
    wanted = [name for name in dict.fromkeys(names) if name not in fed]
    if not wanted:
        return None
    graph = ir.convenience.extract(model.graph, fed, wanted)
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    return start(part, path, threads)
