"""What all commands share: options, the two consoles, errors and progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from onnx_bitnet import outputs
from onnx_bitnet.calibration.calibration import Calibration, is_calibration
from onnx_bitnet.cli import tables
from onnx_bitnet.errors import BitNetError, OutputError, RecipeError
from onnx_bitnet.validation.validate import Metric, load_metric

FAILURE, GATE_FAILED = 1, 3

# A program that reads the tables wants one line per row, so only a terminal sets their width.
out = Console(width=None if sys.stdout and sys.stdout.isatty() else 200)
err = Console(stderr=True)

Source = Annotated[Path, typer.Argument(help="an ONNX model", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Force = Annotated[bool, typer.Option("--force", help="overwrite the output")]
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


def show(what: dict[str, Any] | tables.Output) -> None:
    """Print a document, or what people read."""
    with errors(), finding_room():
        _print(what)
        out.file.flush()


@contextmanager
def finding_room() -> Iterator[None]:
    """Make results that find no room one error."""
    try:
        yield
    except BrokenPipeError:
        raise  # its reader has seen enough
    except OSError as error:
        # Python flushes once more when it ends
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise OutputError(f"cannot write the results: {error.strerror}") from None


def _print(what: dict[str, Any] | tables.Output) -> None:
    if isinstance(what, dict):
        out.file.write(json.dumps(what, indent=2, allow_nan=False) + "\n")
        return
    for part in what:
        out.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)


@contextmanager
def errors() -> Iterator[None]:
    """Print an error of ours in one line, and exit with its code."""
    try:
        yield
    except BitNetError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None


@contextmanager
def shown_progress(verb: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield what to call as work goes on; a terminal shows a bar."""
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield update


def check_outputs(
    *targets: Path | None,
    force: bool,
    models: Sequence[Path],
    others: Sequence[Path | None],
    metric: str | None = None,
) -> None:
    """Raise OutputError if a command would overwrite what it reads, or without --force what is there.

    Args:
        targets: all that it writes; None is skipped.
        force: see Force.
        models: the models it reads.
        others: the other files and folders it reads.
        metric: the option, whose script it reads.
    """
    script = (metric or "").rpartition(":")[0] or None
    for target in filter(None, targets):
        outputs.check_free(target, force=force, models=models, others=(*others, script))


def to_metric(where: str | None) -> Metric | None:
    """Load the function that --metric names.

    Raises:
        DataError: there is none.
    """
    return load_metric(where) if where else None


def to_calibration(data: Path | None) -> Calibration | Path | None:
    """Read a file that `calibrate` wrote; leave other data to be read as feeds."""
    return Calibration.load(data) if data is not None and is_calibration(data) else data


def to_dims(given: list[str] | None) -> dict[str, int]:
    """Read NAME=SIZE."""
    pairs = [item.partition("=") for item in given or ()]
    for name, _, size in pairs:
        if not name or not size.isdecimal():
            raise RecipeError(f"--dim {name}={size}: write NAME=SIZE, for example --dim batch=4")
    return {name: int(size) for name, _, size in pairs}
