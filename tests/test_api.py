"""The public surface is what the design names, and nothing more."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import onnx_bitnet as bn
from onnx_bitnet import _native

NAMES = {
    "BitNetError", "Calibration", "Kernel", "Quantized", "Recipe", "Report", "Rule", "Validation", "Weights",
    "calibrate", "convert", "kernels", "library_path", "load_weights", "plan", "quantize", "register",
    "session", "validate",
}  # fmt: skip


def test_all_is_the_surface():
    assert set(bn.__all__) == NAMES


def test_every_public_name_is_documented():
    for name in bn.__all__:
        documented = inspect.getdoc(getattr(bn, name))
        assert documented, name
        assert documented.strip(), name


def test_importing_the_package_does_not_start_a_runtime():
    import subprocess
    import sys

    code = "import sys, onnx_bitnet; assert 'onnxruntime' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stub_of_the_extension_names_what_is_there() -> None:
    stub = ast.parse(Path(bn.__file__).with_name("_native.pyi").read_text(encoding="utf-8"))
    stated = {node.name for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    there = {
        name for name, value in vars(_native).items() if getattr(value, "__module__", "") == _native.__name__
    }
    assert stated == {name for name in there if not name.startswith("_")}
