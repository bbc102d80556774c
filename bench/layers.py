"""Times one ternary linear layer under this package and under everything else that could run it.

    python bench/layers.py [--shapes 2560x2560] [--m 1 8 128] [--threads 1 2] [--where hot cold]

The others are ONNX Runtime in fp32, dynamic int8 and MatMulNBits (2, 4 and 8 bits, blocks of 32 and 128,
accuracy_level 4), and llama.cpp's types if the wheel `xllamacpp` is installed. All hold the same weights, and
each result is first compared with fp32.

`hot` runs one layer again and again. `cold` runs a graph of so many copies with weights of their own that
each comes from DRAM, and gives the time of one; it needs 1 to 2 GiB of memory for each contender (choose
some with --only) and is done for few rows, since with many the weights do not matter. In every round each in
turn runs for about 20 ms; the tables have the medians in microseconds, and how many times faster the best of
ours is than the best of the others.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ggml
import machine
import numpy as np
import timing
from peers import ORT, OURS, Layer, OrtLayers

from onnx_bitnet.timing.bench import in_turns

SHAPES = [(2560, 2560)]
ROWS = [1, 2, 4, 8, 16, 32, 128, 512]
COLD = 1 << 30
COLD_ROWS = 32
TOLERANCE = (
    0.3  # relative L2 distance from fp32 of a right result; Q2_K, which is not lossless here, has 0.23
)
Contender = tuple[str, Any, int]  # name, what runs, bytes of its weights


def contenders(
    layer: Layer, threads: int, cold: int, only: re.Pattern[str], stack: ExitStack
) -> Iterator[Contender]:
    """Open everything that can run the layer, one copy or (cold) that many bytes of copies."""

    def copies(nbytes: int) -> int:
        return max(1, -(-cold // nbytes))

    for name, spell in (OURS | ORT).items():
        if only.search(name):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            spelling = spell(layer)
            count = copies(spelling.nbytes)
            yield name, OrtLayers(spelling, layer, count, threads, folder), spelling.nbytes
    library = ggml.load()
    for suffix, memory in ggml.buffer_types(library).items() if library else ():
        for kind, number in ggml.TYPES.items():
            name = f"llama.cpp {kind}{suffix}"
            if not only.search(name):
                continue
            nbytes = library.ggml_row_size(number, layer.k) * layer.n
            try:
                layers = ggml.GgmlLayers(library, number, memory, layer, copies(nbytes), threads)
            except ValueError:
                continue
            stack.callback(layers.close)
            yield name, layers, nbytes


def distance(y: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


def measure(open_ones: list[Contender], layer: Layer, m: int, rounds: int) -> list[dict[str, Any]]:
    """Check and time all contenders with m rows.

    Raises:
        SystemExit: a result is wrong.
    """
    expected = layer.expected(m)
    errors = []
    for name, runner, _ in open_ones:
        runner.prepare(m)
        errors.append(distance(runner.first(m), expected))
        if not errors[-1] < TOLERANCE:
            raise SystemExit(f"{name}, {layer.n}x{layer.k}, M = {m}: wrong by {errors[-1]:.2g}")
    times = in_turns([runner.run for _, runner, _ in open_ones], rounds)
    return [
        {
            "name": name,
            "min_us": 1e6 * took.least / runner.copies,
            "median_us": 1e6 * took.median / runner.copies,
            "weight_bytes": nbytes,
            "error": error,
        }
        for (name, runner, nbytes), took, error in zip(open_ones, times, errors, strict=True)
    ]


def ratio(results: list[dict[str, Any]], show: str) -> str:
    ours = [result[show] for result in results if result["name"].startswith("ours")]
    others = [result for result in results if not result["name"].startswith("ours")]
    if not ours or not others:
        return ""
    best = min(others, key=lambda result: result[show])
    return f"{best[show] / min(ours):.2f} × {best['name']}"


def shape(text: str) -> tuple[int, int]:
    n, k = map(int, text.split("x"))
    return n, k


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--m", nargs="+", type=int, default=ROWS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--where", nargs="+", choices=("hot", "cold"), default=["hot", "cold"])
    parser.add_argument(
        "--cold-bytes", type=int, default=COLD, help="bytes of weights of each; default 1 GiB"
    )
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="regex of names to time")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--least", action="store_true", help="show the shortest times: for a busy machine")
    parser.add_argument("--limits", type=Path, help="JSON of bench/machine.py; default: measured now")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    arguments = parser.parse_args()

    show = "min_us" if arguments.least else "median_us"
    about = machine.describe(arguments.threads)
    machine.print_header(about)
    limits = machine.limits_from(arguments.limits, arguments.threads)
    for each in limits:
        machine.print_limits(each)
    cells = []
    for n, k in arguments.shapes:
        layer = Layer(n, k)
        for where in arguments.where:
            for threads in arguments.threads:
                with ExitStack() as stack:
                    cold = arguments.cold_bytes if where == "cold" else 0
                    open_ones = list(contenders(layer, threads, cold, arguments.only, stack))
                    print(f"\n{n}x{k}, {where}, {threads} threads; µs\n")
                    names = [name for name, _, _ in open_ones]
                    timing.print_table_head("M", *names, "best of ours against best of others")
                    for m in (m for m in arguments.m if where == "hot" or m <= COLD_ROWS):
                        results = measure(open_ones, layer, m, arguments.rounds)
                        cell = {"n": n, "k": k, "m": m, "where": where, "threads": threads}
                        cells.append(cell | {"results": results})
                        row = [f"{result[show]:.1f}" for result in results]
                        timing.print_row(m, *row, ratio(results, show))
                    open_ones.clear()
    machine.write_json(arguments.json, "layers", {"machine": about, "limits": limits, "layers": cells})


if __name__ == "__main__":
    main()
