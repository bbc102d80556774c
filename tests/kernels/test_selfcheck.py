"""An instruction set that computes wrong numbers is switched off with a warning: tried on a copy of the built
libraries, in whose kernels some machine code is overwritten."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import onnx_bitnet
from onnx_bitnet import _native

RETURN = b"\xc3"  # x86-64: `ret`
STRONGEST = str(_native.find("dot", "i2s"))

RUN = """
import numpy as np
from onnxruntime import InferenceSession, SessionOptions
from onnx_bitnet import doctor, runtime
options = SessionOptions()
runtime.register(options)
for sample in doctor._samples():
    for _ in range(2):
        session = InferenceSession(doctor._model(sample), options, providers=["CPUExecutionProvider"])
        assert np.array_equal(session.run(None, {"x": sample.x})[0], sample.expected)
"""


def overwrite(library: Path, function: str) -> None:
    """Let a function of an ELF library return at once."""
    symbols = subprocess.run(["nm", library], check=True, capture_output=True, text=True).stdout
    found = re.search(rf"^(\w+) [tT] {function}$", symbols, re.M)
    if found is None:
        pytest.skip("the library is stripped")
    sections = subprocess.run(["readelf", "-SW", library], check=True, capture_output=True, text=True).stdout
    start, offset = re.findall(r" \.text +PROGBITS +(\w+) (\w+)", sections)[0]
    code = bytearray(library.read_bytes())
    code[int(found[1], 16) - int(start, 16) + int(offset, 16)] = RETURN[0]
    library.write_bytes(code)


def broken_copy(folder: Path, op: str, form: str) -> Path:
    """Return the folder with a copy of the package, the strongest kernel of an op in which does nothing."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("knows the machine code of x86-64 Linux alone")
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("needs nm and readelf")
    if STRONGEST == "scalar":
        pytest.skip("there is no other code than the scalar one")
    package = Path(onnx_bitnet.__path__[0])
    shutil.copytree(package, folder / "onnx_bitnet", ignore=shutil.ignore_patterns("__pycache__"))
    for library in (folder / "onnx_bitnet").glob("*.so"):
        overwrite(library, f"bn_{op}_{form}_{_native.find(op, form)}")
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken_copy(tmp_path_factory.mktemp("broken"), "dot", "i2s")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=folder
    )


def test_all_is_well_here() -> None:
    assert _native.wrong_isas() == []


RUN_BY_OPS = (
    ("dot", "i2s"),
    ("dot", "t5"),
    ("dot", "w4"),
    ("dot", "w8"),
    ("dotf", "i2s"),
    ("actq", "f32"),
    ("scale", "i32"),
    ("widen", "f16"),
    ("narrow", "f16"),
    ("panel", "i2s"),
    ("hadamard", "f32"),
    ("attention", "f32"),
    ("transpose", "f32"),
)


@pytest.mark.parametrize(("op", "form"), RUN_BY_OPS)
def test_every_op_is_checked(op: str, form: str, tmp_path: Path) -> None:
    isa = str(_native.find(op, form))
    if isa == "scalar":
        pytest.skip("there is no other code than the scalar one")
    folder = broken_copy(tmp_path, op, form)
    done = run(folder, "-c", "from onnx_bitnet import _native; print(*_native.wrong_isas())")
    assert (done.returncode, done.stdout.split()) == (0, [isa]), done.stderr


def test_a_session_warns_once_and_computes_right(broken: Path) -> None:
    done = run(broken, "-c", RUN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"the {STRONGEST} kernels give wrong results on this machine") == 1


def test_the_listing_of_kernels_warns(broken: Path) -> None:
    done = run(broken, "-m", "onnx_bitnet", "kernels")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"the {STRONGEST} kernels of onnx_bitnet give wrong results") == 1
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["dot", "i2s", STRONGEST, "yes"] in rows  # it runs here, and is not chosen
    assert sum(row[:2] == ["dot", "i2s"] and row[4:] == ["yes"] for row in rows) == 1


def test_doctor_says_what_is_wrong(broken: Path) -> None:
    done = run(broken, "-m", "onnx_bitnet", "doctor")
    assert done.returncode == 1
    assert f"wrong results from {STRONGEST}" in " ".join(done.stdout.split())
    assert "op in onnxruntime" in done.stdout
