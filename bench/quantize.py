"""Times the routines between float weights and codes, and the quantization of activations, in GB/s.

    python bench/quantize.py [--shape 4096 4096] [--types float32 float16] [--threads 1 2] [--only mse unpack]

A weight counts as four bytes, whatever its type, so that the figures compare. Layouts: `rows` is (N, K) as
it lies in memory, `columns` the transposed view of (K, N), as MatMul has its weights. Every figure is the
best of many runs. On a busy machine take `--cpu-time`: then other programs cost caches and memory alone.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator

import machine
import ml_dtypes
import numpy as np

from onnx_bitnet import _native
from onnx_bitnet.quantization import scales
from onnx_bitnet.quantization.detect import check_weight, detect
from onnx_bitnet.quantization.quantize import quantize_layer
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.quantization.spec import LayerSpec

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LAYOUTS = ("rows", "columns")


def weight_routines(weight: np.ndarray, exact: np.ndarray) -> dict[str, Callable[[], object]]:
    """Return what reads a weight, by name; `exact` is a ternary weight of the same kind."""

    def layer(**options: object) -> Quantized:
        return quantize_layer(weight, LayerSpec(**options))  # type: ignore[arg-type]

    return {
        "check": lambda: check_weight(weight),
        "detect ternary": lambda: detect(exact),
        "moments tensor": lambda: scales.largest(weight, "tensor"),
        "moments block:128": lambda: scales.largest(weight, "block:128"),
        "layer absmean block:128": lambda: layer(granularity="block:128", rounding="absmean"),
        "layer absmean tensor": lambda: layer(granularity="tensor", rounding="absmean"),
        "layer absmean 3 planes": lambda: layer(granularity="channel", rounding="absmean", planes=3),
        "layer twn channel": lambda: layer(granularity="channel", rounding="twn"),
        "layer mse block:128": lambda: layer(granularity="block:128"),
        "layer mse block:128 4 levels": lambda: layer(granularity="block:128", levels=4),
        "layer mse channel": lambda: layer(granularity="channel"),
        "layer mse tensor": lambda: layer(granularity="tensor"),
        "layer int8 channel": lambda: layer(integer_bits=8),
    }


def decode_routines(weight: np.ndarray) -> dict[str, Callable[[], object]]:
    """Return what writes weights, by name; outputs are new memory, as for a caller."""
    packed = quantize_layer(weight, LayerSpec(granularity="block:128", rounding="absmean"))
    out = np.empty(weight.shape, np.float32)
    tables = (packed.scale.astype(np.float32), np.broadcast_to(np.float32(1), packed.scale.shape).copy())

    def into(first: int, last: int) -> None:
        _native.dequantize(packed.weight, *tables, packed.k, 128, out[first:last], first, last)

    return {
        "unpack": packed.codes,
        "dequantize": packed.dequantize,
        "dequantize in place": lambda: list(scales.over_rows(weight, into)),
    }


def activation_routines(size: int) -> dict[str, Callable[[], object]]:
    """Return the quantization of one row again and again, and of many rows that lie in memory."""
    k = 1 << 16  # long, so that calls from Python cost little
    rows = max(1, size // k)
    x = np.random.default_rng(0).normal(size=(rows, k)).astype(np.float32)
    isa = _native.find("actq", "f32")

    def run(bits: int, stop: int) -> None:
        q, sums = np.empty((bits // 8, -(-k // 16) * 16), np.int8), np.empty(1, np.int64)
        for row in range(rows):
            _native.actq(x[row % stop], q, sums, bits=bits, isa=isa)

    return {
        f"activations {bits} bits, {name}": lambda bits=bits, stop=stop: run(bits, stop)
        for bits in (8, 16)
        for name, stop in (("one row", 1), ("from memory", rows))
    }


def cases(shape: tuple[int, int], types: list[str]) -> Iterator[tuple[str, str, str, Callable[[], object]]]:
    """Yield (routine, type, layout, function)."""
    rng = np.random.default_rng(0)
    normal = (0.05 * rng.normal(size=shape)).astype(np.float32)
    ternary = rng.integers(-1, 2, shape).astype(np.float32) * np.float32(0.05)
    for name in types:
        for layout in LAYOUTS:
            order = "C" if layout == "rows" else "F"
            pair = (weight.astype(TYPES[name], order=order) for weight in (normal, ternary))
            for routine, function in weight_routines(*pair).items():
                yield routine, name, layout, function
    for routine, function in {**decode_routines(normal), **activation_routines(normal.size)}.items():
        yield routine, "float32", "rows", function


def best(function: Callable[[], object], clock: Callable[[], float], seconds: float) -> float:
    """Return the least time of a call."""
    least, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop or least == float("inf"):
        start = clock()
        function()
        least = min(least, clock() - start)
    return least


def main() -> None:
    """Print a line for each routine, type and layout, with a column for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of routines")
    parser.add_argument("--seconds", type=float, default=0.3, help="that each figure takes")
    parser.add_argument("--cpu-time", action="store_true", help="time by CPU, over the number of threads")
    arguments = parser.parse_args()
    shape = tuple(arguments.shape)
    machine.print_header(machine.describe(arguments.threads))
    print(f"{shape[0]} x {shape[1]}, GB/s")
    print(f"{'':32}{'':10}{'':9}", *(f"{threads:7}" for threads in arguments.threads))
    cpus = sorted(os.sched_getaffinity(0))
    for routine, name, layout, function in cases(shape, arguments.types):
        if not any(part in routine for part in arguments.only):
            continue
        figures = []
        for threads in arguments.threads:
            os.sched_setaffinity(0, cpus[:threads])  # which is what over_rows goes by
            clock, share = (time.process_time, threads) if arguments.cpu_time else (time.perf_counter, 1)
            least = best(function, clock, arguments.seconds) / share
            figures.append(4e-9 * shape[0] * shape[1] / least)
        print(f"{routine:32}{name:10}{layout:9}", *(f"{figure:7.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
