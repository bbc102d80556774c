"""The package is a stack: a module imports only from modules below it."""

from __future__ import annotations

import ast
from pathlib import Path

import onnx_bitnet

ROOT = Path(onnx_bitnet.__file__).parent
# Bottom first; what stands in one row may import from its own row.
STACK = [
    ["errors", "arguments", "interrupts", "reference", "scale_types", "_native"],
    ["cache", "report", "granularity", "formats", "graphs", "kernels", "machine", "spill", "data"],
    ["recipe_file", "recipe_values"],
    ["recipe", "files"],
    ["outputs"],
    ["quantization"],
    ["rewrite", "runtime", "weights"],
    ["inspection", "runner", "taps"],
    ["calibration", "validation"],
    ["conversion", "doctor", "timing", "decoder", "torch"],
    ["planning"],
    ["__init__"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, row in enumerate(STACK) for name in row}


def imported(path: Path) -> set[str]:
    """The modules of the package, and other packages, that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module in (
                "onnx_bitnet",
                "onnx_bitnet.rewrite",
                "onnx_bitnet.weights",
                "onnx_bitnet.decoder",
            ):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_place():
    there = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert there | {"_native"} == set(LEVEL)


def test_imports_point_down():
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "onnx_bitnet" and len(parts) > 1 and parts[1] in LEVEL:
                assert LEVEL[parts[1]] <= LEVEL[here], f"{path.name} imports {name} from above"


def test_the_rewriter_knows_no_runtime_and_the_runtime_no_rewriter():
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        names = {name.split(".")[0] for name in imported(path)}
        if parts[0] == "rewrite":
            assert "onnxruntime" not in names, path
        if parts[0] == "runtime.py":
            assert not names & {"onnx", "onnx_ir"}, path


def test_the_oracle_knows_only_numpy():
    names = set().union(*(imported(path) for path in (ROOT / "reference").glob("*.py")))
    others = {name.split(".")[0] for name in names if not name.startswith("onnx_bitnet.reference.")}
    assert {"numpy"} <= others <= {"__future__", "math", "numpy", "ml_dtypes", "typing", "collections"}


def test_only_the_package_for_torch_imports_torch():
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] != "torch":
            names = {name.split(".")[0] for name in imported(path)}
            assert "torch" not in names, path
            assert not any(name.startswith("onnx_bitnet.torch") for name in imported(path)), path
