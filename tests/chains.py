"""Models of one layer after the other, and weights for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

K = 64


def ternary(n: int = 32, k: int = K, scale: float = 0.25, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).integers(-1, 2, (k, n)) * scale).astype(np.float32)


def ordinary(n: int = 32, k: int = K, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((k, n), np.float32)


def chain(path: Path, weights: dict[str, np.ndarray], op_type: str = "MatMul") -> Path:
    """Save a model with one layer after the other, each named after its weight."""
    nodes, x = [], "x"
    for name in weights:
        nodes.append(onnx.helper.make_node(op_type, [x, name], [f"{name}.y"], name=f"layer.{name}"))
        x = f"{name}.y"
    first, *_, last = (*weights.values(), *weights.values())
    graph = onnx.helper.make_graph(
        nodes,
        "chain",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", first.shape[0]])],
        [onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, ["M", last.shape[1]])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8, producer_name="test"
    )
    onnx.save(model, path)
    return path
