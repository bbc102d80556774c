"""Calibrate: run the float model over data and collect statistics of what each linear layer reads."""

from __future__ import annotations

import dataclasses
import math
import mmap
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_bitnet import files
from onnx_bitnet.arguments import check_threads, check_whole
from onnx_bitnet.calibration.activations import Collector, LayerStatistics
from onnx_bitnet.calibration.calibration import Calibration
from onnx_bitnet.calibration.sources import OUT_OF_REACH, Source, find_sources
from onnx_bitnet.data.feeds import open_feeds
from onnx_bitnet.data.inputs import Batch
from onnx_bitnet.data.padding import USUAL, check_mask, tokens
from onnx_bitnet.data.replay import Replay, replayed
from onnx_bitnet.errors import DataError, ModelError
from onnx_bitnet.report import Progress
from onnx_bitnet.rewrite.scan import prepare, scan
from onnx_bitnet.runner import Runner, start, start_part
from onnx_bitnet.spill import give_back
from onnx_bitnet.taps import values

_GIB = 1 << 30


def calibrate(
    model: str | Path,
    data: object = None,
    *,
    second_moments: bool = True,
    max_samples: int | None = None,
    max_memory: int = _GIB,
    mask: str = USUAL,
    threads: int = 0,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run a float model over data and collect statistics of what each linear layer reads.

    Each pass over the data serves as many layers as `max_memory` allows; layers that read the same value
    share one statistic. Every batch is checked against the model's inputs before it is run.

    Args:
        model: an ONNX model.
        data: see `onnx_bitnet.data.feeds.open_feeds`; None for random feeds.
        second_moments: collect X^T X, too, which error compensation needs: 4 K^2 bytes for each value read.
        max_samples: stop after the batch in which this many samples are reached: rows along the first axis
            of the first input. None for all data.
        max_memory: bytes that the statistics of one pass and the activations they are taken from may have
            at a time, beside the model in its session; a value that needs more alone has a pass of its own.
            The matrices of finished passes are in a temporary file, mapped into memory.
        mask: name of the input (batch, sequence) that is 0 where a batch is filled up: what layers read there
            is left out; `none` counts all rows.
        threads: for onnxruntime, 0 for its own choice.
        seed: of random feeds.
        dims: sizes of symbolic dimensions in random feeds, by name.
        progress: called as progress(done, total, what) before each batch and at the end; total is 0 when the
            number of batches is not known.

    Returns:
        The statistics. Layers out of reach, inside of subgraphs and functions, are named in its notes.

    Raises:
        ModelError: the model cannot be read or run, or computes NaN or infinity.
        DataError: the data cannot be read or does not fit.
        RuntimeMissing: onnxruntime cannot be used.
        RecipeError: max_memory, threads or the seed make no sense.
    """
    check_whole("max_memory", max_memory, 1)
    check_threads(threads)
    file = files.read(model)
    prepare(file.model)
    sources, unreachable = find_sources(scan(file.model), file.model.graph)
    notes = tuple(f"layer {name!r} has no statistics: {OUT_OF_REACH}" for name in unreachable)
    with replayed(open_feeds(file.model, data, seed=seed, dims=dims), max_samples) as feeds:
        check_mask(mask, feeds.feeds.inputs)
        passes = _Passes(file, feeds, threads, second_moments, max_memory, mask)
        statistics = passes.run(sources, progress)
        missing = [name for source in sources for name in source.layers if source not in statistics]
        notes += tuple(f"layer {name!r} has no statistics: it was given no rows" for name in missing)
        layers = {
            name: statistics[source] for source in sources if source in statistics for name in source.layers
        }
        return Calibration(str(model), feeds.description, feeds.random, feeds.samples, layers, notes)


class _Passes:
    """Runs of a model over the same feeds, each for some of the sources."""

    def __init__(
        self,
        file: files.ModelFile,
        feeds: Replay,
        threads: int,
        second_moments: bool,
        max_memory: int,
        mask: str,
    ) -> None:
        self._file, self._feeds, self._threads = file, feeds, threads
        self._second_moments, self._max_memory, self._mask = second_moments, max_memory, mask

    def run(self, sources: Sequence[Source], progress: Progress | None) -> dict[Source, LayerStatistics]:
        """Return the statistics of the sources that got rows."""
        if not sources:
            return {}
        first = next(iter(self._feeds))
        sizes = self._sizes(sources, first)
        groups = list(_portions(sources, sizes, self._max_memory))
        found: dict[Source, LayerStatistics] = {}
        runner = None
        for number, group in enumerate(groups):
            collectors = {source: Collector(source.k, second_moment=self._second_moments) for source in group}
            names = [source.value for source in group]
            del runner  # one session at a time: each has the weights in memory
            runner = start_part(self._file.model, self._file.path, names, self._threads)
            for index, batch in enumerate(self._feeds):
                if progress is not None:
                    total = self._feeds.count * len(groups)
                    what = f"batch {index}, pass {number + 1} of {len(groups)}"
                    progress(number * self._feeds.count + index if total else index, total, what)
                grown = _elements(batch) / max(1, _elements(first))
                needs = {source: math.ceil(size * grown) for source, size in sizes.items()}
                label, there = self._feeds.labels[index], tokens(batch, self._mask)
                for part in _portions(group, needs, self._max_memory):
                    _observe(runner, part, batch, collectors, there, label)
            for source, collector in collectors.items():
                if collector.rows:
                    result = collector.result()
                    found[source] = result if len(groups) == 1 else _on_disk(result)
        if progress is not None:
            done = max(1, self._feeds.count * len(groups))
            progress(done, done, "done")
        return found

    def _sizes(self, sources: Sequence[Source], batch: Batch) -> dict[Source, int]:
        """Return the bytes that each source takes: the array, float32 rows of it, and the statistics."""
        names = list(dict.fromkeys(source.value for source in sources))
        model = files.read(self._file.path).model
        prepare(model)
        known = values(model)
        shapes = {name: ir.Node("", "Shape", [known[name]], name=f"{name}.shape") for name in names}
        for name, node in shapes.items():
            node.outputs[0].name = f"onnx_bitnet.shape/{name}"
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
            model.graph.append(node)
        model.graph.outputs[:] = [node.outputs[0] for node in shapes.values()]
        fetched = [str(node.outputs[0].name) for node in shapes.values()]
        got = start(model, self._file.path, self._threads).run(fetched, batch, "the first batch")
        elements = {name: math.prod(map(int, shape)) for name, shape in zip(names, got.values(), strict=True)}
        return {
            source: 2 * 4 * elements[source.value] + 2 * 4 * source.k**2 * self._second_moments
            for source in sources
        }


def observed(source: Source, array: np.ndarray, there: np.ndarray | None, label: str) -> np.ndarray:
    """Return the rows (rows, K) that a source has for one batch, whose value is `array`; see Source.rows.

    Raises:
        ModelError: the value does not have K inputs.
    """
    try:
        return source.rows(array, there)
    except ValueError as error:
        raise _of_model(source, label, str(error)) from None


def not_finite(source: Source, batch: Batch, label: str) -> DataError | ModelError:
    """Return the error that what a layer reads holds NaN or infinity: of the data if they do already."""
    for name, array in batch.items():
        numbers = array.dtype.kind not in "OSUbiu"  # that of bfloat16 is V
        if numbers and (np.isnan(array).any() or (name == source.value and np.isinf(array).any())):
            return DataError(
                f"{label}: input {name!r} holds NaN or infinity, with which layer {source.layers[0]!r} "
                "cannot be measured; leave the batch, or its rows that hold them, out"
            )
    return _of_model(source, label, "holds NaN or infinity")


def _of_model(source: Source, label: str, what: str) -> ModelError:
    return ModelError(
        f"layer {source.layers[0]!r} on {label}: its input {source.value!r} {what}; check model and data"
    )


def _on_disk(statistics: LayerStatistics) -> LayerStatistics:
    """Move the matrix to a file that vanishes with it."""
    if statistics.second_moment is None:
        return statistics
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, np.float32, "w+", shape=statistics.second_moment.shape)
        mapped[:] = statistics.second_moment
        mapped.flush()
        if isinstance(mapped.base, mmap.mmap):
            give_back(mapped.base)
    return dataclasses.replace(statistics, second_moment=mapped)


def _observe(
    runner: Runner | None,
    part: Sequence[Source],
    batch: Batch,
    collectors: Mapping[Source, Collector],
    there: np.ndarray | None,
    label: str,
) -> None:
    names = [name for name in dict.fromkeys(source.value for source in part) if name not in batch]
    got = batch | (runner.run(names, batch, label) if runner is not None and names else {})
    for source in part:
        rows = observed(source, got[source.value], there, label)
        try:
            collectors[source].add(rows)
        except ValueError:
            raise not_finite(source, batch, label) from None


def _portions(
    sources: Sequence[Source], sizes: Mapping[Source, int], max_memory: int
) -> Iterator[tuple[Source, ...]]:
    """Cut the sources into runs that need max_memory bytes at most, or are one source."""
    portion: list[Source] = []
    for source in sources:
        if portion and sum(sizes[item] for item in portion) + sizes[source] > max_memory:
            yield tuple(portion)
            portion = []
        portion.append(source)
    yield tuple(portion)


def _elements(batch: Batch) -> int:
    return sum(array.size for array in batch.values())
