"""The machine: what it is, and the limits that no kernel on it can pass, as measured here.

    python bench/machine.py [--threads 1 2] [--json limits.json]

Reading: a buffer in huge pages is read from front to back by each thread, from the second-level cache, the
third (where there is one) and DRAM, with and without prefetching; the best counts. Multiplying: byte dot
products on registers alone, for each instruction set. The loops are in limits.c, compiled with the flags of
ext/isa.inc by $CC, or cc. Other work on the machine lowers all figures: take the best of several runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import onnx_bitnet as bn
from onnx_bitnet import _native
from onnx_bitnet.timing.bench import cpu_name

HERE = Path(__file__).parent
SIZES = {"L2": 3 << 18, "L3": 6 << 20, "DRAM": 1 << 29}  # bytes that each thread reads
AHEAD = (0, 1024, 2048, 4096)
ROUNDS = 5


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "cc"))


def isa_flags() -> dict[str, str]:
    """Return the compiler flags of the instruction sets that run here, weakest first."""
    rows = dict(re.findall(r'^BN_ISA\((\w+),\s*"([^"]*)"', (HERE.parent / "ext/isa.inc").read_text(), re.M))
    return {name: rows[name] for name, runs_here in _native.isas() if runs_here}


def describe(threads: list[int]) -> dict[str, Any]:
    """Return what every output of a benchmark begins with."""
    version = _output([*compiler(), "--version"]).partition("\n")[0]
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "isas": _native.allowed_isas(),
        "kernels": [str(kernel) for kernel in bn.kernels() if kernel.chosen],
        "compiler": version,
        "flags": os.environ.get("ONNX_BITNET_CFLAGS", ""),
        "commit": _output(["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]),
        "threads": threads,
        "python": f"{platform.python_version()}, numpy {np.__version__}",
        "command": f"python {shlex.join(sys.argv)}",
    }


def print_header(machine: dict[str, Any]) -> None:
    for key, value in machine.items():
        print(f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    print()


def limits(threads: int, sizes: dict[str, int] = SIZES, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure with this many threads at once: GB/s by level of memory, TOPS by instruction set."""
    found: dict[str, Any] = {"threads": threads, "read_gbps": dict.fromkeys(sizes, 0.0), "tops": {}}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        for isa, flags in isa_flags().items():
            library = _build(Path(folder, f"{isa}.so"), flags)
            for level, nbytes in sizes.items():
                best = _read(library, pool, threads, nbytes, rounds)
                found["read_gbps"][level] = max(found["read_gbps"][level], best)
            operations = library.bn_dot_peak(1)
            if operations:
                count = 100_000
                seconds = _best(pool, threads, lambda _: library.bn_dot_peak(count), 100 * rounds)  # noqa: B023
                found["tops"][isa] = threads * operations * count / seconds / 1e12
    return found


def limits_from(path: Path | None, threads: list[int]) -> list[dict[str, Any]]:
    """Return the limits for each number of threads: from the JSON of this program, or measured now.

    Raises:
        SystemExit: the file lacks a number of threads.
    """
    if path is None:
        return [limits(count) for count in threads]
    known = {found["threads"]: found for found in json.loads(path.read_text())["limits"]}
    if not set(threads) <= set(known):
        raise SystemExit(f"{path}: has limits for {sorted(known)} threads, {sorted(threads)} are needed")
    return [known[count] for count in threads]


def _build(path: Path, flags: str) -> ctypes.CDLL:
    command = [*compiler(), "-O3", "-std=gnu11", "-shared", "-fPIC", *flags.split()]
    subprocess.run([*command, str(HERE / "limits.c"), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.bn_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    library.bn_read.restype = ctypes.c_uint64
    library.bn_dot_peak.argtypes = [ctypes.c_size_t]
    library.bn_dot_peak.restype = ctypes.c_double
    return library


def _read(library: ctypes.CDLL, pool: ThreadPoolExecutor, threads: int, nbytes: int, rounds: int) -> float:
    """Return GB/s over all threads, each with a buffer of its own; small ones are read many times."""
    data = np.ones((threads, nbytes + 4096), np.uint8)  # NumPy asks for huge pages
    addresses = [row.ctypes.data + -row.ctypes.data % 4096 for row in data]
    passes = max(1, (1 << 26) // nbytes)

    def read(thread: int, ahead: int) -> None:
        for _ in range(passes):
            library.bn_read(addresses[thread], nbytes, ahead)

    seconds = min(_best(pool, threads, lambda t, a=ahead: read(t, a), rounds) for ahead in AHEAD)
    return threads * passes * nbytes / seconds / 1e9


def _best(pool: ThreadPoolExecutor, threads: int, work: Callable[[int], object], rounds: int) -> float:
    """Return the shortest time from when the first thread began the work to when the last had done it."""

    def timed(thread: int) -> tuple[float, float]:
        start = time.perf_counter()
        work(thread)
        return start, time.perf_counter()

    def one_round() -> float:
        starts, ends = zip(*pool.map(timed, range(threads)), strict=True)
        return max(ends) - min(starts)

    return min(one_round() for _ in range(rounds))


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_limits(found: dict[str, Any]) -> None:
    read = ", ".join(f"{level} {value:.1f}" for level, value in found["read_gbps"].items())
    peak = ", ".join(f"{isa} {value:.2f}" for isa, value in found["tops"].items())
    print(f"limits, {found['threads']} threads: read GB/s {read}; byte dot products, TOPS {peak}", flush=True)


def write_json(path: Path | None, kind: str, document: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps({"schema": f"onnx_bitnet.bench_{kind}/1", **document}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    arguments = parser.parse_args()
    machine = describe(arguments.threads)
    print_header(machine)
    found = [limits(threads, rounds=arguments.rounds) for threads in arguments.threads]
    for each in found:
        print_limits(each)
    write_json(arguments.json, "machine", {"machine": machine, "limits": found})


if __name__ == "__main__":
    main()
