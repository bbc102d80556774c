"""The programs in bench/ run and write what they say they do. Never how fast anything is."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import onnx_bitnet as bn

BENCH = Path(__file__).parents[2] / "bench"

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which("cc"), reason="needs a C compiler called cc"
)


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, BENCH / program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("limits") / "limits.json"
    shown = run("machine.py", "--threads", 1, "--rounds", 1, "--json", path)
    assert shown.startswith("cpu: ")
    return path


@pytest.fixture(scope="module")
def kernels(limits: Path) -> Path:
    path = limits.with_name("kernels.json")
    size = ("--shapes", "64x64", "128x32", "--m", 1, 3, "--seconds", 0.001)
    run("kernels.py", *size, "--limits", limits, "--json", path)
    return path


@pytest.fixture(scope="module")
def layers(limits: Path) -> Path:
    path = limits.with_name("layers.json")
    size = ("--shapes", "128x256", "--m", 1, 3, "--threads", 1, "--rounds", 1, "--cold-bytes", 20000)
    run("layers.py", *size, "--limits", limits, "--json", path)
    return path


def test_limits_are_positive(limits):
    (found,) = json.loads(limits.read_text())["limits"]
    assert set(found["read_gbps"]) == {"L2", "L3", "DRAM"}
    assert min(found["read_gbps"].values()) > 0
    strongest = [kernel.isa for kernel in bn.kernels() if kernel.runs_here][-1]
    assert found["tops"].get(strongest, 1) > 0


def test_every_kernel_is_timed(kernels):
    document = json.loads(kernels.read_text())
    assert document["schema"] == "onnx_bitnet.bench_kernels/1"
    timed = {row["kernel"] for row in document["kernels"]}
    runs_here = {str(kernel) for kernel in bn.kernels() if kernel.runs_here}
    assert timed | set(document["not_timed"]) == runs_here
    assert {name for name in runs_here if name.startswith("dot_")} <= timed
    assert min(row["min_ns"] for row in document["kernels"]) > 0


def test_filters_leave_the_others_out(limits, tmp_path):
    size = ("--shapes", "64x64", "--m", 1, "--seconds", 0.001, "--limits", limits)
    run(
        "kernels.py",
        "--op",
        "dot",
        "--isa",
        "scalar",
        *size,
        "--cold",
        100_000,
        "--json",
        tmp_path / "out.json",
    )
    rows = json.loads((tmp_path / "out.json").read_text())["kernels"]
    assert {row["kernel"] for row in rows} == {f"dot_{form}_scalar" for form in ("i2s", "w4", "w8", "t5")}


def test_instructions_are_counted_by_a_program_that_starts():
    assert "counts the instructions" in run("instructions.py", "--help").lower()


def test_a_layer_runs_beside_its_peers(layers):
    document = json.loads(layers.read_text())
    assert document["schema"] == "onnx_bitnet.bench_layers/1"
    cells = document["layers"]
    assert [(cell["where"], cell["m"]) for cell in cells] == [
        (where, m) for where in ("hot", "cold") for m in (1, 3)
    ]
    names = {result["name"] for result in cells[0]["results"]}
    assert {"ours A8", "ours A16 block:128", "ORT fp32", "ORT int8"} <= names
    assert all(result["error"] < 0.3 for cell in cells for result in cell["results"])


def test_the_roofline_is_drawn(kernels, layers, tmp_path):
    pytest.importorskip("matplotlib", reason="install the extra [report]")
    run("roofline.py", layers, kernels, "--out", tmp_path / "roofline")
    assert (tmp_path / "roofline.svg").read_text().startswith("<?xml")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="install the extra [test]")
def test_whole_models():
    shown = run("models.py", "digits", "--threads", 1, "--rounds", 1)
    assert "| digits | batch 64 | 1 |" in shown
    assert "| digits | memory, MB |" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_sessions_is_bounded(tmp_path):
    """A session holds each weight once, two share them, and panels in the file are not copied."""
    shown = run("memory.py", "--layers", 4, "--variants", "i2s", "panel", "--folder", tmp_path)
    rows = [line.strip("| ").split(" | ") for line in shown.splitlines()[-4:]]
    assert [row[:2] for row in rows] == [[f"{name}, 70 MB", n] for name in ("i2s", "panel") for n in "12"]
    assert max(float(row[-1]) for row in rows) <= 1.3
    assert max(float(row[5]) for row in rows[2:]) <= 20  # MB of the process's own
    assert not list(tmp_path.iterdir())


def test_a_decoder_is_timed():
    small = ("--geometry", "tiny", "--threads", 1, "--prefill", 8, "--decode", 2, "--rounds", 1)
    shown = run("decoder.py", *small, "--head", "int8", "--types")
    assert "| ours, i2s, head int8 | 1 |" in shown
    assert "| ours, t5, head int8 | 1 |" in shown
    assert "| MatMulI2S |" in shown


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_llama_files_are_ternary(tmp_path, kind):
    pytest.importorskip("gguf", reason="install the extra [text]")
    sys.path.insert(0, str(BENCH))
    import llama_files

    from onnx_bitnet.decoder import GEOMETRIES

    architecture = GEOMETRIES["tiny"].replace(hidden=256, ffn=512, head_size=64, vocabulary=512)
    llama_files.write(tmp_path / "model.gguf", architecture, kind)
    weights = bn.load_weights(tmp_path / "model.gguf")
    assert len(weights) == 7 * architecture.layers
    assert {weight.granularity for weight in weights.values()} == {"tensor"}
    assert weights.others["token_embd.weight"].shape == (512, 256)
    counts = np.bincount(weights["blk.0.ffn_up.weight"].codes().reshape(-1))
    np.testing.assert_allclose(counts / counts.sum(), [1 / 3] * 3, atol=0.01)


def test_a_type_of_llama_that_cannot_be_written_is_refused():
    done = subprocess.run(
        [sys.executable, BENCH / "decoder.py", "--types", "IQ1_S"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "invalid choice: 'IQ1_S' (choose from 'TQ1_0', 'TQ2_0', 'Q4_0')" in done.stderr


def test_fused_layers_are_timed_beside_the_same_apart():
    shown = run(
        "fusion.py", "--k", 64, "--n", 32, 16, "--rows", 1, 3, "--threads", 1, "--seconds", 0.01
    ).splitlines()
    assert [line.split(" | ")[1] for line in shown if line.startswith("| 1 ")] == ["1", "3"]


def test_attention_is_timed_beside_onnxruntimes():
    shown = run(
        "attention.py", "--shapes", "1x5x2x8", "2x70x3x20", "--threads", 1, "--seconds", 0.01
    ).splitlines()
    rows = [line.strip("| ").split(" | ") for line in shown if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == ["1x5x2x8", "2x70x3x20"]
    assert min(float(row[-1].split()[0]) for row in rows) > 0


def test_a_sweep_times_every_size(tmp_path):
    shown = run("sweep.py", "--axes", "M", "--most", 3, "--rounds", 1, "--json", tmp_path / "sweep.json")
    assert "of 3 sizes are more than 1.5 times off their curve" in shown
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [point["m"] for point in points] == [1, 2, 3]
    assert min(point["us"] for point in points) > 0


def test_a_sweep_finds_cliffs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    sweep = importlib.import_module("sweep")
    assert sweep.off_curve([1, 2, 4], [10, 20, 40]) == pytest.approx([0.5, 1, 1])
    assert sweep.off_curve([1, 2, 4, 8], [10, 40, 40, 80]) == pytest.approx([0.25, 2, 2**-0.5, 1])
    assert sweep.off_curve([1, 2, 3], [10, 11, 5])[:2] == pytest.approx([2, 2.2])
