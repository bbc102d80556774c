"""Counts what the dot kernels ask of an Intel core, AMX included, on any x86-64 Linux machine with AVX-512.

    python bench/ports.py [--m 1 2 3 4 16 32] [--kernels i2s_amx i2s_avx512vnni]

A kernel of this build is stepped through with ptrace while it multiplies M rows with 64 outputs x 2560
inputs, and each instruction that runs is counted where it would be executed. Tile instructions are stepped
over: what a kernel does next never depends on their results. The table has cycles for 64 inputs x 64 outputs:
what each unit takes at least, and the most of these, which no order of execution can go below. It is no
measurement: latencies, caches and the clock, which is lower with AMX, come on top.

Rates: of vectors of 64 bytes two per cycle, of which one may shift, convert or take minima (port 0) and one
permute (port 5); two loads and one store of 64 bytes; 6 instructions in all. A product of tiles takes 16
cycles (10 with 8 rows and 9 with 4 or fewer, measured), to load a tile 16 loads, to store one 16 stores.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from instructions import CONT, INT3, PEEKTEXT, PEEKUSER, POKETEXT, POKEUSER, RIP, SINGLESTEP, TRACEME, libc

from onnx_bitnet import _native

PANELS, STEPS = 4, 160
CHUNKS = STEPS / 4  # of 64 inputs x 64 outputs
RSP = 8 * 19  # in struct user of x86-64
TILE = re.compile(r"(tdp|tile|ldtile|sttile)")
PORT_0 = re.compile(r"vps(rl|ll|ra)|vgf2p8|vpm(in|ax)|vpmadd|vpavg|vcvt|vpmul")
PORT_5 = re.compile(r"vperm|vpshuf|vpunpck|vpmultishift|valign|vextract|vinsert|vpcmp|vpmov")
MOVED = re.compile(r"v?mov|vpbroadcast|prefetch")  # no more than loads, stores and renaming


class DotArgs(ctypes.Structure):
    """bn_dot_args of ext/kernel.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panel", "q", "acc")),
        *((name, ctypes.c_size_t) for name in ("q_stride", "rows", "panels", "steps", "group_steps")),
    )


@dataclass(frozen=True)
class Code:
    """The machine code of this build."""

    kernels: dict[str, int]  # where they begin
    text: dict[int, str]  # instructions by address
    base: int  # of the addresses in this process


def read_code() -> Code:
    path = _native.__file__
    listing = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^(\w+) t bn_dot_(\w+)$", listing, re.M)
    disassembly = ["objdump", "-d", "--no-show-raw-insn", path]
    lines = subprocess.run(disassembly, check=True, capture_output=True, text=True).stdout
    text = {int(at, 16): line for at, line in re.findall(r"^ *(\w+):\t(.*)", lines, re.M)}
    maps = Path("/proc/self/maps").read_text().splitlines()
    base = min(int(line.partition("-")[0], 16) for line in maps if path in line)
    return Code({name: int(at, 16) for at, name in found}, text, base)


def multiply(address: int, rows: int) -> None:
    """Let one kernel multiply rows of zeros with codes of zero."""
    room = [np.zeros(size, np.uint8) for size in (STEPS * PANELS * 256 + 8192, rows * 16 * STEPS, rows * 256)]
    pointers = (array.ctypes.data for array in room)
    arguments = DotArgs(*pointers, 16 * STEPS, rows, PANELS, STEPS, STEPS)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(arguments))


def run(code: Code, kernel: str, rows: int) -> Counter[str]:
    """Return how often each instruction runs from the entry of a kernel to its return."""
    entry = code.base + code.kernels[kernel]
    pid = os.fork()
    if pid == 0:
        libc.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        multiply(entry, rows)
        os._exit(0)
    os.waitpid(pid, 0)
    first = libc.ptrace(PEEKTEXT, pid, entry, None) % 2**64
    libc.ptrace(POKETEXT, pid, entry, first & ~0xFF | INT3)
    libc.ptrace(CONT, pid, None, None)
    os.waitpid(pid, 0)
    libc.ptrace(POKETEXT, pid, entry, first)
    libc.ptrace(POKEUSER, pid, RIP, entry)
    back = libc.ptrace(PEEKTEXT, pid, libc.ptrace(PEEKUSER, pid, RSP, None), None)
    behind = dict(zip(code.text, list(code.text)[1:], strict=False))
    count: Counter[str] = Counter()
    while (at := libc.ptrace(PEEKUSER, pid, RIP, None)) != back:
        line = code.text[at - code.base]
        count[line] += 1
        if TILE.match(line):
            libc.ptrace(POKEUSER, pid, RIP, code.base + behind[at - code.base])
        else:
            libc.ptrace(SINGLESTEP, pid, None, None)
            os.waitpid(pid, 0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return count


def cycles(count: Counter[str], rows: int) -> dict[str, float]:
    """Return what each unit takes at least."""
    product = 16 if rows > 8 else 10 if rows > 4 else 9
    spent: dict[str, float] = defaultdict(float)
    for line, times in count.items():
        name, _, operands = line.partition(" ")
        memory = re.search(r"\(%|\(,", operands) is not None and not name.startswith(("lea", "nop"))
        is_store = memory and operands.endswith(")") and re.match("v?mov", name) is not None
        wide = "zmm" in line
        weights: dict[str, float] = {"instructions": 1 / 6}
        if name.startswith("tdp"):
            weights["products"] = product
        elif name.startswith("tileload"):
            weights = {"loads": 8, "instructions": 8 / 6}
        elif name.startswith("tilestore"):
            weights = {"stores": 16, "instructions": 16 / 6}
        elif is_store:
            weights["stores"] = 1 if wide else 1 / 2
        elif memory:
            weights["loads"] = 1 / 2 if wide and "broadcast" not in name else 1 / 3
        if wide and not MOVED.match(name):
            weights["vectors"] = 1 / 2
            if PORT_0.match(name) or PORT_5.match(name):
                weights["port 0" if PORT_0.match(name) else "port 5"] = 1
        for unit, weight in weights.items():
            spent[unit] += times * weight
    return {unit: total / CHUNKS for unit, total in spent.items()}


def main() -> None:
    """Print a line for each kernel and M."""
    code = read_code()
    usual = [f"{form}_{isa}" for isa in ("avx512vnni", "amx") for form in ("i2s", "w4", "w8")]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=int, nargs="+", default=[1, 2, 3, 4, 16, 32])
    parser.add_argument("--kernels", nargs="+", choices=sorted(code.kernels), default=usual)
    arguments = parser.parse_args()
    units = ("products", "port 0", "port 5", "vectors", "loads", "stores", "instructions")
    print("| kernel | M |" + "".join(f" {unit} |" for unit in (*units, "most")))
    print("|---|---|" + "---|" * (len(units) + 1))
    for kernel in arguments.kernels:
        for rows in arguments.m:
            spent = cycles(run(code, kernel, rows), rows)
            figures = [spent.get(unit, 0.0) for unit in units]
            row = "".join(f" {figure:.0f} |" for figure in (*figures, max(figures)))
            print(f"| dot_{kernel} | {rows} |{row}", flush=True)


if __name__ == "__main__":
    main()
