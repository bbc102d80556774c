"""Files that conversions wrote: what is in them, and what they compute without the library."""

from __future__ import annotations

import onnx
import onnxruntime as ort

import onnx_bitnet as bn
from onnx_bitnet import runtime


def run(path, feeds):
    """Run a file in onnxruntime as it comes, without the library."""
    options = runtime.quiet_options()
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def ops(path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def convert(source, target, recipe):
    report = bn.convert(source, target, recipe)
    assert report.output_bytes == sum(
        path.stat().st_size for path in (target, target.with_name(target.name + ".data")) if path.exists()
    )
    return report
