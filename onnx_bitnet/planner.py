"""Convert and plan with goals: find the recipe that reaches them, then do what it says.

The road: try every candidate on every layer (candidates.py), weigh each layer by what its error does to the
outputs (simulation.py), order all choices by loss saved per byte (frontier.py), and take the smallest that
reaches the goal when it is measured. What comes out is an ordinary recipe with a rule for each layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnx_bitnet import files
from onnx_bitnet.calibrate import Calibration, calibrate
from onnx_bitnet.candidates import candidates, try_out
from onnx_bitnet.convert import convert as convert_as_told
from onnx_bitnet.convert import plan as plan_as_told
from onnx_bitnet.decide import Keep, check_rules, decide, keep_unseen, rule_for
from onnx_bitnet.errors import EvaluationError, RecipeError
from onnx_bitnet.feeds import Feeds, open_feeds
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.report import Reason, Report
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.rewrite.scan import inline_weight_arguments, scan
from onnx_bitnet.search import Group, Search, Settled

Progress = Callable[[int, int, str], None]


def settle(
    source: str | Path,
    recipe: Recipe,
    data: object = None,
    *,
    method: str = "auto",
    progress: Progress | None = None,
) -> Settled:
    """Find the recipe that reaches a recipe's goals.

    Layers that a rule, keep_first or keep_last speak of, and exactly ternary ones, are not touched.

    Args:
        source: an ONNX model.
        recipe: has goals.
        data: feeds as `bn.calibrate` takes them, a Calibration, or None. Only feeds let a goal be measured.
        method: how layers are weighed: `weights` (their own error), `outputs` (the error of the layer's
            output, which needs data), `model` (the error of the model's outputs, one layer at a time, which
            needs feeds), or `auto` for the last of these that is possible.
        progress: as in `convert`.

    Raises:
        RecipeError: the goals cannot be reached, or contradict one another.
        DataError: the data cannot be read, or does not fit.
    """
    calibration, feeds = _data(source, data, method)
    groups = _groups(source, recipe, calibration, progress)
    search = Search(source, recipe, groups, feeds, progress)
    if feeds is not None and method in ("auto", "model") and groups:
        search.weigh()
    return search.settle(calibration)


def _data(source: str | Path, data: object, method: str) -> tuple[Calibration | None, Feeds | None]:
    if data is None or isinstance(data, Calibration):
        if method == "model" or (method == "outputs" and data is None):
            raise RecipeError(f"method {method!r} needs data to run the model on; give feeds (data)")
        return data, None
    feeds = open_feeds(files.read(source).model, data)
    if not feeds.rereadable:
        data = list(feeds)
        feeds = open_feeds(files.read(source).model, data)
    if method == "weights":
        return None, feeds
    return calibrate(source, data), feeds


def _groups(
    source: str | Path, recipe: Recipe, calibration: Calibration | None, progress: Progress | None
) -> list[Group]:
    """Try all candidates on the layers that are the planner's to decide."""
    model = files.read(source).model
    inline_weight_arguments(model)
    found = scan(model)
    check_rules(recipe, found)
    linears = [item for item in found if isinstance(item, Linear)]
    choices = candidates(recipe)
    groups: dict[Hashable, Group] = {}
    for index, linear in enumerate(linears):
        if progress is not None:
            progress(index, len(linears), f"trying {linear.name}")
        if keep_unseen(index, linears, recipe) is not None or rule_for(linear, recipe) is not None:
            continue
        known = groups.get(linear.weight.key)
        if known is not None:
            groups[linear.weight.key] = dataclasses.replace(known, names=(*known.names, linear.name))
            continue
        weight = _ordinary(linear, recipe)
        if weight is not None:
            statistics = calibration.layers.get(linear.name) if calibration is not None else None
            trials = try_out(linear, weight, recipe, statistics, choices)
            groups[linear.weight.key] = Group(linear, (linear.name,), tuple(trials))
    return list(groups.values())


def _ordinary(linear: Linear, recipe: Recipe) -> np.ndarray | None:
    """Return the weight of a layer that mode `auto` alone leaves float because it is not ternary."""
    try:
        weight = linear.weight.array()
    except EvaluationError:
        return None
    decision = decide(linear, weight, recipe)
    return weight if isinstance(decision, Keep) and decision.reason is Reason.NOT_TERNARY else None


def convert(
    source: str | Path,
    output: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    data: object = None,
    force: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert; see conversion.convert."""
    recipe = Recipe.parse(recipe)
    options: dict[str, Any] = {"force": force, "strict": strict, "progress": progress}
    if not recipe.has_goals:
        return convert_as_told(source, output, recipe, data=data, **options)
    files.check_output(files.read(source), Path(output), force=force)
    settled = settle(source, recipe, data, progress=progress)
    report = convert_as_told(source, output, settled.recipe, **options)
    return _told(report, settled)


def plan(
    source: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    data: object = None,
    progress: Progress | None = None,
) -> Report:
    """Plan; see conversion.plan."""
    recipe = Recipe.parse(recipe)
    if not recipe.has_goals:
        return plan_as_told(source, recipe, data=data, progress=progress)
    settled = settle(source, recipe, data, progress=progress)
    return _told(plan_as_told(source, settled.recipe, progress=progress), settled)


def _told(report: Report, settled: Settled) -> Report:
    return dataclasses.replace(report, frontier=settled.frontier, notes=(*settled.notes, *report.notes))
