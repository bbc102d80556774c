"""Second moments of what a layer reads, in the float model and in the one that is being converted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_bitnet import files
from onnx_bitnet.activations import LayerStatistics
from onnx_bitnet.calibrate import Calibration, calibrate, fetching, observed
from onnx_bitnet.compensate import Moments
from onnx_bitnet.decide import may_use_moments, needs_calibration, needs_moments
from onnx_bitnet.errors import DataError, ModelError, RecipeError
from onnx_bitnet.feeds import open_feeds
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.replay import Replay, replayed
from onnx_bitnet.rewrite.scan import prepare, scan
from onnx_bitnet.sources import Source, find_sources


class Inputs:
    """What the layers of a model read, measured when it is asked for, while the model is being converted.

    Args:
        model: the model that is converted in place.
        path: the file it was read from.
        sources: what its layers read.
        data: feeds; or a calibration, which knows the float model alone.
        threads: for onnxruntime, 0 for its own choice.
    """

    def __init__(
        self, model: ir.Model, path: Path, sources: Sequence[Source], data: Replay | Calibration, threads: int
    ) -> None:
        self._model, self._path, self._data, self._threads = model, path, data, threads
        self._original: ir.Model | None = None
        self._source_of = {name: source for source in sources for name in source.layers}
        self._last: tuple[Source, Moments] | None = None

    def reach(self, layer: str) -> bool:
        """Return whether a layer can be measured."""
        if isinstance(self._data, Calibration):
            return layer in self._data.layers
        return layer in self._source_of

    def replaced(self) -> None:
        """Tell that a layer was replaced: from now on the models differ."""
        if self._original is None and not isinstance(self._data, Calibration):
            self._original = files.read(self._path).model
            prepare(self._original)

    def of(self, layer: str) -> Moments:
        """Return the moments of what a layer within reach reads; measured once for all that read the same.

        Raises:
            DataError: the calibration lacks second moments.
            ModelError: a model cannot be run, or computes NaN or infinity.
        """
        if isinstance(self._data, Calibration):
            return _known(layer, self._data.layers[layer])
        source = self._source_of[layer]
        if self._last is None or self._last[0] is not source:
            self._last = None  # one set of matrices at a time
            moments = collect(self._model, self._original, self._path, source, self._data, self._threads)
            self._last = source, moments
        return self._last[1]


@contextmanager
def measuring(
    file: files.ModelFile, recipe: Recipe, data: object
) -> Iterator[tuple[Calibration | None, Inputs | None]]:
    """Prepare what a recipe needs to know about activations: a calibration, a means to measure, or neither.

    Raises:
        RecipeError: it needs data, and there is none.
        DataError: the data cannot be read or does not fit.
    """
    moments = needs_moments(recipe) or (data is not None and may_use_moments(recipe))
    if not (moments or needs_calibration(recipe)):
        yield None, None
        return
    if data is None:
        raise RecipeError(
            "static activation scales and the roundings gptq and weighted need calibration data; "
            "give feeds or a Calibration (data)"
        )
    if isinstance(data, Calibration):
        found = find_sources(scan(file.model), file.model.graph)[0] if moments else ()
        yield data, Inputs(file.model, file.path, found, data, 0) if moments else None
        return
    with replayed(open_feeds(file.model, data)) as feeds:
        calibration = None
        if needs_calibration(recipe):
            calibration = calibrate(file.path, feeds, second_moments=False)
        if not moments:
            yield calibration, None
            return
        sources, _ = find_sources(scan(file.model), file.model.graph)
        yield calibration, Inputs(file.model, file.path, sources, feeds, 0)


def _known(layer: str, statistics: LayerStatistics) -> Moments:
    if statistics.second_moment is None:
        raise DataError(
            f"layer {layer!r}: the calibration lacks second moments; make it with them, or give feeds"
        )
    mean = statistics.channel_mean.astype(np.float64)
    return Moments(statistics.rows, statistics.second_moment, None, mean, mean)


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
        x = observed(source, batch, ours, label)
        f = x if original is None else observed(source, batch, theirs, label)
        second += x.T @ x
        if cross is not None:
            cross += x.T @ f
        sums += [x.sum(axis=0, dtype=np.float64), f.sum(axis=0, dtype=np.float64)]
        rows += x.shape[0]
    if not np.isfinite(second).all() or not np.isfinite(sums).all():
        raise ModelError(
            f"{path}: the input {source.value!r} of layer {source.layers[0]!r} holds NaN or infinity"
        )
    return Moments(rows, second, cross, *(sums / max(rows, 1)))
