"""Search the frontier of a model for the cheapest choice that reaches the goals of a recipe."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_bitnet.calibration.calibration import Calibration
from onnx_bitnet.conversion.convert import plan_as_told
from onnx_bitnet.errors import RecipeError
from onnx_bitnet.planning.candidates import KEEP
from onnx_bitnet.planning.conversions import Conversion, Conversions
from onnx_bitnet.planning.frontier import Option, Point, frontier, uniform, within
from onnx_bitnet.planning.goals import Goals
from onnx_bitnet.planning.samples import Samples
from onnx_bitnet.planning.survey import Group
from onnx_bitnet.recipe import Recipe, Rule
from onnx_bitnet.report import FrontierPoint, Progress

# Conversions made to come close to a goal; a loss of this share of what is allowed is close.
_CONVERSIONS, _CLOSE = 3, 0.8
# A choice is worth a conversion if it costs less than this share of another.
_NEARLY = 0.97
# Share of what is allowed that is aimed at.
_SURE = 0.95
# Where to begin, and the factor from there on, if only a metric of the user's says what is enough.
_FIRST, _FACTOR = 0.01, 3.0


@dataclass(frozen=True, eq=False)
class Settled:
    """A recipe that reaches the goals, and how it was found.

    Args:
        recipe: without goals; `convert` takes it as it is.
        groups: what was tried.
        frontier: what there was to choose from.
        notes: sentences the user should read.
        data: a calibration for `convert` to round by.
        conversion: the conversion by the recipe, if it was wanted and there was data to measure on.
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
        wanted: the conversion is wanted, and not the recipe alone.
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
        wanted: bool,
        strict: bool,
        progress: Progress | None,
    ) -> None:
        self._source, self._recipe, self._goals, self._groups = Path(source), recipe, goals, list(groups)
        self._samples, self._wanted = samples, wanted
        if samples is not None:
            self._conversions = Conversions(self._source, recipe, goals, samples, workplace, strict, progress)
        self._real: dict[tuple[int, ...], Conversion] = {}

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
        """Return the cheapest choice that is the same for all layers, if it and dearer ones reach the goals.

        It needs no prediction, which may be wrong.
        """
        for best in uniform(layers):
            if best.price < _NEARLY * found.price:
                if self._converted(best).missed:
                    break
                found = best
        return found

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
            slope = min(max((known[1][1] - y) / (known[1][0] - x), 0.5), 1.25)
        return math.exp(y + slope * (log(loss) - x))

    def _converted(self, point: Point) -> Conversion:
        """Convert a choice by the batches that are for it, and measure it on those that judge."""
        assert self._samples is not None
        if point.options not in self._real:
            recipe = self._recipe_of(point)
            self._real[point.options] = self._conversions.known(
                recipe, self._samples.known, self._samples.checks
            )
        return self._real[point.options]

    def _finished(self, chosen: Point, points: Sequence[Point]) -> tuple[Point, Conversion | None]:
        """Return the choice and its conversion, or a more exact one if it misses goals on all data."""
        for point in _onward([chosen, *(point for point in points if point.loss < chosen.loss)]):
            found = self._by_all(point)
            if found is None:
                continue
            if self._wanted and found.files is None:
                found = self._conversions.convert(self._recipe_of(point), found.data, found.checks)
            return point, found if self._wanted else None
        raise RecipeError("the goals cannot be reached on all of the data")

    def _by_all(self, point: Point) -> Conversion | None:
        """Convert a choice by all data: what is rounded by more of it is better on what it has not seen.

        The conversion by a part of it is the other one there is. None if both miss the goals on all data.
        """
        assert self._samples is not None
        found, everything, recipe = self._converted(point), self._samples.everything, self._recipe_of(point)
        if not self._samples.apart:
            return None if found.missed else found
        best = self._conversions.known(recipe, everything, everything)
        size = self._recipe.max_size
        if not best.missed and (not isinstance(size, int) or best.size <= size):
            return best
        if found.missed:
            return None
        other = self._conversions.known(recipe, self._samples.known, everything, found.files)
        return None if other.missed else other

    def _fitting(
        self,
        layers: Sequence[Sequence[Option]],
        least: Point,
        size: int,
        rest: int,
        calibration: Calibration | None,
    ) -> Point:
        """Return the best choice whose files have at most `size` bytes."""
        smallest = least if self._goals.any else frontier(layers)[0]
        budget = size - rest
        while True:
            found = None if self._goals.any else within(layers, budget)
            found = found or smallest
            nbytes = self._file_bytes(found, calibration)
            if nbytes <= size:
                return found
            if found.options == smallest.options:
                goal = "that reaches the other goals " if self._goals.any else ""
                raise RecipeError(
                    f"max_size = {size} cannot be met: the smallest choice {goal}has {nbytes} bytes"
                )
            budget -= nbytes - size

    def _file_bytes(self, point: Point, calibration: Calibration | None = None) -> int:
        """Return the size of the files."""
        if self._samples is not None and any(
            group.trials[index].candidate != KEEP
            for group, index in zip(self._groups, point.options, strict=True)
        ):
            return self._converted(point).size
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


def _first_within(points: Sequence[Point], allowed: float) -> int:
    """Return the first point whose predicted loss is allowed; the last, all float, has none."""
    return next(index for index, point in enumerate(points) if point.loss <= allowed)
