"""What the end-to-end tests share: running a file, and the float model that a conversion stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import written

from onnx_bitnet import reference
from onnx_bitnet.rewrite.packed import packed_nodes

Feeds = dict[str, np.ndarray]
Run = Callable[[Path, Feeds], list[np.ndarray]]


@pytest.fixture(scope="session")
def run_stock() -> Run:
    """Run a file in onnxruntime as it comes, without the library."""
    return written.run


@pytest.fixture(scope="session")
def simulate() -> Callable[[Path, Path, Path], Path]:
    """Write the float model whose weights are those that a converted file decodes to."""

    def write(source: Path, packed_path: Path, target: Path) -> Path:
        model = ir.load(source)
        nodes = {node.name: node for node in model.graph.all_nodes()}
        for packed in packed_nodes(ir.load(packed_path)):
            weight = reference.dequantize(*packed.arrays(), packed.k, packed.block_size, packed.format)
            _set_weight(nodes[packed.layer], weight)
        ir.save(model, target)
        return target

    return write


def _set_weight(node: ir.Node, weight: np.ndarray) -> None:
    """Replace the second operand of a MatMul, Gemm or pointwise Conv by weight (N, K)."""
    value = node.inputs[1]
    old = ir.convenience.get_const_tensor(value)
    transposed = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    )
    tensor = ir.tensor((weight.T if transposed else weight).reshape(tuple(old.shape)), name=value.name)
    if value.is_initializer():
        value.const_value = tensor
    else:
        value.producer().attributes["value"] = ir.AttrTensor("value", tensor)
