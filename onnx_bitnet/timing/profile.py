"""Where a packed model spends its time, from onnxruntime's own profiler."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_bitnet import _native, files, runtime
from onnx_bitnet.data.inputs import Batch
from onnx_bitnet.rewrite.packed import PackedNode, packed_nodes

RUNS = 10
_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class PackedTime:
    """What one packed op does in a run of the model.

    Args:
        name: name of the layer.
        n: outputs.
        k: inputs.
        m: rows, over all of its calls.
        isa: instruction set of the kernel that multiplies.
        microseconds: time of its calls in a run.
        weight_bytes: bytes of its codes, times the calls.
    """

    name: str
    n: int
    k: int
    m: int
    isa: str
    microseconds: int
    weight_bytes: int

    @property
    def gbps(self) -> float:
        """GB of packed weights per second."""
        return self.weight_bytes / max(self.microseconds, 1) / 1e3


def packed_times(path: Path, batch: Batch, threads: int) -> tuple[float | None, tuple[PackedTime, ...]]:
    """Return the share of packed ops in a run, and each of them; None and nothing if the model has none.

    The figures are those of the fastest of RUNS runs. The profiler counts whole microseconds and slows a run
    down a little.
    """
    nodes = {str(packed.node.name): packed for packed in packed_nodes(files.read(path).model)}
    if not nodes:
        return None, ()
    events = _events(path, batch, threads)
    run = min((event for event in events if event["name"] == "model_run"), key=lambda event: event["dur"])
    calls: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        name = event["name"].removesuffix(_SUFFIX)
        if name != event["name"] and name in nodes and 0 <= event["ts"] - run["ts"] <= run["dur"]:
            calls.setdefault(name, []).append(event)
    packed = tuple(_time(nodes[name], called) for name, called in calls.items())
    return min(1.0, sum(op.microseconds for op in packed) / max(run["dur"], 1)), packed


def _events(path: Path, batch: Batch, threads: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.quiet_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = runtime.session(path, threads, options)
        for _ in range(RUNS):
            session.run(None, batch)
        found: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_bytes())
    return found


def _time(packed: PackedNode, calls: list[dict[str, Any]]) -> PackedTime:
    (x,) = calls[0]["args"]["input_type_shape"][0].values()
    return PackedTime(
        name=packed.layer,
        n=packed.n,
        k=packed.k,
        m=math.prod(x[:-1]) * len(calls),
        isa=str(_native.find("dotf" if packed.activation_bits == 32 else "dot", "i2s")),
        microseconds=sum(call["dur"] for call in calls),
        weight_bytes=packed.tensors[0].nbytes * len(calls),
    )
