"""The steps that rewrite tests take: convert a small model, run it everywhere, look at what it became."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator
from rewrite.graphs import Case, pack

from onnx_bitnet import runtime
from onnx_bitnet.rewrite.cleanup import cleanup
from onnx_bitnet.rewrite.records import Linear, Refusal
from onnx_bitnet.rewrite.replace import Shared, replace
from onnx_bitnet.rewrite.scan import prepare, scan

Outputs = list[np.ndarray]


def find(model: onnx.ModelProto) -> tuple[Linear | Refusal, ...]:
    """Scan a model that is not to be changed."""
    return scan(ir.from_proto(model))


def find_one(model: onnx.ModelProto) -> Linear | Refusal:
    (found,) = find(model)
    return found


def convert(model: onnx.ModelProto, activation_bits: int = 32) -> onnx.ModelProto:
    """Pack every layer of an exactly ternary model; the argument stays as it is."""
    result = ir.from_proto(model)
    prepare(result)
    shared = Shared.of(result)
    packed = {}
    for linear in scan(result):
        if isinstance(linear, Linear):
            key = linear.weight.key
            packed[key] = packed.get(key) or pack(linear)
            replace(result, linear, packed[key], activation_bits=activation_bits, shared=shared)
    cleanup(result)
    proto: onnx.ModelProto = ir.to_proto(result)
    return proto


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnx_ir writes it: without empty fields."""
    result: onnx.ModelProto = ir.to_proto(ir.from_proto(model))
    return result


def reference(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Outputs:
    return ReferenceEvaluator(model).run(None, dict(feeds))


def stock(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], *, optimize: bool = True) -> Outputs:
    """Run in onnxruntime without the library."""
    options = runtime.quiet_options()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, dict(feeds))


def with_library(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> Outputs:
    options = runtime.quiet_options()
    runtime.register(options)
    return ort.InferenceSession(model.SerializeToString(), options).run(None, dict(feeds))


def expected(case: Case) -> Outputs:
    """What the float model computes. onnx.reference has no FusedMatMul and no old DequantizeLinear."""
    kinds = {(node.domain, node.op_type) for node in case.model.graph.node}
    if kinds & {("com.microsoft", "FusedMatMul"), ("", "DequantizeLinear")}:
        return stock(case.model, case.feeds, optimize=False)
    return reference(case.model, case.feeds)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
