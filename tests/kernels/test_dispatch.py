"""The list of kernels is complete, the choice is the strongest one allowed, and nothing else is exported."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import onnx_bitnet
from onnx_bitnet import _native
from onnx_bitnet.errors import RecipeError
from onnx_bitnet.kernels import kernels

EXT = Path(__file__).parents[2] / "ext"
ROW = re.compile(r"^BN_KERNEL\((\w+), +(\w+), +(\w+)\)", re.M)
PAIRS = sorted({(op, format_) for op, format_, _ in _native.kernels()})
HERE = [name for name, runs_here in _native.isas() if runs_here]


def library() -> Path:
    """Return the custom-op library that was built beside the package."""
    return next(Path(onnx_bitnet.__path__[0]).glob("libonnx_bitnet.*"))


def nm(*arguments: str) -> list[list[str]]:
    """Run nm on the library and return its lines, cut at spaces and bars."""
    tool = shutil.which("nm")
    if tool is None or library().suffix != ".so":
        pytest.skip("needs nm and an ELF library")
    output = subprocess.run(
        [tool, *arguments, str(library())], check=True, capture_output=True, text=True
    ).stdout
    return [re.split(r"[\s|]+", line.strip()) for line in output.splitlines()]


def test_each_file_has_one_row_and_each_row_one_file() -> None:
    rows = ["_".join(row) for row in ROW.findall((EXT / "kernels.inc").read_text())]
    files = [path.stem for path in (EXT / "kernels").glob("*.c")]
    assert len(rows) == len(set(rows))
    assert sorted(rows) == sorted(files)


def test_listed_kernels_are_rows_of_the_file() -> None:
    rows = ROW.findall((EXT / "kernels.inc").read_text())
    compiled = [name for name, _ in _native.isas()]
    assert _native.kernels() == [row for row in rows if row[2] in compiled]


@pytest.mark.parametrize(("op", "format_"), PAIRS)
def test_each_op_and_format_has_a_scalar_kernel(op: str, format_: str) -> None:
    assert (op, format_, "scalar") in _native.kernels()


@pytest.mark.parametrize(("op", "format_"), PAIRS)
@pytest.mark.parametrize("cap", HERE)
def test_the_strongest_allowed_kernel_is_found(op: str, format_: str, cap: str) -> None:
    allowed = HERE[: HERE.index(cap) + 1]
    assert _native.allowed_isas(cap) == allowed
    written = [isa for isa in allowed if (op, format_, isa) in _native.kernels()]
    assert _native.find(op, format_, cap) == written[-1]


def test_what_does_not_exist_is_not_found() -> None:
    assert _native.find("dot", "nothing") is None
    assert _native.find("nothing", "i2s") is None


def test_kernels_marks_the_chosen_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_BITNET_ISA", "scalar")
    assert {kernel.isa for kernel in kernels() if kernel.chosen} == {"scalar"}
    monkeypatch.delenv("ONNX_BITNET_ISA")
    chosen = [kernel for kernel in kernels() if kernel.chosen]
    assert sorted((kernel.op, kernel.format) for kernel in chosen) == PAIRS
    assert all(kernel.runs_here for kernel in chosen)
    assert str(chosen[0]) == f"{chosen[0].op}_{chosen[0].format}_{chosen[0].isa}"


@pytest.mark.parametrize("value", ["sse9", "AVX2", " "])
def test_an_unknown_isa_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ONNX_BITNET_ISA", value)
    with pytest.raises(ValueError, match="ONNX_BITNET_ISA names no instruction set"):
        _native.allowed_isas()
    with pytest.raises(RecipeError, match=r"ONNX_BITNET_ISA=.* not an instruction set that runs here"):
        kernels()


def test_an_isa_of_another_machine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    every = re.findall(r"^BN_ISA\((\w+)", (EXT / "isa.inc").read_text(), re.M)
    absent = next((name for name in every if name not in HERE), None)
    if absent is None:
        pytest.skip("every instruction set runs here")
    monkeypatch.setenv("ONNX_BITNET_ISA", absent)
    with pytest.raises(ValueError, match="not in this build or does not run on this CPU"):
        _native.allowed_isas()


def test_an_empty_isa_is_no_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_BITNET_ISA", "")
    assert _native.allowed_isas() == HERE


def test_only_the_registration_is_exported() -> None:
    exported = {fields[-1] for fields in nm("-D", "--defined-only")}
    assert {name for name in exported if not name.startswith("__")} == {"RegisterCustomOps"}


def test_the_core_has_no_state_but_what_layers_share() -> None:
    if any("asan" in fields[0] for fields in nm("-D", "--format=posix")):
        pytest.skip("sanitizers add variables")
    variables = {
        fields[0] for fields in nm("--format=sysv", "--defined-only") if fields[-1] in (".data", ".bss")
    }
    of_the_linker = {"completed.0", "__dso_handle", "__TMC_END__", "__bss_start", "_edata", "_end"}
    of_the_glue = {"domains"}  # ops/register.c: what ONNX Runtime keeps pointers to
    assert variables - of_the_linker - of_the_glue == {"table"}  # share.c


def test_isa_rows_are_ordered_by_strength() -> None:
    for weaker, stronger in itertools.pairwise(HERE):
        assert set(_native.allowed_isas(weaker)) < set(_native.allowed_isas(stronger))
