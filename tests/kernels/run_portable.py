"""Build the C core without Python, for this machine or another one, and check it against the NumPy oracle.

    python tests/kernels/run_portable.py
    python tests/kernels/run_portable.py --cc aarch64-linux-gnu-gcc --flags=-static \\
        --runner "qemu-aarch64 -cpu neoverse-n1" --strongest dotprod
    python tests/kernels/run_portable.py --flags="-g -fsanitize=address,undefined -fno-sanitize-recover" \\
        --emulate-amx

All kernels of the compiler's machine are built, each with its own flags, and all layers run with each
instruction set that the machine has; --strongest asserts which one is the last of them.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_bitnet import reference

HERE = Path(__file__).parent
EXT = HERE.parents[1] / "ext"
FORMATS = tuple(reference.PACK)  # in the order of formats.inc, as tests/test_formats.py makes sure
ROW = re.compile(r'^BN_ISA\((\w+),\s*"([^"]*)",\s*(\w+)', re.M)
BASE = ["-std=c11", "-O3", "-ffp-contract=off"]  # as in setup.py


@dataclass(frozen=True)
class Case:
    """One layer and its input; `extreme` makes every product of a group as large as it can be."""

    n: int
    k: int
    m: int
    bits: int = 8
    planes: int = 1
    block_size: int = 0
    per_channel: bool = True
    half: bool = False
    step: float = 0.0
    zero_points: tuple[float, ...] = (1.0,)
    form: str = "i2s"
    extreme: bool = False
    ratio: tuple[int, ...] = ()  # of the scales of all planes, which are then merged


def squeezed_cases() -> Iterator[Case]:
    """Yield ternary layers whose panels hold five codes in a byte, and some steps that are left."""
    for bits in (8, 16):
        for m in (1, 2, 3, 4, 5, 9, 40):
            yield Case(100 + 16 * (m % 4), 80 + 30 * m, m, bits, form="t5")
            yield Case(70, 560, m, bits, form="t5", half=True)


def cases() -> Iterator[Case]:
    """Yield layers around the edges of steps, panels, super-panels, row blocks, groups and 16 bits."""
    affine = (1.0, 1.5, 0.0, -2.25)
    for bits in (8, 16, 32):
        yield Case(1, 1, 1, bits)
        yield Case(70, 150, 5, bits)
        yield Case(130, 64, 35, bits, planes=4, per_channel=False, step=0.02, zero_points=affine)
        yield Case(33, 100, 2, bits, planes=3, block_size=7, zero_points=affine)
        yield Case(400, 2049, 9, bits, block_size=128)
        yield Case(64, 33000, 1, bits)
        yield Case(100, 40, 137, bits, half=bits == 16)
        yield Case(16, 257, 3, bits, planes=2, block_size=32, half=True, zero_points=affine)
        for m in range(1, 10):
            yield Case(16 * (m % 5) + 5, 200 + m, m, bits, block_size=(0, 48)[m % 2])
            yield Case(64 + 16 * (m % 4), 100 - m, m, bits, zero_points=affine)
        for k in (*range(1, 36), 335, 336, 337, 351):
            yield Case(17 + k, k, 1 + k % 4, bits, half=k % 2 == 0)
        for n in range(1, 81, 3):
            yield Case(n, 40, 1 + n % 3, bits)
    for form, bits in (("tl1", 8), ("tl2", 16), ("t5", 16), ("tl2", 32)):
        yield Case(1, 1, 1, bits, form=form)
        yield Case(70, 150, 5, bits, form=form)
        yield Case(33, 100, 2, bits, planes=3, block_size=7, form=form)
        yield Case(100, 2049, 9, bits, block_size=128, form=form)
    yield from squeezed_cases()
    for bits in (8, 16):
        for ratio in ((4, 1), (3, 1), (64, 16, 4, 1)):
            wide = {"bits": bits, "planes": len(ratio), "ratio": ratio}
            yield Case(1, 1, 1, **wide)
            yield Case(130, 64, 35, zero_points=(2.0,), **wide)
            yield Case(33, 100, 2, block_size=7, zero_points=(1.0, 1.5, -3.0), **wide)
            yield Case(100, 2049, 9, block_size=128, **wide)
            for m in range(1, 10):
                yield Case(16 * (m % 5) + 5, 200 + m, m, **wide)
                yield Case(16 * (m % 5) + 5, 2048 + m, m, step=1.0, extreme=True, **wide)
        for m in (1, 2, 4, 8):
            yield Case(80, 2064 + m, m, bits, step=1.0, extreme=True)
        yield Case(16, 32767, 3, bits, step=1.0, extreme=True)


def contents(case: Case) -> Iterator[bytes]:
    """Yield a layer with its input and answer, in the format that portable.c reads."""
    rng = np.random.default_rng((case.n, case.k, case.m, case.bits))
    shape = (case.planes, case.n if case.per_channel else 1)
    shape = (*shape, len(reference.group_starts(case.k, case.block_size)))
    codes = rng.integers(0, 4 if case.form == "i2s" else 3, (case.planes, case.n, case.k), np.uint8)
    scale = rng.normal(size=shape).astype(np.float32)
    if case.ratio:
        scale = (scale.view(np.uint32) & 0xFFFFFF00).view(np.float32)
        scale = scale[-1] * np.float32(case.ratio)[:, None, None]
    zero_point = rng.choice(np.array(case.zero_points, np.float32), shape)
    bias = rng.normal(size=case.n).astype(np.float32)
    x = rng.normal(size=(case.m, case.k)).astype(np.float16 if case.half else np.float32)
    if case.extreme:
        codes[:] = np.arange(case.n, dtype=np.uint8)[:, None] % 4 ^ 3
        x[:] = -(2.0 ** (case.bits - 1))
    elif case.m > 1 and case.bits != 32:
        x[-1, case.k // 2] = np.nan
    weight = reference.PACK[case.form](codes)
    step = 0.0 if case.bits == 32 else case.step
    y = reference.matmul(
        x,
        weight,
        scale,
        zero_point,
        bias,
        k=case.k,
        block_size=case.block_size,
        activation_bits=case.bits,
        activation_scale=step,
        form=case.form,
    )
    tolerance = 2e-5 * float(np.abs(y).max()) if case.bits == 32 else 0.0
    sizes = (
        FORMATS.index(case.form),
        case.n,
        case.k,
        case.planes,
        case.block_size,
        shape[1],
        case.bits,
        case.m,
        case.half,
    )
    yield struct.pack("=9I2f", *sizes, step, tolerance)
    yield from (array.tobytes() for array in (weight, scale, zero_point, bias, x, y))


def write_answers(path: Path) -> None:
    """Write all layers with their inputs and answers."""
    path.write_bytes(b"".join(piece for case in cases() for piece in contents(case)))


def sanitizer(compiler: str, name: str) -> Path | None:
    """Return the library of a sanitizer, or None where the compiler came without it."""
    command = [compiler, f"-print-file-name=lib{name[0]}san.so"]
    path = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    return path if path.is_absolute() else None


def build(
    program: Path,
    compiler: str,
    flags: list[str],
    emulate_amx: bool = False,
    source: str = "portable.c",
) -> None:
    """Compile a program of this folder, the core, and the kernels of the machine, each with its flags."""
    target = subprocess.run([compiler, "-dumpmachine"], check=True, capture_output=True, text=True).stdout
    machine = target.partition("-")[0].replace("arm64", "aarch64")
    rows = ROW.findall((EXT / "isa.inc").read_text())
    own = {name: text.split() for name, text, row_machine in rows if row_machine in ("any", machine)}
    macros = [f"-DBN_HAVE_{name}={int(name in own)}" for name, _, _ in rows]
    core = [HERE / source, *EXT.glob("*.c")]
    if emulate_amx:
        core = [HERE / "amx_is_here.c" if path.name == "cpu_amx.c" else path for path in core]
        own["amx"] += ["-include", str(HERE / "amx_emulated.h")]
    groups = [(core, [])]
    groups += [([*EXT.glob(f"kernels/*_{name}.c")], isa_flags) for name, isa_flags in own.items()]
    folder = program.parent
    for sources, isa_flags in groups:
        command = [compiler, *BASE, *macros, *flags, *isa_flags, f"-I{EXT}", "-c", *sources]
        if sources:
            subprocess.run(command, check=True, cwd=folder)
    objects = sorted(folder.glob("*.o"))
    subprocess.run([compiler, *flags, *objects, "-lm", "-pthread", "-o", program], check=True)


def main() -> int:
    """Build, run, and return the program's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cc", default="cc", help="the C compiler")
    parser.add_argument("--flags", default="", help="more flags for it")
    parser.add_argument(
        "--runner", default="", help="a command to run the program with, such as qemu-aarch64"
    )
    parser.add_argument(
        "--emulate-amx", action="store_true", help="run the AMX kernels, too, on a CPU with AVX512-VNNI"
    )
    parser.add_argument("--strongest", help="the strongest instruction set that must have run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program, answers = Path(folder, "portable"), Path(folder, "answers.bin")
        build(program, arguments.cc, arguments.flags.split(), arguments.emulate_amx)
        write_answers(answers)
        command = [*arguments.runner.split(), program, answers]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    sys.stdout.write(done.stdout)
    strongest = done.stdout.rpartition("\n")[0].rpartition("\n")[2].partition(":")[0]
    if done.returncode == 0 and arguments.strongest not in (None, strongest):
        sys.stderr.write(f"{strongest} was the strongest instruction set, not {arguments.strongest}\n")
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
