"""Search the frontier of a model for the smallest choice that reaches the goals of a recipe."""

from __future__ import annotations

import dataclasses
import glob
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from onnx_bitnet.activations import LayerStatistics
from onnx_bitnet.calibrate import Calibration
from onnx_bitnet.candidates import KEEP, Trial, output_error
from onnx_bitnet.convert import convert, plan
from onnx_bitnet.errors import RecipeError
from onnx_bitnet.feeds import Feeds
from onnx_bitnet.frontier import Option, Point, frontier, within
from onnx_bitnet.metrics import Metrics
from onnx_bitnet.quantize import LayerSpec, quantize_layer
from onnx_bitnet.recipe import Recipe, Rule
from onnx_bitnet.report import FrontierPoint, Progress, Report
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.simulation import Simulation, Weights
from onnx_bitnet.validate import validate

# Samples that the model is run on to weigh the layers; the goal itself is measured on all data.
_SAMPLES = 32
# Conversions made to come close to a goal; a loss of this share of what is allowed is close.
_CONVERSIONS, _CLOSE = 3, 0.8
# Share of the predicted loss that is left as each layer makes good what earlier ones lost: on MiniLM.
_COMPENSATED = 0.25
# Share of what is allowed that a second try aims at.
_SURE = 0.93
_FOURTH = 4
# The error that layers are weighed by.
_WEIGHING = LayerSpec(integer_bits=4, granularity="block:128", levels=4)


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share a weight, and what can be done with it.

    Args:
        linear: the first of them.
        names: all of them.
        trials: every candidate tried, `KEEP` last.
        statistics: what calibration knows of its inputs.
        gain: loss of the outputs for each unit of error of the layer.
    """

    linear: Linear
    names: tuple[str, ...]
    trials: tuple[Trial, ...]
    statistics: LayerStatistics | None = None
    gain: float = 1.0

    def options(self) -> list[Option]:
        """Return the trials as the solver wants them."""
        return [Option(t.candidate.name, t.nbytes, self.gain * t.error) for t in self.trials]


@dataclass(frozen=True, eq=False)
class Conversion:
    """A choice that was converted and measured.

    Args:
        report: of the conversion.
        path: the model; it is there as long as the folder of the search.
        loss: of the outputs.
        missed: which goals are missed, in words.
    """

    report: Report
    path: Path
    loss: float
    missed: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Settled:
    """A recipe that reaches the goals, and how it was found.

    Args:
        recipe: without goals; `convert` takes it as it is.
        groups: what was tried.
        frontier: what there was to choose from.
        notes: sentences the user should read.
        data: what was given to measure on, for `convert` to round by.
        conversion: the conversion by the recipe, if it was made to measure.
    """

    recipe: Recipe
    groups: tuple[Group, ...]
    frontier: tuple[FrontierPoint, ...]
    notes: tuple[str, ...]
    data: Feeds | Calibration | None = None
    conversion: Conversion | None = None


class Search:
    """The search for a point of the frontier; holds what was converted on the way.

    Args:
        source: the model.
        recipe: has goals.
        groups: the layers to decide.
        feeds: to round by; None if nothing can be measured.
        checks: to measure on.
        workplace: where to convert, and the name of the file.
        options: for `convert`.
        progress: as in `convert`.
    """

    def __init__(
        self,
        source: str | Path,
        recipe: Recipe,
        groups: Sequence[Group],
        feeds: Feeds | None,
        checks: Feeds | None,
        workplace: Path,
        options: Mapping[str, bool],
        progress: Progress | None,
    ) -> None:
        self._source, self._recipe, self._groups = Path(source), recipe, list(groups)
        self._feeds, self._checks, self._progress = feeds, checks, progress
        self._workplace, self._options = workplace, options
        self._real: dict[tuple[int, ...], Conversion] = {}

    def weigh(self) -> None:
        """Replace the gains by what an error in each layer alone does to the outputs, on some samples.

        The error is that of rounding to four bits.
        """
        assert self._feeds is not None
        simulation = Simulation(self._source, {name for group in self._groups for name in group.names})
        errors: list[float] = [0.0] * len(self._groups)
        done = 0

        def rounded(place: int) -> Weights:
            group = self._groups[place]
            array = group.linear.weight.array()
            decoded = quantize_layer(array, _WEIGHING).dequantize()
            errors[place] = output_error(array, lambda rows: decoded[rows], group.statistics)
            names = [name for name in group.names if name in simulation.layers]
            return dict.fromkeys(names, np.ascontiguousarray(decoded.T))

        def tick() -> None:
            nonlocal done
            done += 1
            if self._progress is not None:
                names = self._groups[(done - 1) % len(self._groups)].names
                self._progress(done, 0, f"weighing {names[0]}")

        variants = [partial(rounded, place) for place in range(len(self._groups))]
        found = simulation.measure(_some(self._feeds), variants, tick)
        gains: list[float | None] = [
            self._loss(metrics) / error if simulation.layers.issuperset(group.names) and error > 0 else None
            for group, error, metrics in zip(self._groups, errors, found, strict=True)
        ]
        typical = float(np.median([gain for gain in gains if gain is not None] or [1.0]))
        self._groups = [
            dataclasses.replace(group, gain=typical if gain is None else gain)
            for group, gain in zip(self._groups, gains, strict=True)
        ]

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

    def settle(self, calibration: Calibration | None) -> Settled:
        """Find the smallest point that reaches the goals."""
        layers = [group.options() for group in self._groups]
        points = frontier(layers)
        rest = self._file_bytes(points[-1]) - points[-1].nbytes  # the last is all float
        chosen = points[0]
        if self._allowed is not None:
            chosen = points[_first_within(points, self._allowed)]
            if self._feeds is not None:
                chosen = self._settled(points, self._allowed)
        if self._recipe.max_size is not None:
            assert isinstance(self._recipe.max_size, int)
            chosen = self._fitting(layers, chosen, self._recipe.max_size, rest, calibration)
        measured = {options: real.loss for options, real in self._real.items()}
        listed = tuple(
            FrontierPoint(rest + point.nbytes, point.loss, measured.get(point.options), point == chosen)
            for point in sorted({*points, chosen}, key=lambda point: point.nbytes)
        )
        return Settled(
            self._recipe_of(chosen),
            tuple(self._groups),
            listed,
            tuple(self._notes(calibration)),
            self._feeds or calibration,
            self._real.get(chosen.options),
        )

    def _settled(self, points: Sequence[Point], allowed: float) -> Point:
        """Return the smallest point found whose conversion, validated on all data, reaches the goals.

        What is predicted is a guide: once it is known how far a conversion is from it, the next comes closer.
        """
        reached: int | None = None
        index = _first_within(points, allowed / _COMPENSATED)
        for _ in range(_CONVERSIONS):
            real = self._converted(points[index])
            if not real.missed and (reached is None or index < reached):
                reached = index
            if not real.missed and real.loss >= _CLOSE * allowed:
                break
            index = _first_within(points, self._predicted(points, _SURE * allowed))
            if points[index].options in self._real:
                break
        if reached is not None:
            return points[reached]
        step = 1
        while self._converted(points[index]).missed:
            if index == len(points) - 1:
                why = (
                    f"with every layer float that is open to choice, {self._converted(points[-1]).missed[0]}"
                )
                raise RecipeError(f"the goals cannot be reached: {why}")
            index = min(index + step, len(points) - 1)
            step *= 2
        return points[index]

    def _predicted(self, points: Sequence[Point], loss: float) -> float:
        """Return the prediction that goes with a loss, from the conversions made: a power law through two."""

        def log(value: float) -> float:
            return math.log(max(value, 1e-12))

        known = [
            (log(self._real[point.options].loss), log(point.loss))
            for point in points
            if point.options in self._real
        ]
        known.sort(key=lambda pair: abs(pair[0] - log(loss)))
        (x, y), slope = known[0], 1.0
        if len(known) > 1 and known[1][0] != x:
            slope = min(max((known[1][1] - y) / (known[1][0] - x), 0.5), 2.0)
        return math.exp(y + slope * (log(loss) - x))

    def _converted(self, point: Point) -> Conversion:
        """Convert and validate a choice."""
        assert self._feeds is not None
        if point.options not in self._real:
            folder = self._workplace.parent / str(len(self._real))
            folder.mkdir()
            output = folder / self._workplace.name
            data, options = self._feeds, self._options
            report = convert(
                self._source, output, self._recipe_of(point), data=data, progress=self._progress, **options
            )
            result = validate(self._source, output, self._checks, layers=False)
            goals = {"min_sqnr": self._recipe.min_sqnr, "min_cosine": self._recipe.min_cosine}
            loss = self._loss({output.name: output.metrics for output in result.outputs})
            missed = result.failures(**goals)
            if missed:
                shutil.rmtree(folder)
            self._real[point.options] = Conversion(report, output, loss, missed)
        return self._real[point.options]

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
            nbytes = self._file_bytes(found, calibration) if found is not None else 0
            if found is not None and nbytes <= size:
                return found
            if found is None or error_first:
                smallest = nbytes if error_first else rest + frontier(layers)[0].nbytes
                goal = "that reaches the other goals " if error_first else ""
                raise RecipeError(
                    f"max_size = {size} cannot be met: the smallest choice {goal}has {smallest} bytes"
                )
            budget -= nbytes - size

    def _file_bytes(self, point: Point, calibration: Calibration | None = None) -> int:
        """Return the size of the files."""
        if self._feeds is not None and any(
            group.trials[index].candidate is not KEEP
            for group, index in zip(self._groups, point.options, strict=True)
        ):
            return self._converted(point).report.output_bytes
        return plan(self._source, self._recipe_of(point), data=self._feeds or calibration).output_bytes

    def _notes(self, calibration: Calibration | None) -> list[str]:
        if not self._groups:
            return ["the goals had nothing to decide: every layer is ternary, kept, or the subject of a rule"]
        if self._feeds is not None:
            apart = (
                "" if self._checks is self._feeds else ", on every fourth batch, which was not rounded by,"
            )
            return (
                [] if self._allowed is None else [f"the goals were measured on the data{apart} and are met"]
            )
        what = "weights, weighted by the data's statistics" if calibration is not None else "weights alone"
        return [f"the loss was predicted from errors of the {what}, and not measured; give feeds (data)"]

    def _recipe_of(self, point: Point) -> Recipe:
        rules = []
        for group, index in zip(self._groups, point.options, strict=True):
            for name in group.names:
                rules.append(Rule.parse({"match": glob.escape(name), **group.trials[index].candidate.rule}))
        return self._recipe.without_goals().replace(rules=(*self._recipe.rules, *rules))


def _first_within(points: Sequence[Point], allowed: float) -> int:
    """Return the first point whose predicted loss is allowed; the last, all float, has none."""
    return next(index for index, point in enumerate(points) if point.loss <= allowed)


def _number(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def apart(feeds: Feeds) -> tuple[Feeds, Feeds]:
    """Return what to round by and what to measure on: every fourth batch, or the same if there are fewer.

    Rounding by data fits what it has seen better than what it has not.
    """
    if sum(1 for _ in zip(range(_FOURTH), feeds.source(), strict=False)) < _FOURTH:
        return feeds, feeds

    def some(checks: bool) -> Feeds:
        def source() -> Iterator[tuple[str, object]]:
            for index, batch in enumerate(feeds.source()):
                if (index % _FOURTH == _FOURTH - 2) == checks:
                    yield batch

        return dataclasses.replace(feeds, source=source, count=0)

    return some(False), some(True)


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
