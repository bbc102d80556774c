"""Commands about the model of a user: convert it, and look at what that does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import onnx_bitnet as bn
from onnx_bitnet import files, outputs, recipe_file
from onnx_bitnet.arguments import check_whole
from onnx_bitnet.cli import tables
from onnx_bitnet.cli.common import (
    GATE_FAILED,
    AsJson,
    CalibrationData,
    Data,
    Dim,
    Force,
    Mask,
    MetricOption,
    Seed,
    Source,
    Threads,
    Verbose,
    check_outputs,
    err,
    errors,
    show,
    shown_progress,
    to_calibration,
    to_dims,
    to_metric,
)
from onnx_bitnet.cli.options import Given, to_recipe, with_recipe
from onnx_bitnet.conversion.convert import default_output
from onnx_bitnet.data.padding import USUAL
from onnx_bitnet.errors import OutputError, RecipeError
from onnx_bitnet.inspection import inspect as inspect_file
from onnx_bitnet.planning.planner import sensitivity as rank_layers
from onnx_bitnet.report import read_frontier
from onnx_bitnet.validation import plots


@with_recipe
def convert(
    source: Source,
    recipe: Given,
    output: Annotated[
        Path | None, typer.Argument(help="default: the input's name with .bitnet.onnx", show_default=False)
    ] = None,
    data: CalibrationData = None,
    metric: MetricOption = None,
    force: Force = False,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 4 if a layer is refused")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Pack a model's linear layers, write the result and check it."""
    with errors(), shown_progress("converting") as progress:
        output = output or default_output(source)
        check_outputs(
            *(output, files.data_path(output)),
            force=force,
            models=(source,),
            others=(data, recipe["recipe"]),
            metric=metric,
        )
        report = bn.convert(
            source,
            output,
            to_recipe(recipe),
            data=to_calibration(data),
            metric=to_metric(metric),
            force=force,
            strict=strict,
            progress=progress,
        )
    show(report.to_dict() if as_json else tables.report(report, verbose=verbose))


@with_recipe
def plan(
    source: Source,
    recipe: Given,
    data: CalibrationData = None,
    metric: MetricOption = None,
    plot: Annotated[Path | None, typer.Option(help="draw the frontier of a goal (.svg or .png)")] = None,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = True,
) -> None:
    """Say what convert would do to each layer, and write no model."""
    with errors(), shown_progress("planning") as progress:
        others = (data, recipe["recipe"])
        check_outputs(plot, force=force, models=(source,), others=others, metric=metric)
        told = to_recipe(recipe)
        if plot is not None:
            _check_plot(plot, told)
        report = bn.plan(source, told, data=to_calibration(data), metric=to_metric(metric), progress=progress)
        if plot is not None:
            plots.frontier(report.frontier, plot)
    show(report.to_dict() if as_json else tables.report(report, verbose=verbose))


def _check_plot(plot: Path, recipe: bn.Recipe) -> None:
    if plot.suffix.lower() not in (".svg", ".png"):
        raise OutputError(f"{plot}: a plot is .svg or .png; choose such a name")
    if not recipe.has_goals:
        raise RecipeError("--plot draws the frontier of a goal; give one, for example --min-cosine 0.99")


@with_recipe
def sensitivity(
    source: Source,
    recipe: Given,
    data: CalibrationData = None,
    metric: MetricOption = None,
    method: Annotated[str, typer.Option(help="weigh layers by weights, outputs, model or auto")] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="write the recipe that reaches the goals here")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Rank layers by what few bits in each cost, and find the recipe that reaches the goals (0.99 cosine)."""
    with errors(), shown_progress("trying") as progress:
        others = (data, recipe["recipe"])
        check_outputs(output, force=force, models=(source,), others=others, metric=metric)
        result = rank_layers(
            source,
            to_calibration(data),
            to_recipe(recipe),
            metric=to_metric(metric),
            method=method,
            progress=progress,
        )
        if output is not None:
            outputs.write_text(output, recipe_file.text(result.recipe.to_dict(), output))
    show(result.to_dict() if as_json else tables.sensitivity(result))


def calibrate(
    source: Source,
    output: Annotated[
        Path | None,
        typer.Argument(help="default: the input's name with .calibration.npz", show_default=False),
    ] = None,
    data: Data = None,
    max_samples: Annotated[int | None, typer.Option(help="stop after so many samples")] = None,
    max_memory: Annotated[int, typer.Option(help="MiB for statistics and activations of one pass")] = 1024,
    second_moments: Annotated[bool, typer.Option(help="also X^T X, for rounding gptq")] = True,
    mask: Mask = USUAL,
    dim: Dim = None,
    seed: Seed = 0,
    threads: Threads = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Run a float model over data and write statistics of what each linear layer reads."""
    with errors(), shown_progress("calibrating") as progress:
        output = output or source.with_name(f"{source.stem}.calibration.npz")
        check_outputs(output, force=force, models=(source,), others=(data,))
        check_whole("--max-memory", max_memory, 1)
        result = bn.calibrate(
            source,
            data,
            second_moments=second_moments,
            max_samples=max_samples,
            max_memory=max_memory << 20,
            mask=mask,
            threads=threads,
            seed=seed,
            dims=to_dims(dim),
            progress=progress,
        )
        result.save(output, force=force)
    show(result.to_dict() if as_json else tables.calibration(result, output))


def inspect(file: Source, as_json: AsJson = False) -> None:
    """Show what a model file holds: packed layers, and linear layers that are still float."""
    with errors():
        inspection = inspect_file(file)
    show(inspection.to_dict() if as_json else tables.inspection(inspection))


def validate(
    reference: Annotated[Path, typer.Argument(help="the float model", show_default=False)],
    got: Annotated[Path, typer.Argument(help="the converted model", show_default=False)],
    data: Data = None,
    min_sqnr: Annotated[float | None, typer.Option(help="gate: dB that every output must reach")] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="gate: cosine that every output must reach")
    ] = None,
    dim: Dim = None,
    seed: Seed = 0,
    threads: Threads = 0,
    layers: Annotated[bool, typer.Option(help="also compare each converted layer")] = True,
    mask: Mask = USUAL,
    metric: MetricOption = None,
    min_metric: Annotated[float | None, typer.Option(help="gate: value of --metric to be reached")] = None,
    html: Annotated[Path | None, typer.Option(help="also write a page with plots here")] = None,
    frontier: Annotated[
        Path | None, typer.Option(help="what convert --json said: the page draws its frontier")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="also write a table of the layers here")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Run two models on the same data and measure how far apart their results are."""
    gates = {"min_sqnr": min_sqnr, "min_cosine": min_cosine, "min_metric": min_metric}
    with errors(), shown_progress("validating") as progress:
        others = (data, frontier)
        check_outputs(html, csv, force=force, models=(reference, got), others=others, metric=metric)
        points = read_frontier(frontier) if frontier is not None else ()
        result = bn.validate(
            reference,
            got,
            data,
            threads=threads,
            seed=seed,
            dims=to_dims(dim),
            layers=layers,
            mask=mask,
            metric=to_metric(metric),
            progress=progress,
        )
    show(result.to_dict() if as_json else tables.validation(result))
    with errors():
        if html:
            result.to_html(html, **gates, frontier=points)
        if csv:
            result.to_csv(csv)
    failures = result.failures(**gates)
    if failures:
        err.print(f"gate failed: {'; '.join(failures)}", style="red", markup=False, highlight=False)
        raise typer.Exit(GATE_FAILED)
