"""The build: an old compiler, another machine, and a second build that has nothing to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BUILD_THE_LIBRARY = """
import platform
import sys
import setuptools
from distutils.core import run_setup
lib, temp, *machine = sys.argv[1:]
if machine:
    platform.machine = lambda: machine[0]
dist = run_setup("setup.py", stop_after="init")
dist.ext_modules = [extension for extension in dist.ext_modules if extension.name.endswith("libonnx_bitnet")]
command = dist.get_command_obj("build_ext")
command.build_lib, command.build_temp = lib, temp
dist.run_command("build_ext")
"""

# Writes down each call and fails for a flag, as an old compiler does.
COMPILER = """#!/bin/sh
echo "$*" >> {log}
case " $* " in *" -mavx512vnni "*) echo "unrecognized option -mavx512vnni" >&2; exit 1;; esac
exec {cc} "$@"
"""


def test_a_compiler_without_an_instruction_set_drops_its_row(tmp_path: Path) -> None:
    cc = shutil.which("cc")
    if cc is None or sys.platform == "win32" or not (ROOT / "setup.py").exists():
        pytest.skip("needs cc and the source tree")
    pytest.importorskip("setuptools")
    compiler, log = tmp_path / "old-cc", tmp_path / "log"
    compiler.write_text(COMPILER.format(log=log, cc=cc))
    compiler.chmod(0o755)
    environment = {
        **os.environ,
        "CC": str(compiler),
        "LDSHARED": f"{cc} -shared",
        "ONNX_BITNET_CFLAGS": "-O0",
    }

    def build() -> tuple[str, int]:
        """Return what was printed and the number of our sources compiled."""
        log.write_text("")
        command = [sys.executable, "-c", BUILD_THE_LIBRARY, str(tmp_path / "lib"), str(tmp_path / "temp")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, sum(" ext/" in line and " -c " in line for line in log.read_text().splitlines())

    printed, compiled = build()
    known = os.uname().machine in ("x86_64", "AMD64")
    assert ("onnx_bitnet: no avx512vnni kernels, the compiler does not know their flags" in printed) == known
    assert compiled > 10
    library = next((tmp_path / "lib" / "onnx_bitnet").glob("libonnx_bitnet.*")).read_bytes()
    assert b"dot_i2s_scalar" in library
    assert b"dot_i2s_avx512vnni" not in library
    assert build()[1] == 0


def test_each_file_gets_the_flags_of_its_row_on_aarch64(tmp_path: Path) -> None:
    compiler, objdump = map(shutil.which, ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-objdump"))
    if compiler is None or objdump is None or not (ROOT / "setup.py").exists():
        pytest.skip("needs aarch64-linux-gnu-gcc and the source tree")
    pytest.importorskip("setuptools")
    environment = {
        **os.environ,
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared",
        "ONNX_BITNET_CFLAGS": "-O1",
    }
    folders = [str(tmp_path / "lib"), str(tmp_path / "temp")]
    command = [sys.executable, "-c", BUILD_THE_LIBRARY, *folders, "aarch64"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    def instructions(name: str) -> set[str]:
        path = next((tmp_path / "temp").rglob(f"{name}.o"))
        listing = subprocess.run([objdump, "-d", path], check=True, capture_output=True, text=True).stdout
        return {line.split("\t")[2].strip() for line in listing.splitlines() if line.count("\t") >= 2}

    assert not list((tmp_path / "temp").rglob("*_avx2.o"))
    assert "smlal2" in instructions("dot_i2s_neon")
    assert {"sdot", "smmla"}.isdisjoint(instructions("dot_i2s_neon"))
    assert "sdot" in instructions("dot_i2s_dotprod")
    assert "smmla" in instructions("dot_i2s_i8mm")
    scale = instructions("scale_i32_neon")
    assert {"fmul", "fadd"} <= scale
    assert {"fmla", "fmls", "fmadd"}.isdisjoint(scale)
