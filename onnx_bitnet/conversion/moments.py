"""Second moments of what a layer reads, in the float model and in the one that is being converted."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_bitnet import files
from onnx_bitnet.calibration.activations import LayerStatistics
from onnx_bitnet.calibration.calibrate import calibrate, not_finite, observed
from onnx_bitnet.calibration.calibration import Calibration
from onnx_bitnet.calibration.sources import Source, find_sources
from onnx_bitnet.conversion.decide import may_use_moments, needs_calibration, needs_moments
from onnx_bitnet.conversion.stages import Stages
from onnx_bitnet.conversion.twin import Twin
from onnx_bitnet.data.feeds import open_feeds
from onnx_bitnet.data.padding import USUAL, check_mask, tokens
from onnx_bitnet.data.replay import Replay, replayed
from onnx_bitnet.errors import DataError, NotFinite, RecipeError
from onnx_bitnet.quantization.compensate import Moments
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.rewrite.scan import prepare, scan


class Inputs:
    """What the layers of a model read, measured when it is asked for, while the model is being converted.

    Layers are to be asked for in the order of the sources, and replaced after that.

    Args:
        model: the model that is converted in place.
        path: the file it was read from.
        sources: what its layers read.
        data: feeds; or a calibration, which knows the float model alone.
        threads: for onnxruntime, 0 for its own choice.
        folder: for what runs leave behind; none is needed with a calibration.
        mask: as in `calibrate`.
    """

    def __init__(
        self,
        model: ir.Model,
        path: Path,
        sources: Sequence[Source],
        data: Replay | Calibration,
        threads: int,
        folder: Path | None = None,
        mask: str = USUAL,
    ) -> None:
        self._path, self._data, self._threads, self._folder = path, data, threads, folder
        self._source_of = {name: source for source in sources for name in source.layers}
        self._sources = list(sources)
        self._last: tuple[Source, Moments] | None = None
        self._theirs: Stages | None = None
        if not isinstance(data, Calibration):
            self._ours = self._stages(model, "converted")
            self._there = [tokens(batch, mask) for batch in data]

    def _stages(self, model: ir.Model, name: str) -> Stages:
        assert self._folder is not None
        assert isinstance(self._data, Replay)
        folder = self._folder / name
        folder.mkdir()
        return Stages(model, self._path, self._data, self._threads, folder)

    def reach(self, layer: str) -> bool:
        """Return whether a layer can be measured."""
        known = self._data.layers if isinstance(self._data, Calibration) else self._source_of
        return layer in known

    def replaced(self) -> None:
        """Tell that a layer was replaced: from now on the models differ."""
        if self._theirs is None and not isinstance(self._data, Calibration):
            original = files.read(self._path).model
            prepare(original)
            self._theirs = self._stages(original, "float")

    def of(self, layer: str) -> Moments:
        """Return the moments of what a layer within reach reads; measured once for all that read the same.

        Raises:
            DataError: the calibration lacks second moments.
            NotFinite: the model computes NaN or infinity because of what was replaced.
            ModelError: a model cannot be run, or computes NaN or infinity.
        """
        if isinstance(self._data, Calibration):
            return moments_of(layer, self._data.layers[layer])
        source = self._source_of[layer]
        if self._last is None or self._last[0] is not source:
            self._last = None  # one set of matrices at a time
            self._last = source, self._collect(source, self._data)
        return self._last[1]

    def _collect(self, source: Source, data: Replay) -> Moments:
        """Run the models on to a source over all feeds."""
        later = [item.value for item in self._sources[self._sources.index(source) + 1 :]]
        ours = self._ours.run(source.value, later)
        theirs = self._theirs.run(source.value, later) if self._theirs is not None else None
        k = source.k
        second = np.zeros((k, k), np.float32)
        cross = np.zeros((k, k), np.float32) if theirs is not None else None
        sums, rows = np.zeros((2, k)), 0
        for index, (array, there) in enumerate(zip(ours, self._there, strict=True)):
            label = data.labels[index]
            x = observed(source, array, there, label)
            f = x if theirs is None else observed(source, next(theirs), there, label)
            second += x.T @ x
            if cross is not None:
                cross += x.T @ f
            sums += [x.sum(axis=0, dtype=np.float64), f.sum(axis=0, dtype=np.float64)]
            if not np.isfinite(sums[1]).all():
                raise not_finite(source, next(itertools.islice(data, index, None)), label)
            rows += x.shape[0]
        if theirs is not None:
            next(theirs, None)  # so that it notes what it kept
        if not np.isfinite(second).all() or not np.isfinite(sums).all():
            raise NotFinite(
                f"{self._path}: the input {source.value!r} of layer {source.layers[0]!r} holds NaN or "
                "infinity once layers before it are packed; give those more bits, or keep them float"
            )
        return Moments(rows, second, cross, *(sums / max(rows, 1)))


@dataclass(frozen=True, eq=False)
class Known:
    """What there is to know about activations.

    Args:
        calibration: their statistics, if the recipe needs them or they were given.
        inputs: a means to measure moments, if the recipe needs them.
        given: the calibration if it is the user's, which may be that of another model.
        twin: the model that moments are measured in, if it is not the one that is converted.
    """

    calibration: Calibration | None = None
    inputs: Inputs | None = None
    given: Calibration | None = None
    twin: Twin | None = None

    @property
    def something(self) -> bool:
        """Whether there is."""
        return self.calibration is not None or self.inputs is not None


@contextmanager
def measuring(file: files.ModelFile, recipe: Recipe, data: object) -> Iterator[Known]:
    """Prepare what a recipe needs to know about activations, which may be nothing.

    Raises:
        RecipeError: it needs data, and there is none.
        DataError: the data cannot be read or does not fit.
    """
    moments = needs_moments(recipe) or (data is not None and may_use_moments(recipe))
    if not (moments or needs_calibration(recipe)):
        yield Known()
        return
    if data is None:
        raise RecipeError(
            "static activation scales and the roundings gptq and weighted need calibration data; "
            "give feeds or a Calibration (data)"
        )
    if isinstance(data, Calibration):
        found = find_sources(scan(file.model), file.model.graph)[0] if moments else ()
        yield Known(data, Inputs(file.model, file.path, found, data, 0) if moments else None, data)
        return
    with replayed(open_feeds(file.model, data)) as feeds:
        check_mask(recipe.mask, feeds.feeds.inputs)
        calibration = None
        if needs_calibration(recipe):
            calibration = calibrate(file.path, feeds.as_feeds(), second_moments=False, mask=recipe.mask)
        if not moments:
            yield Known(calibration)
            return
        sources, _ = find_sources(scan(file.model), file.model.graph)
        with tempfile.TemporaryDirectory() as folder:
            twin = None if recipe.target == "custom" else Twin(file.path, recipe)
            model = file.model if twin is None else twin.model
            inputs = Inputs(model, file.path, sources, feeds, 0, Path(folder), recipe.mask)
            yield Known(calibration, inputs, twin=twin)


def moments_of(layer: str, statistics: LayerStatistics) -> Moments:
    """Return the moments that a calibration has of a layer.

    Raises:
        DataError: it lacks second moments.
    """
    if statistics.second_moment is None:
        raise DataError(
            f"layer {layer!r}: the calibration lacks second moments; make it with them, or give feeds"
        )
    mean = statistics.channel_mean.astype(np.float64)
    return Moments(statistics.rows, statistics.second_moment, None, mean, mean)
