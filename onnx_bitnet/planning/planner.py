"""Convert and plan with goals: find the recipe that reaches them, then do what it says.

The road: try every candidate on every layer (candidates.py), weigh each layer by what its error does to the
outputs (survey.py), order all choices by loss saved for their price (frontier.py), and take the cheapest
that reaches the goal when it is measured (search.py). What comes out is an ordinary recipe with a rule for
each layer.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_bitnet import files, outputs
from onnx_bitnet.calibration.calibration import Calibration
from onnx_bitnet.conversion.convert import convert_as_told, default_output, nothing_converted, plan_as_told
from onnx_bitnet.data.feeds import open_feeds
from onnx_bitnet.errors import RecipeError
from onnx_bitnet.planning.frontier import Option
from onnx_bitnet.planning.goals import Goals
from onnx_bitnet.planning.samples import Samples, apart, together
from onnx_bitnet.planning.search import Search, Settled
from onnx_bitnet.planning.survey import survey, with_gains
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.recipe_values import check_one_of
from onnx_bitnet.report import FrontierPoint, Progress, Reason, Report, named
from onnx_bitnet.validation.validate import Metric

METHODS = ("auto", "weights", "outputs", "model")
_DEFAULT_COSINE = 0.99
_UNUSED = "the calibration data was not used: no step of this recipe needs any"


def settle(
    source: str | Path,
    recipe: Recipe,
    data: object = None,
    *,
    metric: Metric | None = None,
    method: str = "auto",
    workplace: Path,
    wanted: bool = True,
    strict: bool = False,
    progress: Progress | None = None,
) -> Settled:
    """Find the recipe that reaches a recipe's goals.

    Layers that a rule, keep_first or keep_last speak of, and exactly ternary ones, are not touched.

    Args:
        source: an ONNX model.
        recipe: has goals.
        data: feeds as `bn.calibrate` takes them, a Calibration, or None. Only feeds let a goal be measured.
        metric: what `min_metric` is about.
        method: how layers are weighed: `weights` (their own error), `outputs` (the error of the layer's
            output, which needs data), `model` (the error of the model's outputs, one layer at a time, which
            needs feeds), or `auto` for the last of these that is possible.
        workplace: path of a model in an empty folder, in which conversions to measure are made by that name.
        wanted: make the conversion by the recipe that is found, too.
        strict: as in `convert`, for these conversions.
        progress: as in `convert`.

    Raises:
        RecipeError: the goals cannot be reached, or contradict one another, or there is no such method.
        DataError: the data cannot be read, or does not fit.
    """
    check_one_of("method", method, METHODS)
    goals = Goals.of(recipe, metric)
    calibration, samples = _data(source, data, method, goals)
    groups = survey(Path(source), recipe, method, calibration, samples, progress)
    search = Search(
        source,
        recipe,
        goals,
        with_gains(groups, goals),
        samples,
        workplace,
        wanted=wanted,
        strict=strict,
        progress=progress,
    )
    return search.settle(calibration)


def _data(
    source: str | Path, data: object, method: str, goals: Goals
) -> tuple[Calibration | None, Samples | None]:
    """Return what is known of layers' inputs, or the data from which it can be measured, or neither."""
    if data is None or isinstance(data, Calibration):
        if method == "model" or (method == "outputs" and data is None):
            raise RecipeError(f"method {method!r} needs data to run the model on; give feeds (data)")
        if goals.metric is not None:
            raise RecipeError("min_metric needs data to run the model on; give feeds (data)")
        return data, None
    feeds = open_feeds(files.read(source).model, data)
    if not feeds.rereadable:
        feeds = open_feeds(files.read(source).model, list(feeds))
    # A user's metric may know, by their order, what belongs to all of the batches.
    return None, apart(feeds) if goals.any and goals.metric is None else together(feeds)


@dataclass(frozen=True)
class RankedLayer:
    """What a layer costs the model's outputs, by candidate.

    Args:
        names: the layer, and others that share its weight.
        n: outputs.
        k: inputs.
        gain: loss of the outputs for each unit of noise over signal of the layer.
        options: candidates with their bytes and the loss that is predicted for each.
    """

    names: tuple[str, ...]
    n: int
    k: int
    gain: float
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The layers that are open to choice, the most sensitive first, and the recipe that reaches the goals.

    Args:
        layers: sorted by the loss of their smallest option.
        recipe: what `convert` takes.
        frontier: see report.Report.
        notes: sentences the user should read.
    """

    layers: tuple[RankedLayer, ...]
    recipe: Recipe
    frontier: tuple[FrontierPoint, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as one JSON-able document."""
        return {
            "schema": "onnx_bitnet.sensitivity/1",
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "recipe": self.recipe.to_dict(),
            "frontier": [dataclasses.asdict(point) for point in self.frontier],
            "notes": list(self.notes),
        }


def sensitivity(
    source: str | Path,
    data: object = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    metric: Metric | None = None,
    method: str = "auto",
    progress: Progress | None = None,
) -> Sensitivity:
    """Rank the layers of a model by what few bits in each cost the outputs, and find a recipe.

    Args:
        source: an ONNX model.
        data: see `settle`.
        recipe: its goals; without any, a cosine of 0.99.
        metric: as in `convert`.
        method: see `settle`.
        progress: as in `convert`.
    """
    recipe = Recipe.parse(recipe)
    recipe = recipe if recipe.has_goals else recipe.replace(min_cosine=_DEFAULT_COSINE)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, default_output(source).name)
        settled = settle(
            source,
            recipe,
            data,
            metric=metric,
            method=method,
            workplace=place,
            wanted=False,
            progress=progress,
        )
    layers = [
        RankedLayer(
            group.names, group.linear.weight.n, group.linear.weight.k, group.gain, tuple(group.options())
        )
        for group in settled.groups
    ]
    ranked = sorted(layers, key=lambda layer: -layer.options[0].loss)
    notes = (*settled.notes, *_calibration_notes(data, settled))
    return Sensitivity(tuple(ranked), settled.recipe, settled.frontier, notes)


def _calibration_notes(data: object, settled: Settled) -> Iterator[str]:
    """Say of what worth the calibration is that layers were ranked by, if they were by one."""
    if not isinstance(data, Calibration) or not settled.groups:
        return
    if data.warning:
        yield data.warning
    without = [name for group in settled.groups for name in group.names if name not in data.layers]
    if without:
        why = f"not in the calibration of {data.source}"
        yield f"no data for {named(without)}, {why}: ranked by weights alone"


def convert(
    source: str | Path,
    output: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    data: object = None,
    metric: Metric | None = None,
    force: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert a model's linear layers to packed ops and write it to a new file.

    The input is never changed. The output, and its data file when the weights are large, appear only after
    they have been read back and checked. If the recipe has goals, the layers' own recipe is found first: the
    report tells it, and the frontier it was chosen from.

    Args:
        source: an ONNX model.
        output: where to write; weights of more than 1 MiB go to `<output>.data` beside it.
        recipe: a Recipe, a dict of its fields, or a path to a `.toml` or `.json` file; None for the defaults.
        data: feeds as `bn.calibrate` takes them, or a Calibration: what the recipe needs to know about
            activations, and what goals are measured on. The report says so when it was not used.
        metric: for the goal `min_metric`: a function as `bn.validate` takes it.
        force: overwrite existing output files.
        strict: raise Refused, and write nothing, if a layer with a constant weight cannot be packed.
        progress: called as progress(done, total, layer name) before each layer and once at the end.

    Returns:
        What became of each linear layer.

    Raises:
        RecipeError: the recipe is wrong, one of its rules matches nothing, or its goals cannot be reached.
        ModelError: the model, its external data or a weight cannot be used.
        DataError: the data cannot be read, or does not fit.
        OutputError: the output exists, cannot be written, or does not read back as meant.
        Refused: see strict.
    """
    output = Path(output)
    for target in (output, files.data_path(output)):
        outputs.check_inputs(target, others=(recipe, data))
    recipe = Recipe.parse(recipe)
    options: dict[str, Any] = {"strict": strict, "progress": progress}
    if not recipe.has_goals:
        return _with_notes(convert_as_told(source, output, recipe, data=data, force=force, **options))
    outputs.check_output(files.read(source), output, force=force)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        place = Path(folder, output.name)
        settled = settle(source, recipe, data, metric=metric, workplace=place, **options)
        if settled.conversion is None:
            told = settled.recipe
            report = convert_as_told(source, output, told, data=settled.data, force=force, **options)
        else:
            made, path = settled.conversion.made
            files.install(path, output)
            report = dataclasses.replace(made, output=str(output))
    return _with_search(report, settled)


def plan(
    source: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    data: object = None,
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> Report:
    """Say what `convert` would do to each layer, without writing anything.

    The report's output_bytes is what the files of `convert` would have, to the byte if their name is the
    input's with `.bitnet.onnx`. Its recipe is what `convert` takes to do the same again, without looking for
    it. Arguments and errors are those of `convert`.
    """
    recipe = Recipe.parse(recipe)
    if not recipe.has_goals:
        return _with_notes(plan_as_told(source, recipe, data=data, progress=progress))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, default_output(source).name)
        settled = settle(source, recipe, data, metric=metric, workplace=place, progress=progress)
    if settled.conversion is None:
        report = plan_as_told(source, settled.recipe, data=settled.data, progress=progress)
    else:
        report = dataclasses.replace(settled.conversion.made[0], output=None)
    return _with_search(report, settled)


def _with_notes(report: Report) -> Report:
    """Say so if data was given for nothing."""
    return dataclasses.replace(report, notes=(*report.notes, _UNUSED)) if report.data_unused else report


def _with_search(report: Report, settled: Settled) -> Report:
    """Add what the recipe was chosen from; data that none of its steps needs served the choice.

    The recipe has rules for what the search keeps; the report tells these layers from those of the user's.
    """
    searched = {name for group in settled.groups for name in group.names}
    layers = tuple(
        dataclasses.replace(layer, reason=Reason.KEPT_BY_SEARCH, detail="")
        if layer.reason is Reason.KEPT_BY_RULE and layer.name in searched
        else layer
        for layer in report.layers
    )
    said, now = nothing_converted(report.layers), nothing_converted(layers)
    notes = (*settled.notes, *(now if note == said else note for note in report.notes))
    points = _sized(settled.frontier, report.output_bytes)
    return dataclasses.replace(report, layers=layers, frontier=points, notes=notes, data_unused=False)


def _sized(points: tuple[FrontierPoint, ...], nbytes: int) -> tuple[FrontierPoint, ...]:
    """Return a frontier whose chosen point has the size of its files.

    What its ops and their bodies take beside tensors, which the search did not count, others take too; not
    the one without any, which loses nothing.
    """
    more = next((nbytes - point.nbytes for point in points if point.chosen), 0)
    return tuple(
        dataclasses.replace(point, nbytes=point.nbytes + (more if point.loss or point.chosen else 0))
        for point in points
    )
