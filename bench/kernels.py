"""Times every kernel of this build that runs here, against what the machine can do at most.

    python bench/kernels.py [--op dot] [--isa avx2] [--shapes 2560x2560] [--m 1 8 128] [--cold]

Each result is first compared with the NumPy oracle. Then the table has, for one thread, the least and the
median time, Gweights/s (weights times rows), GB/s of packed weights (for `dot` and `dotf`) or of what is read
and written (for the others), the share of the measured read bandwidth of the memory that holds them, TOPS,
and the share of the peak of the kernel's own instruction set. What calling a kernel from Python costs is
measured and subtracted, but never more than half. `--cold` takes other weights in each call, 1 GiB in all, so
that they come from DRAM.

To time whole layers rather than super-panels, one call gets many super-panels as one long row of inputs; a
small layer is repeated, with other weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import machine
import numpy as np
from timing import best_of, print_row, print_table_head

import onnx_bitnet as bn
from onnx_bitnet import _native, reference
from onnx_bitnet.timing.bench import Times

SHAPES = [(384, 384), (1536, 384), (2560, 2560), (6912, 2560), (2560, 6912)]
ROWS = [1, 2, 4, 8, 16, 32, 128, 512]
SECONDS = 0.05
SUPER = 64  # outputs of a super-panel
CHAIN = 1 << 18  # bytes of activations that one call gets at most
ENOUGH = 1 << 21  # weights times rows that one call gets at least, if it may
COLD = 1 << 30
L2, L3 = 1 << 20, 16 << 20  # more bytes than this are taken to be further away


@dataclass(frozen=True)
class Case:
    """What a call does: weights, bytes, bytes of all calls, operations; the call, and whether it is right."""

    what: str
    m: int
    weights: int
    nbytes: int
    footprint: int
    operations: int
    call: Callable[[], object]
    check: Callable[[], bool]


@dataclass(frozen=True)
class Row:
    """One line of the table; shares are None where the machine's limit does not apply."""

    kernel: str
    isa: str
    case: str
    m: int
    weights: int
    min_ns: float
    median_ns: float
    gweights: float
    gbps: float
    memory: str
    read_share: float
    tops: float
    peak_share: float | None


def weights(form: str, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return panels of random codes, ternary or of all 4 or 8 bits, and the codes (n, k)."""
    rng = np.random.default_rng(1)
    if form == "i2s":
        codes = rng.integers(0, 3, (n, k), np.uint8)
        return _native.panels(reference.pack_i2s(codes), k, 0)[0], codes
    if form == "t5":
        panels, codes = weights("i2s", n, k)
        return _native.squeezed(panels, n, k), codes
    bits = int(form[1])
    powers = [4**place for place in reversed(range(bits // 2))]
    codes = rng.integers(0, 2**bits, (n, k), np.uint8)
    planes = reference.pack_i2s(np.stack([codes // power % 4 for power in powers]))
    return _native.merged_panels(planes, powers, k, 0, bits=bits)[0], codes


def products(kernel: bn.Kernel, n: int, k: int, m: int, cold: int = 0, enough: int = ENOUGH) -> Case:
    """Make a case for dot and dotf: part of a layer (n, k) with m rows, weights in turn from `cold` bytes."""
    rng = np.random.default_rng(0)
    x = rng.integers(-127, 128, (m, k)).astype(np.int8)
    if kernel.op == "dotf":
        x = x.astype(np.float32)
    supers = max(n // SUPER, enough // (SUPER * k * m))
    supers = max(1, min(supers, CHAIN // (m * k * x.itemsize)))
    panel, codes = weights(kernel.format, supers * SUPER, k)
    many = np.tile(panel, (max(1, -(-cold // panel.nbytes)), 1))
    q = np.tile(x, (1, supers))
    acc = np.zeros((m, supers, SUPER), np.int32 if kernel.op == "dot" else np.float32)
    entry = getattr(_native, kernel.op)
    form = {} if kernel.op == "dotf" else {"format": kernel.format}
    turns = cycle(many)

    def call() -> None:
        entry(next(turns), q, acc, panels=4, group_steps=k // 16, isa=kernel.isa, **form)

    def check() -> bool:
        call()
        signed = codes.astype(np.float64) - (kernel.op == "dotf")
        return bool(np.allclose(acc.reshape(m, -1), x.astype(np.float64) @ signed.T, rtol=1e-6, atol=1e-3))

    size = codes.size
    return Case(f"{n}x{k}", m, size, panel.nbytes, many.nbytes, 2 * m * size, call, check)


def quantization(kernel: bn.Kernel, k: int, bits: int) -> Case:
    """Make a case for actq: one row."""
    x = np.random.default_rng(0).normal(size=k).astype(np.float32)
    q, sums = np.zeros((bits // 8, k), np.int8), np.zeros(1, np.int64)

    def call() -> None:
        _native.actq(x, q, sums, bits=bits, isa=kernel.isa)

    def check() -> bool:
        call()
        expected = reference.quantize_rows(x[None], bits, np.float32(0))[0][0]
        got = q[0] if bits == 8 else 256 * q[0].astype(np.int32) + q[1] + 128
        return np.array_equal(got, expected)

    nbytes = x.nbytes + q.nbytes
    return Case(f"K {k}, {bits} bits", 1, k, nbytes, nbytes, 0, call, check)


def scaling(kernel: bn.Kernel, groups: int, rows: int = 256) -> Case:
    """Make a case for scale: rows of a super-panel."""
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**20), 2**20, (rows, groups, SUPER)).astype(np.int32)
    sums = rng.integers(-(2**12), 2**12, (rows, groups))
    scale = rng.normal(size=(groups, SUPER)).astype(np.float32)
    code_sum, factor = np.zeros((groups, SUPER), np.int32), np.ones(rows, np.float32)
    y, expected = np.zeros((rows, SUPER), np.float32), np.zeros((rows, SUPER), np.float32)

    def run(isa: str, out: np.ndarray) -> None:
        _native.scale(acc, sums, code_sum, scale, None, factor, out, panels=4, isa=isa)

    def check() -> bool:
        run(kernel.isa, y)
        run("scalar", expected)
        return np.array_equal(y, expected)

    nbytes = acc.nbytes + y.nbytes
    return Case(f"{groups} groups", rows, acc.size, nbytes, nbytes, 0, lambda: run(kernel.isa, y), check)


def halves(kernel: bn.Kernel, count: int) -> Case:
    """Make a case for widen and narrow."""
    x = np.random.default_rng(0).normal(size=count).astype(np.float16)
    half, single = x.view(np.uint16).copy(), x.astype(np.float32)
    source, target = (half, np.zeros_like(single)) if kernel.op == "widen" else (single, np.zeros_like(half))
    expected = single if kernel.op == "widen" else half
    entry = getattr(_native, kernel.op)

    def call() -> None:
        entry(source, target, isa=kernel.isa)

    def check() -> bool:
        call()
        return np.array_equal(target, expected)

    nbytes = half.nbytes + single.nbytes
    return Case(f"{count} values", 1, count, nbytes, nbytes, 0, call, check)


def transform(kernel: bn.Kernel, k: int, block_size: int) -> Case:
    """Make a case for hadamard: one row."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, k)).astype(np.float32)
    signs = rng.choice([-1, 1], k).astype(np.float32)
    y = np.zeros_like(x)

    def call() -> None:
        _native.hadamard(x, signs, y, block_size=block_size, isa=kernel.isa)

    def check() -> bool:
        call()
        return np.array_equal(y, reference.block_hadamard(x, signs, block_size))

    nbytes = x.nbytes + y.nbytes
    return Case(f"K {k}, blocks of {block_size}", 1, k, nbytes, nbytes, 0, call, check)


def attending(kernel: bn.Kernel, tokens: int, width: int, rows: int = 24) -> Case:
    """Make a case for attention: a block of rows of one head."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(n, width)).astype(np.float32) for n in (rows, tokens, tokens))
    padded = -(-tokens // 64) * 64
    keys = np.zeros((padded, width), np.float32)
    keys[:tokens] = k
    panels = np.ascontiguousarray(keys.reshape(-1, 64, width).transpose(0, 2, 1))
    mask = np.full((1, padded), -np.inf, np.float32)
    mask[:, :tokens] = 0
    scores, y = np.zeros((rows, padded), np.float32), np.zeros((rows, width), np.float32)

    def call() -> None:
        _native.attention(q, panels, v, mask, scores, y, scale=width**-0.5, isa=kernel.isa)

    def check() -> bool:
        call()
        heads = (x[None, :, None] for x in (q, k, v))
        return np.array_equal(y, reference.attention(*heads, mask[:, :tokens], width**-0.5)[0, :, 0])

    nbytes = panels.nbytes + v.nbytes + q.nbytes + y.nbytes
    what = f"{tokens} tokens, width {width}"
    return Case(what, rows, k.size + v.size, nbytes, nbytes, 2 * rows * (k.size + v.size), call, check)


def cases(kernel: bn.Kernel, shapes: list[tuple[int, int]], rows: list[int], cold: int) -> Iterator[Case]:
    """Yield what to time of a kernel; nothing for an op or format that this program does not know."""
    longest = max(k for _, k in shapes)
    lengths = (longest, 16 * longest)
    match kernel.op, kernel.format:
        case (("dot" | "dotf"), _):
            yield from (products(kernel, n, k, m, cold) for n, k in shapes for m in rows)
        case "actq", "f32":
            yield from (quantization(kernel, k, bits) for k in lengths for bits in (8, 16))
        case "scale", "i32":
            yield from (scaling(kernel, groups) for groups in (1, 20))
        case "hadamard", "f32":
            yield from (transform(kernel, -(-k // 128) * 128, 128) for k in lengths)
        case (("widen" | "narrow"), "f16"):
            yield from (halves(kernel, k) for k in lengths)
        case "attention", "f32":
            yield from (attending(kernel, tokens, width) for tokens in (128, 1024) for width in (32, 64))


def overhead(kernel: bn.Kernel, seconds: float) -> float:
    """Return what a call of this kernel from Python costs if it has next to nothing to do."""
    smallest = {
        "dot": lambda: products(kernel, SUPER, 16, 1, enough=0),
        "dotf": lambda: products(kernel, SUPER, 16, 1, enough=0),
        "actq": lambda: quantization(kernel, 16, 8),
        "scale": lambda: scaling(kernel, 1, 1),
        "hadamard": lambda: transform(kernel, 16, 16),
        "attention": lambda: attending(kernel, 1, 16, 1),
        "widen": lambda: halves(kernel, 1),
        "narrow": lambda: halves(kernel, 1),
    }
    return best_of(smallest[kernel.op]().call, seconds).least


def measure(kernel: bn.Kernel, case: Case, empty: float, limits: dict[str, Any], seconds: float) -> Row:
    """Check and time one case.

    Raises:
        SystemExit: the kernel is wrong.
    """
    if not case.check():
        raise SystemExit(f"{kernel}, {case.what}, M = {case.m}: the result differs from the oracle")
    times = best_of(case.call, seconds)
    least, median = (max(took - empty, took / 2) for took in (times.least, times.median))
    times = Times(least, median, times.runs)
    tops = case.operations / times.least / 1e12
    peak = limits["tops"].get(kernel.isa) if kernel.op == "dot" else None
    gbps = case.nbytes / times.least / 1e9
    memory = "L2" if case.footprint <= L2 else "L3" if case.footprint <= L3 else "DRAM"
    return Row(
        kernel=str(kernel),
        isa=kernel.isa,
        case=case.what,
        m=case.m,
        weights=case.weights,
        min_ns=1e9 * times.least,
        median_ns=1e9 * times.median,
        gweights=case.weights * case.m / times.least / 1e9,
        gbps=gbps,
        memory=memory,
        read_share=gbps / limits["read_gbps"][memory],
        tops=tops,
        peak_share=tops / peak if peak else None,
    )


def shape(text: str) -> tuple[int, int]:
    n, k = map(int, text.split("x"))
    if n % SUPER or k % 16:
        raise argparse.ArgumentTypeError(f"{text}: N must be a multiple of {SUPER} and K of 16")
    return n, k


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", help="only these ops")
    parser.add_argument("--isa", nargs="+", help="only these instruction sets")
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--m", nargs="+", type=int, default=ROWS)
    parser.add_argument("--cold", type=int, nargs="?", const=COLD, default=0, help="bytes of weights in turn")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each line")
    parser.add_argument("--limits", type=Path, help="JSON of bench/machine.py; default: measured now")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    arguments = parser.parse_args()

    about = machine.describe([1])
    machine.print_header(about)
    (limits,) = machine.limits_from(arguments.limits, [1])
    machine.print_limits(limits)
    print()
    columns = (
        "kernel",
        "case",
        "M",
        "min ns",
        "median ns",
        "Gweights/s",
        "GB/s",
        "of read",
        "TOPS",
        "of peak",
    )
    print_table_head(*columns)
    rows, unknown = [], []
    for kernel in bn.kernels():
        asked = kernel.op in (arguments.op or [kernel.op]) and kernel.isa in (arguments.isa or [kernel.isa])
        if not asked or not kernel.runs_here:
            continue
        known = False
        for case in cases(kernel, arguments.shapes, arguments.m, arguments.cold):
            if not known:
                empty = overhead(kernel, arguments.seconds)
                known = True
            row = measure(kernel, case, empty, limits, arguments.seconds)
            rows.append(row)
            print_row(
                row.kernel,
                row.case,
                row.m,
                f"{row.min_ns:.0f}",
                f"{row.median_ns:.0f}",
                f"{row.gweights:.1f}",
                f"{row.gbps:.1f}",
                f"{row.read_share:.0%} {row.memory}",
                f"{row.tops:.3f}" if row.tops else "",
                f"{row.peak_share:.0%}" if row.peak_share else "",
            )
        if not known:
            unknown.append(str(kernel))
    if unknown:
        print(f"\nnot timed by this program: {', '.join(unknown)}")
    document = {"machine": about, "limits": [limits], "cold": arguments.cold}
    machine.write_json(
        arguments.json, "kernels", document | {"kernels": [asdict(row) for row in rows], "not_timed": unknown}
    )


if __name__ == "__main__":
    main()
