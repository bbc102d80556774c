"""The command `onnx-bitnet`: parse, call, print. Results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import onnx_bitnet as bn
from onnx_bitnet import interrupts, tables
from onnx_bitnet.calibration.calibrate import Calibration, is_calibration
from onnx_bitnet.conversion.convert import default_output
from onnx_bitnet.data.padding import USUAL
from onnx_bitnet.decoder import Generator, Options, Sampling
from onnx_bitnet.decoder import build as build_decoder
from onnx_bitnet.decoder.folder import named_architecture
from onnx_bitnet.doctor import examine
from onnx_bitnet.errors import BitNetError, OutputError, RecipeError
from onnx_bitnet.inspection import inspect as inspect_file
from onnx_bitnet.options import Given, to_recipe, with_recipe
from onnx_bitnet.planning.planner import sensitivity as rank_layers
from onnx_bitnet.report import read_frontier
from onnx_bitnet.timing.bench import bench as bench_models
from onnx_bitnet.validation import plots
from onnx_bitnet.validation.validate import Metric, load_metric

FAILURE, GATE_FAILED = 1, 3

app = typer.Typer(
    help="Turn the linear layers of ONNX models into few-bit ones and run them fast on CPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# A program that reads the tables wants one line per row, so only a terminal sets their width.
out = Console(width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True)

Source = Annotated[Path, typer.Argument(help="an ONNX model", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="every layer, not only the summary")]
Threads = Annotated[int, typer.Option(help="threads for onnxruntime; 0 lets it choose")]

Data = Annotated[
    Path | None,
    typer.Option(help=".npz, a folder of them, or ONNX test_data_set folders; default: random feeds"),
]
Dim = Annotated[list[str] | None, typer.Option(help="NAME=SIZE of a symbolic dimension of random feeds")]
Seed = Annotated[int, typer.Option(help="of random feeds")]
Mask = Annotated[str, typer.Option(help="input that is 0 where data is padding, or none")]

CalibrationData = Annotated[
    Path | None, typer.Option("--data", help="feeds as in validate, or what calibrate wrote")
]
MetricOption = Annotated[
    str | None,
    typer.Option("--metric", help="FILE.py:FUNCTION(batches, outputs) that returns a number"),
]


@app.command()
@with_recipe
def convert(
    source: Source,
    recipe: Given,
    output: Annotated[
        Path | None, typer.Argument(help="default: the input's name with .bitnet.onnx", show_default=False)
    ] = None,
    data: CalibrationData = None,
    metric: MetricOption = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the output")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 4 if a layer is refused")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Pack a model's linear layers, write the result and check it."""
    with _errors(), _progress("converting") as progress:
        report = bn.convert(
            source,
            output or default_output(source),
            to_recipe(recipe),
            data=_calibration(data),
            metric=_metric(metric),
            force=force,
            strict=strict,
            progress=progress,
        )
    _show(report.to_dict() if as_json else tables.report(report, verbose=verbose))


@app.command()
@with_recipe
def plan(
    source: Source,
    recipe: Given,
    data: CalibrationData = None,
    metric: MetricOption = None,
    plot: Annotated[Path | None, typer.Option(help="draw the frontier of a goal (.svg or .png)")] = None,
    as_json: AsJson = False,
    verbose: Verbose = True,
) -> None:
    """Say what convert would do to each layer, and write no model."""
    with _errors(), _progress("planning") as progress:
        report = bn.plan(
            source, to_recipe(recipe), data=_calibration(data), metric=_metric(metric), progress=progress
        )
        if plot is not None:
            plots.frontier(report.frontier, plot)
    _show(report.to_dict() if as_json else tables.report(report, verbose=verbose))


@app.command()
@with_recipe
def sensitivity(
    source: Source,
    recipe: Given,
    data: CalibrationData = None,
    metric: MetricOption = None,
    method: Annotated[str, typer.Option(help="weigh layers by weights, outputs, model or auto")] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="write the recipe that reaches the goals (.json)")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the output")] = False,
    as_json: AsJson = False,
) -> None:
    """Rank layers by what few bits in each cost, and find the recipe that reaches the goals (0.99 cosine)."""
    with _errors(), _progress("trying") as progress:
        if output is not None and output.exists() and not force:
            raise OutputError(f"{output}: exists already; choose another name, or overwrite it with --force")
        result = rank_layers(
            source,
            _calibration(data),
            to_recipe(recipe),
            metric=_metric(metric),
            method=method,
            progress=progress,
        )
        if output is not None:
            output.write_text(json.dumps(result.recipe.to_dict(), indent=2) + "\n", encoding="utf-8")
    _show(result.to_dict() if as_json else tables.sensitivity(result))


@app.command()
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
    force: Annotated[bool, typer.Option("--force", help="overwrite the output")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a float model over data and write statistics of what each linear layer reads."""
    with _errors(), _progress("calibrating") as progress:
        output = output or source.with_name(f"{source.stem}.calibration.npz")
        if output.exists() and not force:
            raise OutputError(f"{output}: exists already; choose another name, or overwrite it with --force")
        result = bn.calibrate(
            source,
            data,
            second_moments=second_moments,
            max_samples=max_samples,
            max_memory=max_memory << 20,
            mask=mask,
            threads=threads,
            seed=seed,
            dims=_dims(dim),
            progress=progress,
        )
        result.save(output)
    _show(result.to_dict() if as_json else tables.calibration(result, output))


@app.command()
def inspect(file: Source, as_json: AsJson = False) -> None:
    """Show what a model file holds: packed layers, and linear layers that are still float."""
    with _errors():
        inspection = inspect_file(file)
    _show(inspection.to_dict() if as_json else tables.inspection(inspection))


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """Run two models on the same data and measure how far apart their results are."""
    gates = {"min_sqnr": min_sqnr, "min_cosine": min_cosine, "min_metric": min_metric}
    with _errors(), _progress("validating") as progress:
        result = bn.validate(
            reference,
            got,
            data,
            threads=threads,
            seed=seed,
            dims=_dims(dim),
            layers=layers,
            mask=mask,
            metric=_metric(metric),
            progress=progress,
        )
    _show(result.to_dict() if as_json else tables.validation(result))
    with _errors():
        if html:
            result.to_html(html, **gates, frontier=read_frontier(frontier) if frontier else ())
        if csv:
            result.to_csv(csv)
    failures = result.failures(**gates)
    if failures:
        err.print(f"gate failed: {'; '.join(failures)}", style="red", markup=False, highlight=False)
        raise typer.Exit(GATE_FAILED)


@app.command()
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(help="models with the same inputs, the float one first", show_default=False),
    ],
    data: Data = None,
    dim: Dim = None,
    seed: Seed = 0,
    threads: Threads = 0,
    seconds: Annotated[float, typer.Option(help="how long each model runs")] = 2.0,
    peers: Annotated[
        bool, typer.Option("--peers", help="also time onnxruntime's own int8 and 2-bit variants of the first")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Time models side by side, and say where packed ones spend their time."""
    with _errors(), _progress("timing") as progress:
        result = bench_models(
            models,
            data,
            threads=threads,
            seconds=seconds,
            seed=seed,
            dims=_dims(dim),
            with_peers=peers,
            progress=progress,
        )
    _show(result.to_dict() if as_json else tables.bench(result, verbose=verbose))


@app.command()
def kernels(as_json: AsJson = False) -> None:
    """List every compiled kernel, which of them run on this CPU, and which are chosen."""
    with _errors():
        listed = bn.kernels()
    _show(tables.kernels_document(listed) if as_json else tables.kernels(listed))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this installation: CPU, kernels against the oracle, onnxruntime and the op library."""
    with _errors():
        checks = examine()
    _show(tables.doctor_document(checks) if as_json else tables.doctor(checks))
    if not all(check.ok for check in checks):
        raise typer.Exit(FAILURE)


@app.command()
def build(
    source: Annotated[
        str, typer.Argument(help="folder of a checkpoint; with --random a geometry", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(help="to write", show_default=False)],
    random: Annotated[
        bool, typer.Option("--random", help="random ternary weights; SOURCE is bitnet-2b4t or a config.json")
    ] = False,
    head: Annotated[str, typer.Option(help="float, int8, int4, packed8 or packed4")] = Options.head,
    embedding: Annotated[str, typer.Option(help="float, int8 or int4")] = Options.embedding,
    format: Annotated[str, typer.Option(help="of ternary weights: i2s, tl1, tl2 or t5")] = Options.format,
    all_logits: Annotated[
        bool, typer.Option("--all-logits", help="logits of every position, not only of the last")
    ] = False,
    attention: Annotated[
        str, typer.Option(help="gqa; or standard, for any runtime: a prompt of 512 takes 16-24 % longer")
    ] = Options.attention,
    layout: Annotated[
        str, typer.Option(help="canonical; or panel, of i2s: opens at once, in mapped memory, for some speed")
    ] = Options.layout,
    linear_class: Annotated[
        str | None, typer.Option(help="bitlinear or autobitlinear, if config.json does not say it")
    ] = None,
    seed: Annotated[int, typer.Option(help="of random weights")] = 0,
    force: Annotated[bool, typer.Option("--force", help="replace the folder")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a ternary language model, ready to generate text, from a Hugging Face checkpoint."""
    with _errors(), _progress("building") as progress:
        built = build_decoder(
            named_architecture(source) if random else source,
            folder,
            Options(head, embedding, format, all_logits, attention, layout),
            seed=seed,
            linear_class=linear_class,
            force=force,
            progress=progress,
        )
    _show(tables.built_document(built) if as_json else tables.built(built))


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="a folder that build has written", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="text to continue")] = None,
    tokens: Annotated[str | None, typer.Option(help="numbers of tokens to continue, instead of text")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="--prompt is a message: answer it, by the model's chat template")
    ] = False,
    count: Annotated[int, typer.Option(help="tokens to generate at most")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time")] = 0.0,
    top_k: Annotated[int, typer.Option(help="draw from so many tokens; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest that have this share")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a text as it comes; the speed goes to stderr."""
    with _errors():
        if (prompt is None) == (tokens is None):
            raise RecipeError("give either --prompt or --tokens")
        if chat and prompt is None:
            raise RecipeError("--chat answers a text; give it with --prompt instead of --tokens")
        sampling = Sampling(temperature, top_k, top_p, seed)
        generator = Generator(model, threads)
        if prompt is not None:
            pieces = generator.text(prompt, count, sampling, chat=chat)
        else:
            numbers = _numbers(str(tokens))
            pieces = (f"{token} " for token in generator.tokens(numbers, count, sampling))
        text, interrupted = "", None
        try:
            for piece in pieces:
                text += piece
                if not as_json:
                    out.file.write(piece)
                    out.file.flush()
        except interrupts.Interrupted as signal:
            interrupted = signal
    _show(tables.generated_document(text, generator.times) if as_json else [""])
    if interrupted is not None:
        err.print(
            "interrupted; what was generated is above" if text else "interrupted before the first token"
        )
    if not as_json:
        err.print(generator.times.summary(), highlight=False)
    if interrupted is not None:
        interrupted.told = True
        raise interrupted


def main() -> NoReturn:
    """Run the command line; the process ends with design section 5's exit codes."""
    interrupts.run(app, err.print)


def _metric(where: str | None) -> Metric | None:
    return load_metric(where) if where else None


def _calibration(data: Path | None) -> Calibration | Path | None:
    """Read a file that `calibrate` wrote; leave other data to be read as feeds."""
    return Calibration.load(data) if data is not None and is_calibration(data) else data


def _dims(given: list[str] | None) -> dict[str, int]:
    pairs = [item.partition("=") for item in given or ()]
    for name, _, size in pairs:
        if not name or not size.isdecimal():
            raise RecipeError(f"--dim {name}={size}: write NAME=SIZE, for example --dim batch=4")
    return {name: int(size) for name, _, size in pairs}


def _numbers(given: str) -> list[int]:
    try:
        return [int(number) for number in given.replace(",", " ").split()]
    except ValueError:
        raise RecipeError(f"--tokens {given!r}: write whole numbers, for example --tokens '1 2 3'") from None


def _show(what: dict[str, Any] | tables.Output) -> None:
    if isinstance(what, dict):
        out.file.write(json.dumps(what, indent=2, allow_nan=False) + "\n")
        return
    for part in what:
        out.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except BitNetError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int, str], None]]:
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield update
