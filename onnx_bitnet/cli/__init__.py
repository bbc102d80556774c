"""The command `onnx-bitnet`: parse, call, print. Results on stdout, progress and errors on stderr."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from onnx_bitnet import interrupts
from onnx_bitnet.cli.common import err, show
from onnx_bitnet.cli.language import build, generate
from onnx_bitnet.cli.machine import bench, doctor, kernels
from onnx_bitnet.cli.models import calibrate, convert, inspect, plan, sensitivity, validate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        show([version("onnx-bitnet")])
        raise typer.Exit


@app.callback()
def about(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="print it and end")
    ] = False,
) -> None:
    """Turn the linear layers of ONNX models into few-bit ones and run them fast on CPUs."""


for command in (
    convert,
    plan,
    sensitivity,
    calibrate,
    inspect,
    validate,
    bench,
    kernels,
    doctor,
    build,
    generate,
):
    app.command()(command)


def main() -> NoReturn:
    """Run the command line; it exits with the codes of errors.py and common.py, or 128 + a signal."""
    interrupts.run(app, err.print)
