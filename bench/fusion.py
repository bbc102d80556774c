"""Times layers that read the same activations: a packed op for each, and one fused op with a Split behind it.

    python bench/fusion.py [--k 2560] [--n 2560 640 640] [--rows 1 16 128] [--threads 1 2] [--seconds 2]

The weights are ternary, the activations have 8 bits. Both models run in turns; their results must be equal
bit for bit. On a busy machine the shortest times tell more than the medians, which stand in brackets.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import onnx
import onnxruntime as ort
from timing import open_session, print_row, print_table_head

import onnx_bitnet as bn


def write(path: Path, k: int, sizes: list[int]) -> None:
    """Write a float model with one layer of K inputs for each number of outputs."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    rng = np.random.default_rng(0)
    weights = [rng.integers(-1, 2, (k, n)).astype(np.float32) / 64 for n in sizes]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"], name=f"layer{i}") for i in range(len(sizes))],
        "layers",
        [helper.make_tensor_value_info("x", float32, ["rows", k])],
        [helper.make_tensor_value_info(f"y{i}", float32, ["rows", n]) for i, n in enumerate(sizes)],
        [onnx.numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def in_turns(sessions: list[ort.InferenceSession], x: np.ndarray, seconds: float) -> np.ndarray:
    """Return the microseconds of each run (runs, sessions)."""
    results = [session.run(None, {"x": x}) for session in sessions]
    for outputs in zip(*results, strict=True):
        assert all(np.array_equal(outputs[0], other) for other in outputs), "results differ"
    samples: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < end:
        turn = []
        for session in sessions:
            start = time.perf_counter()
            session.run(None, {"x": x})
            turn.append((time.perf_counter() - start) * 1e6)
        samples.append(turn)
    return np.array(samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, default=2560)
    parser.add_argument("--n", type=int, nargs="+", default=[2560, 640, 640])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()

    machine.print_header(machine.describe(arguments.threads))
    print_table_head("threads", "rows", "apart, us", "fused, us", "apart / fused")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float.onnx"
        write(source, arguments.k, arguments.n)
        paths = [source.with_name(name) for name in ("apart.onnx", "fused.onnx")]
        for path, fuse in zip(paths, (False, True), strict=True):
            bn.convert(source, path, bn.Recipe(activation_bits=8, fuse=fuse))
        for threads in arguments.threads:
            sessions = [open_session(path, threads) for path in paths]
            for rows in arguments.rows:
                x = np.random.default_rng(1).normal(size=(rows, arguments.k)).astype(np.float32)
                times = in_turns(sessions, x, arguments.seconds)
                least, middle = times.min(axis=0), np.median(times, axis=0)
                cells = [f"{a:.1f} ({b:.1f})" for a, b in zip(least, middle, strict=True)]
                ratios = f"{least[0] / least[1]:.3f} ({middle[0] / middle[1]:.3f})"
                print_row(threads, rows, *cells, ratios)


if __name__ == "__main__":
    main()
