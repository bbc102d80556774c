"""The C core works without Python: under sanitizers, and on ARM CPUs of three generations."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from kernels import run_portable

from onnx_bitnet import _native

SANITIZE = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover"
STRICT = "-Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Werror"
CROSS = "aarch64-linux-gnu-gcc"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers") / "answers.bin"
    run_portable.write_answers(path)
    return path


@pytest.fixture(scope="module")
def aarch64_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in (CROSS, "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    program = tmp_path_factory.mktemp("aarch64") / "portable"
    run_portable.build(program, CROSS, [*STRICT.split(), "-static"])
    return program


def check(command: list[object], isas: list[str] | None = None) -> list[str]:
    """Run the program; all layers must be right with each of these instruction sets, and no others run.

    Returns those that ran.
    """
    environment = {key: value for key, value in os.environ.items() if key != "ONNX_BITNET_ISA"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    chosen, results = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
    ran = [line.partition(":")[0] for line in chosen]
    assert ran == (isas or ran)
    count = len(list(run_portable.cases()))
    for isa, kernels, result in zip(ran, chosen, results, strict=True):
        assert f"_{isa}" in kernels
        assert result == f"{isa}: {count} of {count} layers right"
    return ran


def test_sanitized(tmp_path: Path, answers: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    emulate_amx = dict(_native.isas()).get("avx512vnni", False)
    run_portable.build(tmp_path / "portable", "gcc", SANITIZE.split(), emulate_amx)
    ran = check([tmp_path / "portable", answers])
    assert "amx" in ran or not emulate_amx


@pytest.mark.parametrize(
    ("cpu", "isas"),
    [
        pytest.param("cortex-a53", ["scalar", "neon"], id="cortex-a53"),
        pytest.param("neoverse-n1", ["scalar", "neon", "dotprod"], id="neoverse-n1"),
        pytest.param("max", ["scalar", "neon", "dotprod", "i8mm"], id="max"),
        # With the maker's number of Apple, whose cores have i8mm and do not gain by it.
        pytest.param("max,midr=0x611f0221", ["scalar", "neon", "dotprod"], id="apple"),
    ],
)
def test_aarch64(aarch64_program: Path, answers: Path, cpu: str, isas: list[str]) -> None:
    check(["qemu-aarch64", "-cpu", cpu, aarch64_program, answers], isas)
