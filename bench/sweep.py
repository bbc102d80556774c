"""Looks for shapes that cost more than their neighbours: tails of rows, outputs or inputs handled badly.

    python bench/sweep.py [--axes M N K] [--at 1 33] [--bits 8 16] [--block-size 0 128] [--isa avx2]

One size of a packed layer changes while the others stay: the rows M from 1 to 4096, the outputs N, the
inputs K, with powers of two, odd sizes and those around the edges of what kernels work in. N and K change at
each number of rows in --at. All sizes of a curve are timed in turns, without ONNX Runtime and on one thread,
and the least time counts.

A size should cost no more than 1.5 times what the curve through its two neighbours says (a line in
logarithms; at the end of the curve, in proportion to its neighbour), and no more than 1.5 times any greater
size. The last column is its time over the least of these; lines beyond 1.5 have an arrow, and are printed
again at the end. A curve with such lines is timed up to three times more, since other work on the machine
makes them, too. Calls from Python cost some microseconds, which make curves of small sizes flatter.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import machine
import numpy as np
from timing import print_row, print_table_head

from onnx_bitnet import _native, reference
from onnx_bitnet.timing.bench import in_turns

ROWS = (*range(1, 10), 12, 15, 16, 17, 24, 31, 32, 33, 34, 48, 63, 64, 65, 96, 127, 128, 129)
MORE_ROWS = (191, 255, 256, 257, 385, 511, 512, 513, 1000, 1024, 1025, 2047, 2048, 2049, 4095, 4096)
SIZES = (256, 257, 272, 300, 319, 320, 321, 384, 385, 400, 511, 512, 513, 575, 640, 1000, 1023, 1024, 1025)
MORE_SIZES = (1536, 1537, 2047, 2048, 2049, 2559, 2560, 2561, 4095, 4096, 4097, 5000, 6911, 6912, 6913)
AXES = {"M": (*ROWS, *MORE_ROWS), "N": (*SIZES, *MORE_SIZES), "K": (*SIZES, *MORE_SIZES)}
SHAPE = {"M": 1, "N": 2560, "K": 2560}
LIMIT = 1.5
TURN = 0.004  # seconds
TRIES = 4


@dataclass(frozen=True)
class Kind:
    """What layers of a curve have in common."""

    bits: int
    block_size: int
    isa: str | None


@dataclass(frozen=True)
class Point:
    """One size on a curve; `off` is its time over what others let one expect."""

    axis: str
    bits: int
    block_size: int
    m: int
    n: int
    k: int
    us: float
    ps_per_product: float
    off: float


def off_curve(sizes: Sequence[int], times: Sequence[float]) -> list[float]:
    """Return each time over the least that neighbours and greater sizes let one expect; sizes ascend."""
    found = []
    for i, (size, took) in enumerate(zip(sizes, times, strict=True)):
        expected = list(times[i + 1 :])
        if 0 < i < len(sizes) - 1:
            below, above = i - 1, i + 1
            share = math.log(size / sizes[below]) / math.log(sizes[above] / sizes[below])
            expected.append(times[below] * (times[above] / times[below]) ** share)
        elif i > 0:
            expected.append(times[i - 1] * size / sizes[i - 1])
        found.append(took / min(expected, default=took))
    return found


def layer(kind: Kind, m: int, n: int, k: int) -> Callable[[], object]:
    """Return a call of a packed layer with random weights."""
    rng = np.random.default_rng(0)
    packed = reference.pack_i2s(rng.integers(0, 3, (1, n, k), np.uint8))
    scale = np.full((1, n, len(reference.group_starts(k, kind.block_size))), 0.02, np.float32)
    options = {"k": k, "block_size": kind.block_size, "activation_bits": kind.bits, "isa": kind.isa}
    product = _native.MatMul(packed, scale, None, None, **options)  # type: ignore[arg-type]
    return partial(product, rng.normal(size=(m, k)).astype(np.float32))


def curve(axis: str, at: int, kind: Kind, sizes: Sequence[int], rounds: int) -> Iterator[Point]:
    """Time all sizes of one axis."""
    shapes = [{**SHAPE, "M": at, axis: size} for size in sizes]
    calls = [layer(kind, shape["M"], shape["N"], shape["K"]) for shape in shapes]
    times = [math.inf] * len(sizes)
    for _ in range(TRIES):
        again = in_turns(calls, rounds, TURN)
        times = [min(took, 1e6 * found.least) for took, found in zip(times, again, strict=True)]
        if max(off_curve(sizes, times)) <= LIMIT:
            break
    for shape, took, off in zip(shapes, times, off_curve(sizes, times), strict=True):
        m, n, k = shape.values()
        yield Point(axis, kind.bits, kind.block_size, m, n, k, took, 1e6 * took / (m * n * k), off)


def show(point: Point) -> None:
    print_row(
        point.axis,
        f"A{point.bits}" + (f" block:{point.block_size}" if point.block_size else ""),
        point.m,
        point.n,
        point.k,
        f"{point.us:.1f}",
        f"{point.ps_per_product:.2f}",
        f"{point.off:.2f}" + (" <-" if point.off > LIMIT else ""),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--at", type=int, nargs="+", default=[1, 33], help="rows while N or K changes")
    parser.add_argument("--bits", type=int, nargs="+", choices=(8, 16, 32), default=[8])
    parser.add_argument("--block-size", type=int, nargs="+", default=[0])
    parser.add_argument("--isa", help="the strongest instruction set that may be used")
    parser.add_argument("--most", type=int, default=4096, help="rows of the last M")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    arguments = parser.parse_args()
    about = machine.describe([1])
    machine.print_header(about)
    columns = ("axis", "kind", "M", "N", "K", "us", "ps per product", "off")
    print_table_head(*columns)
    points = []
    for bits in arguments.bits:
        for block_size in arguments.block_size:
            for axis in arguments.axes:
                sizes = [size for size in AXES[axis] if axis != "M" or size <= arguments.most]
                for at in [1] if axis == "M" else arguments.at:
                    kind = Kind(bits, block_size, arguments.isa)
                    for point in curve(axis, at, kind, sizes, arguments.rounds):
                        show(point)
                        points.append(point)
    cliffs = [point for point in points if point.off > LIMIT]
    print(f"\n{len(cliffs)} of {len(points)} sizes are more than {LIMIT} times off their curve")
    for point in cliffs:
        show(point)
    machine.write_json(arguments.json, "sweep", {"machine": about, "points": list(map(asdict, points))})


if __name__ == "__main__":
    main()
