"""Build the C core without Python, for this machine or another one, and check it against the NumPy oracle.

    python tests/kernels/run_portable.py
    python tests/kernels/run_portable.py --cc aarch64-linux-gnu-gcc --flags=-static --runner qemu-aarch64
    python tests/kernels/run_portable.py --flags="-g -fsanitize=address,undefined -fno-sanitize-recover"

Only the kernels whose rows in ext/isa.inc need no flags and name no machine are built: the scalar ones.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from onnx_bitnet import reference

HERE = Path(__file__).parent
EXT = HERE.parents[1] / "ext"
CORE = ("cpu", "dispatch", "formats", "matmul", "panel", "run")
FORMATS = tuple(reference.PACK)  # in the order of formats.inc, as tests/test_formats.py makes sure
ROW = re.compile(r'^BN_ISA\((\w+), +"([^"]*)", +(\w+)', re.M)


def cases() -> Iterator[bytes]:
    """Yield layers with their inputs and answers, in the format that portable.c reads."""
    rng = np.random.default_rng(0)
    for form, bits in (("i2s", 8), ("i2s", 16), ("i2s", 32), ("tl1", 8), ("tl2", 16), ("t5", 16)):
        top = 4 if form == "i2s" else 3
        for n, k, m, planes, block_size, scale_rows, half, step in (
            (1, 1, 1, 1, 0, 1, False, 0.0),
            (70, 150, 5, 1, 0, 70, False, 0.0),
            (16, 257, 3, 2, 32, 16, True, 0.0),
            (130, 64, 17, 4, 0, 1, False, 0.02),
            (33, 100, 2, 3, 7, 33, False, 0.0),
            (400, 2049, 9, 1, 128, 400, False, 0.0),
            (64, 33000, 1, 1, 0, 64, False, 0.0),
        ):
            if bits == 32 and half:
                continue
            shape = (planes, scale_rows, len(reference.group_starts(k, block_size)))
            weight = reference.PACK[form](rng.integers(0, top, (planes, n, k), np.uint8))
            scale = rng.normal(size=shape).astype(np.float32)
            zero_points = [1.0, 1.5, 0.0] if form == "i2s" else [1.0]
            zero_point = rng.choice(zero_points, shape if planes > 1 else 1).astype(np.float32)
            zero_point = np.ascontiguousarray(np.broadcast_to(zero_point, shape))
            bias = rng.normal(size=n).astype(np.float32)
            x = rng.normal(size=(m, k)).astype(np.float16 if half else np.float32)
            step = step if bits != 32 else 0.0
            options = {"k": k, "block_size": block_size, "activation_bits": bits, "activation_scale": step}
            y = reference.matmul(x, weight, scale, zero_point, bias, form=form, **options)
            tolerance = 2e-5 * float(np.abs(y).max()) if bits == 32 else 0.0
            numbers = (FORMATS.index(form), n, k, planes, block_size, scale_rows, bits, m, half)
            yield struct.pack("=9I2f", *numbers, step, tolerance)
            yield from (array.tobytes() for array in (weight, scale, zero_point, bias, x, y))


def build(program: Path, compiler: str, flags: list[str]) -> None:
    """Compile portable.c with the core and the kernels that need no flags."""
    rows = ROW.findall((EXT / "isa.inc").read_text())
    plain = [name for name, isa_flags, machine in rows if not isa_flags and machine == "any"]
    sources = [HERE / "portable.c", *(EXT / f"{name}.c" for name in CORE)]
    sources += [path for name in plain for path in sorted(EXT.glob(f"kernels/*_{name}.c"))]
    macros = [f"-DBN_HAVE_{name}={int(name in plain)}" for name, _, _ in rows]
    base = ["-std=c11", "-O2", "-ffp-contract=off", f"-I{EXT}"]
    subprocess.run([compiler, *base, *macros, *flags, *sources, "-lm", "-o", program], check=True)


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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program, answers = Path(folder, "portable"), Path(folder, "answers.bin")
        answers.write_bytes(b"".join(cases()))
        build(program, arguments.cc, arguments.flags.split())
        return subprocess.run([*arguments.runner.split(), program, answers], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
