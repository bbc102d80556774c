"""Search the frontier of a model for the smallest choice that reaches the goals of a recipe."""

from __future__ import annotations

import dataclasses
import glob
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from onnx_bitnet.calibrate import Calibration
from onnx_bitnet.candidates import KEEP, Trial, spec_of
from onnx_bitnet.convert import convert, plan
from onnx_bitnet.errors import RecipeError
from onnx_bitnet.feeds import Feeds
from onnx_bitnet.frontier import Option, Point, frontier, within
from onnx_bitnet.metrics import Metrics
from onnx_bitnet.quantize import LayerSpec, quantize_layer
from onnx_bitnet.recipe import Recipe, Rule
from onnx_bitnet.report import FrontierPoint
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.simulation import Simulation, Weights
from onnx_bitnet.validate import validate

Progress = Callable[[int, int, str], None]

# Samples that the model is run on to weigh the layers; the goal itself is measured on all data.
_SAMPLES = 32
# Conversions made to come close to a goal; a loss of this share of what is allowed is close.
_CONVERSIONS, _CLOSE = 3, 0.8


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share a weight, and what can be done with it.

    Args:
        linear: the first of them.
        names: all of them.
        trials: every candidate tried, `KEEP` last.
        gain: loss of the outputs for each unit of error of the layer.
    """

    linear: Linear
    names: tuple[str, ...]
    trials: tuple[Trial, ...]
    gain: float = 1.0

    def options(self) -> list[Option]:
        """Return the trials as the solver wants them."""
        return [Option(t.candidate.name, t.nbytes, self.gain * t.error) for t in self.trials]


@dataclass(frozen=True, eq=False)
class Settled:
    """A recipe that reaches the goals, and how it was found.

    Args:
        recipe: without goals; `convert` takes it as it is.
        groups: what was tried.
        frontier: what there was to choose from.
        notes: sentences the user should read.
        data: what was given to measure on, for `convert` to round by.
    """

    recipe: Recipe
    groups: tuple[Group, ...]
    frontier: tuple[FrontierPoint, ...]
    notes: tuple[str, ...]
    data: Feeds | Calibration | None = None


class Search:
    """The search for a point of the frontier; holds the session and what was measured."""

    def __init__(
        self,
        source: str | Path,
        recipe: Recipe,
        groups: Sequence[Group],
        feeds: Feeds | None,
        progress: Progress | None,
    ) -> None:
        self._source, self._recipe, self._groups = Path(source), recipe, list(groups)
        self._feeds, self._progress = feeds, progress
        self._measured: dict[tuple[int, ...], float] = {}
        self._real: dict[tuple[int, ...], tuple[float, tuple[str, ...]]] = {}
        self._simulation: Simulation | None = None
        if feeds is not None and groups:
            self._simulation = Simulation(source, {name for group in groups for name in group.names})

    def weigh(self) -> None:
        """Replace the gains by what an error in each layer alone does to the outputs, on some samples."""
        assert self._simulation is not None
        assert self._feeds is not None
        reference = [1 if len(group.trials) > 2 else 0 for group in self._groups]
        variants = [
            partial(self._weights, [group], [index])
            for group, index in zip(self._groups, reference, strict=True)
        ]
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if self._progress is not None:
                names = self._groups[(done - 1) % len(self._groups)].names
                self._progress(done, 0, f"weighing {names[0]}")

        found = self._simulation.measure(_some(self._feeds), variants, tick)
        for place, (group, index, metrics) in enumerate(zip(self._groups, reference, found, strict=True)):
            error = group.trials[index].error
            if self._simulation.layers.issuperset(group.names) and error > 0:
                self._groups[place] = dataclasses.replace(group, gain=self._loss(metrics) / error)
        known = [group.gain for group in self._groups if self._simulation.layers.issuperset(group.names)]
        for place, group in enumerate(self._groups):
            if known and not self._simulation.layers.issuperset(group.names):
                self._groups[place] = dataclasses.replace(group, gain=float(np.median(known)))

    def _weights(self, groups: Sequence[Group], chosen: Sequence[int]) -> Weights:
        """Return the decoded weights (K, N) of what is chosen, by layer, where they can be changed."""
        assert self._simulation is not None
        weights: dict[str, np.ndarray] = {}
        for group, index in zip(groups, chosen, strict=True):
            candidate = group.trials[index].candidate
            names = [name for name in group.names if name in self._simulation.layers]
            if candidate is KEEP or not names:
                continue
            array = group.linear.weight.array()
            spec = spec_of(candidate, group.linear, array, self._recipe)
            assert isinstance(spec, LayerSpec)
            decoded = np.ascontiguousarray(quantize_layer(array, spec).dequantize().T)
            weights |= dict.fromkeys(names, decoded)
        return weights

    def _loss(self, outputs: Mapping[str, Metrics]) -> float:
        """Return how bad the worst float output is, in the measure of the goal."""
        graded = [metrics for metrics in outputs.values() if metrics.agreement is None]
        if self._recipe.min_sqnr is not None and self._recipe.min_cosine is None:
            return max((10 ** (-_number(metrics.sqnr_db) / 10) for metrics in graded), default=0.0)
        return max((1 - _number(metrics.cosine) for metrics in graded), default=0.0)

    @property
    def _allowed(self) -> float | None:
        """The largest loss that reaches the error goals; None if there is none."""
        bounds = []
        if self._recipe.min_cosine is not None:
            bounds.append(1 - self._recipe.min_cosine)
        if self._recipe.min_sqnr is not None and self._recipe.min_cosine is None:
            bounds.append(10 ** (-self._recipe.min_sqnr / 10))
        return bounds[0] if bounds else None

    def _measure(self, point: Point) -> float:
        """Return the loss of a point: measured with float activations if there are feeds, else predicted."""
        if self._simulation is None or self._feeds is None:
            return point.loss
        if point.options not in self._measured:
            self._say("measuring a choice")
            weights = self._weights(self._groups, point.options)
            (metrics,) = self._simulation.measure(self._feeds, [lambda: weights])
            self._measured[point.options] = self._loss(metrics)
        return self._measured[point.options]

    def settle(self, calibration: Calibration | None) -> Settled:
        """Find the smallest point that reaches the goals."""
        layers = [group.options() for group in self._groups]
        points = frontier(layers)
        rest = self._file_bytes(points[0]) - points[0].nbytes
        chosen, notes = points[0], []
        if self._allowed is not None:
            chosen = points[self._first_within(points, self._allowed)]
            if self._feeds is not None:
                chosen = self._settled(points, self._allowed)
        if self._recipe.max_size is not None:
            assert isinstance(self._recipe.max_size, int)
            chosen = self._fitting(layers, chosen, self._recipe.max_size, rest, calibration)
        notes += self._notes(calibration)
        listed = tuple(
            FrontierPoint(rest + point.nbytes, point.loss, self._measured.get(point.options), point == chosen)
            for point in sorted({*points, chosen}, key=lambda point: point.nbytes)
        )
        return Settled(
            self._recipe_of(chosen), tuple(self._groups), listed, tuple(notes), self._feeds or calibration
        )

    def _first_within(self, points: Sequence[Point], allowed: float) -> int:
        """Return the first point whose loss is allowed, supposing that it falls along the frontier."""
        low, high = 0, len(points) - 1  # the last is all float
        while low < high:
            middle = (low + high) // 2
            if self._measure(points[middle]) <= allowed:
                high = middle
            else:
                low = middle + 1
        return low

    def _settled(self, points: Sequence[Point], allowed: float) -> Point:
        """Return the smallest point found whose conversion, validated on all data, reaches the goals.

        What is measured with float activations and plain rounding is a guide only: the bound that it has to
        keep is moved by what conversions turn out to be, a few times, to come close to the goal from above.
        """
        reached: int | None = None
        bound = allowed
        for _ in range(_CONVERSIONS):
            index = self._first_within(points, bound)
            loss, missed = self._converted(points[index])
            if not missed and (reached is None or index < reached):
                reached = index
            if not missed and loss >= _CLOSE * allowed:
                break
            factor = max(min(0.98 * allowed / max(loss, 1e-12), 8.0), 0.125)
            bound *= min(factor, 0.7) if missed else factor
        if reached is not None:
            return points[reached]
        index, step = self._first_within(points, bound), 1
        while (found := self._converted(points[index]))[1]:
            if index == len(points) - 1:
                why = f"with every layer float that is open to choice, {found[1][0]}"
                raise RecipeError(f"the goals cannot be reached: {why}")
            index = min(index + step, len(points) - 1)
            step *= 2
        return points[index]

    def _converted(self, point: Point) -> tuple[float, tuple[str, ...]]:
        """Convert, validate, and return the loss and what misses a goal."""
        assert self._feeds is not None
        if point.options not in self._real:
            self._say("converting and validating a choice")
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder, "model.onnx")
                convert(self._source, output, self._recipe_of(point), data=self._feeds)
                result = validate(self._source, output, self._feeds, layers=False)
            goals = {"min_sqnr": self._recipe.min_sqnr, "min_cosine": self._recipe.min_cosine}
            loss = self._loss({output.name: output.metrics for output in result.outputs})
            self._real[point.options] = loss, result.failures(**goals)
        return self._real[point.options]

    def _say(self, what: str) -> None:
        if self._progress is not None:
            self._progress(len(self._measured) + len(self._real), 0, what)

    def _fitting(
        self,
        layers: Sequence[Sequence[Option]],
        least: Point,
        size: int,
        rest: int,
        calibration: Calibration | None,
    ) -> Point:
        """Return the best choice whose files have at most `size` bytes."""
        error_first = self._allowed is not None
        budget = size - rest
        while True:
            found = least if error_first else within(layers, budget)
            nbytes = self._file_bytes(found) if found is not None else 0
            if found is not None and nbytes <= size:
                nbytes = self._file_bytes(found, self._feeds or calibration)
            if found is not None and nbytes <= size:
                return found
            if found is None or error_first:
                smallest = nbytes if error_first else self._file_bytes(frontier(layers)[0])
                goal = "that reaches the other goals " if error_first else ""
                raise RecipeError(
                    f"max_size = {size} cannot be met: the smallest choice {goal}has {smallest} bytes"
                )
            budget -= nbytes - size

    def _file_bytes(self, point: Point, data: object = None) -> int:
        """Return the size of the files: without data nearly, since rounding by data may add biases."""
        recipe = self._recipe_of(point)
        if data is None:
            recipe = recipe.replace(rounding="auto", rotation="none", offset=False)
        return plan(self._source, recipe, data=data).output_bytes

    def _recipe_of(self, point: Point) -> Recipe:
        rules = []
        for group, index in zip(self._groups, point.options, strict=True):
            for name in group.names:
                rules.append(Rule.parse({"match": glob.escape(name), **group.trials[index].candidate.rule}))
        return self._recipe.without_goals().replace(rules=(*self._recipe.rules, *rules))

    def _notes(self, calibration: Calibration | None) -> list[str]:
        if not self._groups:
            return ["the goals had nothing to decide: every layer is ternary, kept, or the subject of a rule"]
        if self._feeds is not None:
            return [] if self._allowed is None else ["the goals were measured on the data and are met"]
        what = "weights, weighted by the data's statistics" if calibration is not None else "weights alone"
        return [f"the loss was predicted from errors of the {what}, and not measured; give feeds (data)"]


def _number(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def _some(feeds: Feeds) -> Feeds:
    """Return feeds that end with the batch in which _SAMPLES samples are reached."""

    def source() -> Iterator[tuple[str, object]]:
        samples = 0
        for label, batch in feeds.source():
            yield label, batch
            sizes = [np.shape(array) for array in batch.values()] if isinstance(batch, Mapping) else []
            samples += max((shape[0] for shape in sizes if shape), default=1)
            if samples >= _SAMPLES:
                return

    return dataclasses.replace(feeds, source=source)
