"""The command `onnx-bitnet`: parse, call, print. Results on stdout, progress and errors on stderr."""

from __future__ import annotations

from typing import NoReturn

import typer

from onnx_bitnet import interrupts
from onnx_bitnet.cli.common import err
from onnx_bitnet.cli.language import build, generate
from onnx_bitnet.cli.machine import bench, doctor, kernels
from onnx_bitnet.cli.models import calibrate, convert, inspect, plan, sensitivity, validate

app = typer.Typer(
    help="Turn the linear layers of ONNX models into few-bit ones and run them fast on CPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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
    """Run the command line; the process ends with design section 5's exit codes."""
    interrupts.run(app, err.print)
