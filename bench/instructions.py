"""Counts the instructions of the dot and dotf kernels, of this machine and of others, by running them.

    python bench/instructions.py
    python bench/instructions.py --cc aarch64-linux-gnu-gcc --qemu "qemu-aarch64 -cpu max"

The core is built without Python (tests/kernels/run_portable.py) and runs one layer; the kernels are stepped
through with ptrace on this machine (x86-64 only), or in qemu for another one. Every instruction between the
entry of a kernel and its return counts, so loops, tails and the widening of sums are all in. The scalar
kernels are left out: their functions are not inlined.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))
import run_portable

N, K = 64, 1024
ROWS = (1, 2, 4, 16)  # of activations
RATIO = {"i2s": (), "w4": (4, 1), "w8": (64, 16, 4, 1)}  # of planes that become such codes
PASSES = 2  # that portable.c runs each layer
TRACEME, PEEKTEXT, PEEKUSER, POKETEXT, POKEUSER, CONT, SINGLESTEP = 0, 1, 3, 4, 6, 7, 9
RIP = 8 * 16  # in struct user of x86-64
INT3 = 0xCC

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def symbols(program: Path) -> dict[tuple[str, str, str], range]:
    """Return op, format, isa and addresses of the kernels of a program that is linked to fixed ones."""
    listing = subprocess.run(["nm", "-S", program], check=True, capture_output=True, text=True).stdout
    pattern = r"^(\w+) (\w+) T bn_(dotf?)_(i2s|w4|w8)_(?!scalar)(\w+)$"
    found = re.findall(pattern, listing, re.M)
    order = [name for name, _, _ in run_portable.ROW.findall((run_portable.EXT / "isa.inc").read_text())]
    found.sort(key=lambda row: (row[2:4], order.index(row[4])))
    return {
        (op, form, isa): range(int(start, 16), int(start, 16) + int(size, 16))
        for start, size, op, form, isa in found
    }


def count_here(command: list[str], environment: dict[str, str], where: range) -> int:
    """Stop a program on this machine whenever it enters the range, and step until it leaves."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        libc.ptrace(TRACEME, 0, None, None)
        os.execve(command[0], command, environment)
    os.waitpid(pid, 0)
    entry = libc.ptrace(PEEKTEXT, pid, where.start, None) % 2**64
    count = 0
    while True:
        libc.ptrace(POKETEXT, pid, where.start, entry & ~0xFF | INT3)
        libc.ptrace(CONT, pid, None, None)
        if os.WIFEXITED(os.waitpid(pid, 0)[1]):
            return count
        libc.ptrace(POKETEXT, pid, where.start, entry)
        libc.ptrace(POKEUSER, pid, RIP, where.start)
        while libc.ptrace(PEEKUSER, pid, RIP, None) in where:
            count += 1
            libc.ptrace(SINGLESTEP, pid, None, None)
            os.waitpid(pid, 0)


def count_in_qemu(command: list[str], environment: dict[str, str], where: range) -> int:
    """Let qemu log each instruction that runs in the range."""
    with tempfile.NamedTemporaryFile() as log:
        options = ["-singlestep", "-d", "exec,nochain", "-dfilter", f"{where.start:#x}+{len(where):#x}"]
        qemu = [*command[:-2], *options, "-D", log.name, *command[-2:]]
        subprocess.run(qemu, check=True, env=environment, stdout=subprocess.DEVNULL)
        return sum(line.startswith(b"Trace") for line in log)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cc", default="gcc", help="the C compiler")
    parser.add_argument("--qemu", default="", help="the emulator of the compiler's machine, with its CPU")
    arguments = parser.parse_args()
    if not arguments.qemu and platform.machine() != "x86_64":
        sys.exit("stepping is only written for x86-64; name an emulator with --qemu")

    version = subprocess.run([arguments.cc, "--version"], check=True, capture_output=True, text=True).stdout
    print(f"{version.splitlines()[0]}; N = {N}, K = {K}; instructions per weight and row of activations\n")
    print("| kernel |" + "".join(f" M={m} |" for m in ROWS))
    print("|---|" + "---|" * len(ROWS))
    with tempfile.TemporaryDirectory() as folder:
        program, answers = Path(folder, "portable"), Path(folder, "answers.bin")
        run_portable.build(program, arguments.cc, ["-static"])
        command = [*arguments.qemu.split(), str(program), str(answers)]
        counter = count_in_qemu if arguments.qemu else count_here
        for (op, form, isa), where in symbols(program).items():
            bits = 8 if op == "dot" else 32
            ratio = RATIO[form]
            figures = []
            for m in ROWS:
                case = run_portable.Case(N, K, m, bits, planes=max(1, len(ratio)), ratio=ratio)
                answers.write_bytes(b"".join(run_portable.contents(case)))
                count = counter(command, {"ONNX_BITNET_ISA": isa}, where)
                figures.append(count / (PASSES * m * N * K))
            print(f"| {op}_{form}_{isa} |" + "".join(f" {figure:.3f} |" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
