"""The public surface is what the design names, and nothing more."""

from __future__ import annotations

import inspect

import onnx_bitnet as bn

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
