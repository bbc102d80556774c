"""Measures what it takes to open a model: seconds, and memory at its peak and after a run.

    python bench/memory.py [--layers 60] [--variants i2s t5 panel] [--threads 1] [--folder .]

The model has the linear layers of BitNet b1.58 2B4T (2560 wide, 6912 inside; 30 layers are 521 MB of packed
weights) with random ternary weights, no two alike, and nothing else. It is written to --folder and deleted.
`panel` stores them in the order in which kernels read them. Each line is a process of its own in which one
or two sessions open the model one after the other and run once on one row. `anonymous` is memory of that
process alone; `mapped` is what it holds of files, mostly the model's, which the system takes back when memory
is short; pages that are mapped twice count once, but twice in the peak. Seconds are those of the last session
to open and to run for the first time, with the file in the system's cache. What the process held before,
onnxruntime imported, is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from timing import open_session, print_row, print_table_head

from onnx_bitnet.formats import FORMATS, PANEL_OP, panel_shape, to_panels
from onnx_bitnet.rewrite.functions import DOMAIN

HIDDEN, INSIDE, KEY = 2560, 6912, 640
# name, what it reads, outputs, inputs
LAYERS = (
    ("q", "x", HIDDEN, HIDDEN),
    ("k", "x", KEY, HIDDEN),
    ("v", "x", KEY, HIDDEN),
    ("o", "q", HIDDEN, HIDDEN),
    ("gate", "o", INSIDE, HIDDEN),
    ("up", "o", INSIDE, HIDDEN),
    ("down", "up", HIDDEN, INSIDE),
)
VARIANTS = (*FORMATS, "panel")


class Builder:
    """A model as it grows."""

    def __init__(self, variant: str) -> None:
        self.in_panels = variant == "panel"
        self.form = FORMATS["i2s" if self.in_panels else variant]
        rng = np.random.default_rng(0)
        codes = {(n, k): rng.integers(0, 3, (n, k), np.uint8) for n, k in {row[2:] for row in LAYERS}}
        self.weights = {shape: self.form.pack(matrix) for shape, matrix in codes.items()}
        self.initializers: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.scale = self.constant("scale", np.full((1, 1, 1), 0.02, np.float32))
        self.one = self.constant("one", np.ones((1, 1, 1), np.float32))
        self.zeros = {n: self.constant(f"zeros.{n}", np.zeros(n, np.float32)) for n in (HIDDEN, INSIDE, KEY)}

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Add a small constant."""
        return self._add(ir.tensor(array, name=name))

    def _add(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.initializers.append(value)
        return value

    def weight(self, n: int, k: int) -> ir.Value:
        """Another weight: the rows of the first one, turned round by some; made when it is written."""
        rows, turn = self.weights[n, k], 7 * len(self.nodes)

        def make() -> ir.Tensor:
            weight = np.roll(rows, turn, axis=0)[None]
            return ir.tensor(to_panels(weight, k) if self.in_panels else weight)

        name = f"weight.{len(self.nodes)}"
        shape = ir.Shape((1, *(panel_shape(n, k) if self.in_panels else rows.shape)))
        return self._add(ir.LazyTensor(make, ir.DataType.UINT8, shape, name=name))

    def layer(self, x: ir.Value, name: str, n: int, k: int) -> ir.Value:
        """Add y = W x with the next weight, and return y."""
        zero_point = [self.one] if self.form.four_levels else []
        attributes = {"K": k, "N": n, "block_size": 0, "activation_bits": 8, "activation_scale": 0.0}
        inputs = [x, self.weight(n, k), self.scale, *zero_point, self.zeros[n]]
        op_type = PANEL_OP if self.in_panels else self.form.op_type
        node = ir.node(op_type, inputs, attributes, domain=DOMAIN, name=name)
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(node)
        return node.outputs[0]


def write(path: Path, variant: str, count: int) -> int:
    """Write the model, weight by weight, and return the bytes of its file of weights."""
    builder = Builder(variant)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["m", HIDDEN])
    values, outputs = {"x": x}, []
    for index in range(count):
        for name, source, n, k in LAYERS:
            values[name] = builder.layer(values[source], f"{index}.{name}", n, k)
        outputs += [values["k"], values["v"], values["gate"]]
        values["x"] = values["down"]
    graph = ir.Graph(
        [x],
        [*outputs, values["x"]],
        nodes=builder.nodes,
        initializers=builder.initializers,
        opset_imports={"": 18, DOMAIN: 1},
        name="layers",
    )
    data = path.with_suffix(".data")
    ir.save(
        ir.Model(graph, ir_version=8), path, external_data=data.name, alignment=4096, align_threshold=4096
    )
    return data.stat().st_size


def held(file: str, key: str) -> int:
    """Return one of the kernel's figures for this process, in bytes."""
    lines = Path("/proc/self", file).read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def child(path: Path, sessions: int, threads: int) -> dict[str, float]:
    """Open the model and run it; return seconds and bytes."""
    feeds = {"x": np.random.default_rng(0).normal(size=(1, HIDDEN)).astype(np.float32)}
    anonymous, mapped = (held("smaps_rollup", key) for key in ("Pss_Anon", "Pss_File"))
    resident = held("status", "VmRSS")
    opened = []
    for _ in range(sessions):
        start, used = time.perf_counter(), time.process_time()
        opened.append(open_session(path, threads))
        ready, used = time.perf_counter(), time.process_time() - used
        opened[-1].run(None, feeds)
        ran = time.perf_counter()
    return {
        "open": ready - start,
        "cpu": used,
        "first run": ran - ready,
        "anonymous": held("smaps_rollup", "Pss_Anon") - anonymous,
        "mapped": held("smaps_rollup", "Pss_File") - mapped,
        "peak": held("status", "VmHWM") - resident,
    }


def measure(path: Path, sessions: int, threads: int) -> dict[str, float]:
    """Measure in a new process."""
    command = [sys.executable, __file__, "--child", str(path), str(sessions), str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=60, help="decoder layers of 17.4 MB each")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["i2s", "t5", "panel"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the model is written; default: the temporary one")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        path, sessions, threads = arguments.child
        sys.stdout.write(json.dumps(child(Path(path), int(sessions), int(threads))))
        return
    import machine  # imports onnx_bitnet, whose memory a child would count

    machine.print_header(machine.describe([arguments.threads]))
    print_table_head(
        "weights",
        "sessions",
        "open s",
        "its CPU s",
        "first run s",
        "anonymous MB",
        "mapped MB",
        "peak MB",
        "resident / file",
    )
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = Path(folder) / "model.onnx"
            size = write(path, variant, arguments.layers)
            for sessions in (1, 2):
                found = measure(path, sessions, arguments.threads)
                print_row(
                    f"{variant}, {size / 1e6:.0f} MB",
                    sessions,
                    *(f"{found[key]:.2f}" for key in ("open", "cpu", "first run")),
                    *(f"{found[key] / 1e6:.0f}" for key in ("anonymous", "mapped", "peak")),
                    f"{(found['anonymous'] + found['mapped']) / size:.2f}",
                )


if __name__ == "__main__":
    main()
