"""Search the frontier of a model for the cheapest choice that reaches the goals of a recipe."""

from __future__ import annotations

import dataclasses
import glob
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from onnx_bitnet.calibration.activations import LayerStatistics
from onnx_bitnet.calibration.calibrate import Calibration
from onnx_bitnet.conversion.convert import convert_as_told, plan_as_told
from onnx_bitnet.data.feeds import Feeds
from onnx_bitnet.errors import NotFinite, RecipeError
from onnx_bitnet.planning.candidates import KEEP, Trial
from onnx_bitnet.planning.frontier import Option, Point, frontier, uniform, within
from onnx_bitnet.planning.goals import ALL_LOST, Goals
from onnx_bitnet.planning.probe import Probe, noise_to_signal
from onnx_bitnet.planning.samples import Samples, first
from onnx_bitnet.planning.simulation import Simulation, Weights
from onnx_bitnet.recipe import Recipe, Rule
from onnx_bitnet.report import FrontierPoint, Progress, Report
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.validation.metrics import Metrics
from onnx_bitnet.validation.validate import validate
from onnx_bitnet.validation.validation import Validation

# Samples that the model is run on to weigh the layers; the goal itself is measured on all that judge.
_SAMPLES = 32
# Conversions made to come close to a goal; a loss of this share of what is allowed is close.
_CONVERSIONS, _CLOSE = 3, 0.8
# A choice that has more than this share of another's bytes is not worth a conversion.
_NEARLY = 0.97
# Share of what is allowed that is aimed at.
_SURE = 0.95
# Where to begin, and the factor from there on, if only a metric of the user's says what is enough.
_FIRST, _FACTOR = 0.01, 3.0


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share a weight, and what can be done with it.

    Args:
        linear: the first of them.
        names: all of them.
        trials: every candidate tried, `KEEP` last.
        statistics: what is known of its inputs, to round by.
        judge: the same of the data to measure on.
        gain: loss of the outputs for each unit of error of the layer; infinite if few bits in it make values
            infinite or NaN, so that it had better stay float.
    """

    linear: Linear
    names: tuple[str, ...]
    trials: tuple[Trial, ...]
    statistics: LayerStatistics | None = None
    judge: LayerStatistics | None = None
    gain: float = 1.0

    @property
    def products(self) -> int:
        """What the layers do with one row."""
        return len(self.names) * self.linear.weight.n * self.linear.weight.k

    def options(self) -> list[Option]:
        """Return the trials as the solver wants them: nothing but float loses nothing, as the last resort."""
        *others, _ = self.trials
        losses = [max(self._loss(trial.error), sys.float_info.min) for trial in others] + [0.0]
        return [
            Option(trial.candidate.name, trial.nbytes, loss, trial.time * self.products)
            for trial, loss in zip(self.trials, losses, strict=True)
        ]

    def _loss(self, error: float) -> float:
        return self.gain * error if math.isfinite(self.gain) else ALL_LOST


@dataclass(frozen=True, eq=False)
class Conversion:
    """A choice that was converted and measured.

    Args:
        report: of the conversion; None if it could not be finished, because values ceased to be finite.
        path: the model; it is there as long as the folder of the search, unless goals are missed.
        loss: of the outputs.
        missed: which goals are missed, in words.
    """

    report: Report | None
    path: Path
    loss: float
    missed: tuple[str, ...]

    def told(self) -> Report:
        """Return the report.

        Raises:
            NotFinite: there is none.
        """
        if self.report is None:
            raise NotFinite(self.missed[0])
        return self.report


@dataclass(frozen=True, eq=False)
class Settled:
    """A recipe that reaches the goals, and how it was found.

    Args:
        recipe: without goals; `convert` takes it as it is.
        groups: what was tried.
        frontier: what there was to choose from.
        notes: sentences the user should read.
        data: a calibration for `convert` to round by.
        conversion: the conversion by the recipe, if there was data to measure on.
    """

    recipe: Recipe
    groups: tuple[Group, ...]
    frontier: tuple[FrontierPoint, ...]
    notes: tuple[str, ...]
    data: Calibration | None = None
    conversion: Conversion | None = None


class Search:
    """The search for a point of the frontier; holds what was converted on the way.

    Args:
        source: the model.
        recipe: has goals.
        goals: of the recipe.
        groups: the layers to decide.
        samples: to round by and to measure on; None if nothing can be measured.
        workplace: where to convert, and the name of the file.
        strict: as in `convert`.
        progress: as in `convert`.
    """

    def __init__(
        self,
        source: str | Path,
        recipe: Recipe,
        goals: Goals,
        groups: Sequence[Group],
        samples: Samples | None,
        workplace: Path,
        *,
        strict: bool,
        progress: Progress | None,
    ) -> None:
        self._source, self._recipe, self._goals, self._groups = Path(source), recipe, goals, list(groups)
        self._samples, self._workplace = samples, workplace
        self._strict, self._progress = strict, progress
        self._real: dict[tuple[int, ...], Conversion] = {}

    def weigh(self) -> None:
        """Replace the gains by what an error in each layer alone does to the outputs, on some samples.

        The error is that of four bits (probe.py), on data that it was not rounded by if there is enough.
        Later layers make good part of what one lost, the more the more it was: a gain is the geometric mean
        of the layer's own and the typical one, which those that cannot be reached get.
        """
        assert self._samples is not None
        simulation = Simulation(self._source, {name for group in self._groups for name in group.names})
        probes: dict[int, Probe] = {}
        errors: dict[int, float] = {}

        def rounded(place: int) -> Weights:
            group = self._groups[place]
            assert group.statistics is not None
            assert group.judge is not None
            array = group.linear.weight.array()
            if place not in probes:
                probes[place] = Probe.of(group.linear.name, array, group.statistics)
            decoded = probes[place].decoded(array)
            if place not in errors:
                errors[place] = noise_to_signal(decoded - array, array, group.judge)
            return dict.fromkeys(group.names, np.ascontiguousarray(decoded.T))

        inside = [
            place
            for place, group in enumerate(self._groups)
            if simulation.layers.issuperset(group.names) and group.statistics is not None
        ]
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if self._progress is not None:
                names = self._groups[inside[(done - 1) % len(inside)]].names
                self._progress(done, 0, f"weighing {names[0]}")

        variants = [partial(rounded, place) for place in inside]
        found = simulation.measure(first(self._samples.checks, _SAMPLES), variants, tick)
        gains = {
            place: math.inf if _breaks(metrics) else self._goals.loss(metrics) / errors[place]
            for place, metrics in zip(inside, found, strict=True)
            if errors[place] > 0
        }
        typical = float(np.median([gain for gain in gains.values() if math.isfinite(gain)] or [1.0]))
        self._groups = [
            dataclasses.replace(group, gain=math.sqrt(gains.get(place, typical) * typical))
            for place, group in enumerate(self._groups)
        ]

    def settle(self, calibration: Calibration | None) -> Settled:
        """Find the cheapest point that reaches the goals."""
        layers = [group.options() for group in self._groups]
        points = frontier(layers)
        last = points[-1]  # all float
        rest = self._file_bytes(last) - last.nbytes
        chosen = points[0]
        if self._goals.any:
            if self._samples is not None:
                chosen = self._or_uniform(self._settled(points), layers)
            elif (allowed := self._goals.allowed) is not None:
                chosen = points[_first_within(points, allowed)]
        if self._recipe.max_size is not None:
            assert isinstance(self._recipe.max_size, int)
            chosen = self._fitting(layers, chosen, self._recipe.max_size, rest, calibration)
        conversion = None
        if self._samples is not None:
            chosen, conversion = self._finished(chosen, points)
        measured = {options: real.loss for options, real in self._real.items()}
        listed = tuple(
            FrontierPoint(
                rest + point.nbytes,
                point.loss,
                point.time / last.time if last.time else 1.0,
                measured.get(point.options),
                point == chosen,
            )
            for point in sorted({*points, chosen}, key=lambda point: point.nbytes)
        )
        return Settled(
            self._recipe_of(chosen),
            tuple(self._groups),
            listed,
            tuple(self._notes(calibration)),
            calibration if self._samples is None else None,
            conversion,
        )

    def _settled(self, points: Sequence[Point]) -> Point:
        """Return the cheapest point found whose conversion reaches the goals when it is measured.

        What is predicted is a guide: once it is known how far a conversion is from it, the next comes closer.
        """
        allowed = self._goals.allowed
        reached: int | None = None
        index = _first_within(points, _FIRST if allowed is None else allowed)
        for _ in range(_CONVERSIONS):
            real = self._converted(points[index])
            if not real.missed and (reached is None or index < reached):
                reached = index
            if allowed is not None and not real.missed and real.loss >= _CLOSE * allowed:
                break
            index = _first_within(points, self._predicted(points, self._aim(points)))
            if points[index].options in self._real:
                break
        if reached is not None:
            return points[reached]
        for point in _onward(points[index:]):
            if not self._converted(point).missed:
                return point
        why = f"with every layer float that is open to choice, {self._converted(points[-1]).missed[0]}"
        raise RecipeError(f"the goals cannot be reached: {why}")

    def _or_uniform(self, found: Point, layers: Sequence[Sequence[Option]]) -> Point:
        """Return the largest smaller choice that is the same for all layers, if it reaches the goals as well.

        It needs no prediction, which may be wrong.
        """
        smaller = [point for point in uniform(layers) if point.nbytes < found.nbytes]
        best = max(smaller, key=lambda point: (point.nbytes, -point.time), default=found)
        if best.nbytes > _NEARLY * found.nbytes:
            return found
        return found if self._converted(best).missed else best

    def _aim(self, points: Sequence[Point]) -> float:
        """Return the loss to try next: what is allowed; for a metric alone, between enough and too much."""
        if self._goals.min_metric is None:
            assert self._goals.allowed is not None
            return _SURE * self._goals.allowed
        known = [self._real[point.options] for point in points if point.options in self._real]
        enough = max((real.loss for real in known if not real.missed), default=None)
        missed = min((real.loss for real in known if real.missed), default=None)
        if enough is None or missed is None:
            return _FACTOR * enough if enough is not None else (missed or 0.0) / _FACTOR
        return math.sqrt(enough * missed)

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
        """Convert a choice by the batches that are for it, and measure it on those that judge."""
        assert self._samples is not None
        if point.options not in self._real:
            self._real[point.options] = self._convert(point, self._samples.known, self._samples.checks)
        return self._real[point.options]

    def _finished(self, chosen: Point, points: Sequence[Point]) -> tuple[Point, Conversion]:
        """Return the choice and its conversion, or a more exact one if it misses goals on all data."""
        for point in _onward([chosen, *(point for point in points if point.loss < chosen.loss)]):
            found = self._by_all(point)
            if found is not None:
                return point, found
        raise RecipeError("the goals cannot be reached on all of the data")

    def _by_all(self, point: Point) -> Conversion | None:
        """Convert a choice by all data: what is rounded by more of it is better on what it has not seen.

        The conversion by a part of it is the other one there is. None if both miss the goals on all data.
        """
        assert self._samples is not None
        found, everything = self._converted(point), self._samples.everything
        if not self._samples.apart:
            return None if found.missed else found
        best = self._convert(point, everything, everything)
        size = self._recipe.max_size
        if not best.missed and (not isinstance(size, int) or best.told().output_bytes <= size):
            return best
        return None if found.missed or self._goals.missed(self._measured(found.path, everything)) else found

    def _convert(self, point: Point, data: Feeds, checks: Feeds) -> Conversion:
        folder = Path(tempfile.mkdtemp(dir=self._workplace.parent))
        output = folder / self._workplace.name
        try:
            report = convert_as_told(
                self._source,
                output,
                self._recipe_of(point),
                data=data,
                strict=self._strict,
                progress=self._progress,
            )
        except NotFinite as error:
            return Conversion(None, output, ALL_LOST, (str(error),))
        result = self._measured(output, checks)
        missed = self._goals.missed(result)
        if missed:
            shutil.rmtree(folder)
        loss = self._goals.loss({output.name: output.metrics for output in result.outputs})
        return Conversion(report, output, loss, missed)

    def _measured(self, output: Path, checks: Feeds) -> Validation:
        return validate(self._source, output, checks, layers=False, metric=self._goals.metric)

    def _fitting(
        self,
        layers: Sequence[Sequence[Option]],
        least: Point,
        size: int,
        rest: int,
        calibration: Calibration | None,
    ) -> Point:
        """Return the best choice whose files have at most `size` bytes."""
        error_first = self._goals.any
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
        if self._samples is not None and any(
            group.trials[index].candidate is not KEEP
            for group, index in zip(self._groups, point.options, strict=True)
        ):
            return self._converted(point).told().output_bytes
        data = calibration if self._samples is None else self._samples.everything
        return plan_as_told(self._source, self._recipe_of(point), data=data).output_bytes

    def _notes(self, calibration: Calibration | None) -> list[str]:
        if not self._groups:
            return ["the goals had nothing to decide: every layer is ternary, kept, or the subject of a rule"]
        if self._samples is None:
            what = (
                "weights, weighted by the data's statistics" if calibration is not None else "weights alone"
            )
            return [f"the loss was predicted from errors of the {what}, and not measured; give feeds (data)"]
        if not self._goals.any:
            return []
        how = ""
        if self._samples.apart:
            how = ": on a fourth of it, rounded by the rest, then on all of it, rounded by all"
        return [f"the goals were measured on the data and are met{how}"]

    def _recipe_of(self, point: Point) -> Recipe:
        rules = []
        for group, index in zip(self._groups, point.options, strict=True):
            for name in group.names:
                rules.append(Rule.parse({"match": glob.escape(name), **group.trials[index].candidate.rule}))
        return self._recipe.without_goals().replace(rules=(*self._recipe.rules, *rules))


def _onward(points: Sequence[Point]) -> Iterator[Point]:
    """Yield the first point, others in steps that double, and the last."""
    last = len(points) - 1
    for place in sorted({0, last, *(1 << bit for bit in range(last.bit_length()))}):
        yield points[place]


def _breaks(outputs: Mapping[str, Metrics]) -> bool:
    """Return whether some values are not finite that should be, or the other way round."""
    return any(metrics.nonfinite_differ for metrics in outputs.values())


def _first_within(points: Sequence[Point], allowed: float) -> int:
    """Return the first point whose predicted loss is allowed; the last, all float, has none."""
    return next(index for index, point in enumerate(points) if point.loss <= allowed)
