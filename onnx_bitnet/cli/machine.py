"""Commands about speed and this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import onnx_bitnet as bn
from onnx_bitnet.cli import tables
from onnx_bitnet.cli.common import (
    FAILURE,
    AsJson,
    Data,
    Dim,
    Seed,
    Threads,
    Verbose,
    errors,
    show,
    shown_progress,
    to_dims,
)
from onnx_bitnet.doctor import examine
from onnx_bitnet.timing.bench import bench as bench_models


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
    with errors(), shown_progress("timing") as progress:
        result = bench_models(
            models,
            data,
            threads=threads,
            seconds=seconds,
            seed=seed,
            dims=to_dims(dim),
            with_peers=peers,
            progress=progress,
        )
    show(result.to_dict() if as_json else tables.bench(result, verbose=verbose))


def kernels(as_json: AsJson = False) -> None:
    """List every compiled kernel, which of them run on this CPU, and which are chosen."""
    with errors():
        listed = bn.kernels()
    show(tables.kernels_document(listed) if as_json else tables.kernels(listed))


def doctor(as_json: AsJson = False) -> None:
    """Check this installation: CPU, kernels against the oracle, onnxruntime and the op library."""
    with errors():
        checks = examine()
    show(tables.doctor_document(checks) if as_json else tables.doctor(checks))
    if not all(check.ok for check in checks):
        raise typer.Exit(FAILURE)
