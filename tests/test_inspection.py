"""Inspection of files, sound and damaged."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from chains import K, chain, ordinary, ternary

import onnx_bitnet as bn
from onnx_bitnet.cli import tables
from onnx_bitnet.errors import ModelError
from onnx_bitnet.inspection import inspect


@pytest.fixture
def packed(tmp_path):
    source = chain(tmp_path / "in.onnx", {"a": ternary(32), "b": ordinary(16, 32), "c": ordinary(8, 16)})
    rules = [("*.b", {"mode": "ternary", "granularity": "block:16", "planes": 2, "activation_bits": 8})]
    bn.convert(source, tmp_path / "out.onnx", {"rules": rules})
    return tmp_path / "out.onnx"


def test_packed_and_float_layers_are_described(packed):
    found = inspect(packed)
    a, b = found.packed
    assert (a.name, a.n, a.k, a.planes, a.granularity) == ("layer.a", 32, K, 1, "tensor")
    assert (b.granularity, b.planes, b.activation_bits) == ("block:16", 2, 8)
    codes = np.sign(ternary(32)) + 1
    np.testing.assert_allclose(a.codes, [(codes == code).mean() for code in range(4)])
    assert found.float_layers == (("layer.c", 8, 16),)
    assert found.opsets == {"": 18, "onnx_bitnet": 1}
    assert found.producer == "test"
    assert found.nbytes == packed.stat().st_size


def test_a_recipe_of_many_rules_is_cut_off_in_the_terminal(tmp_path):
    source = chain(tmp_path / "in.onnx", {"a": ternary(32)})
    rules = [{"match": f"re:layer.*{'x?' * i}", "keep": False} for i in range(40)]
    bn.convert(source, tmp_path / "out.onnx", {"rules": rules})
    shown = tables.inspection(inspect(tmp_path / "out.onnx"))
    line = next(line for line in shown if str(line).startswith("onnx_bitnet.recipe: "))
    assert len(line) < 1100
    assert line.endswith("characters more with --json)")


ATTRIBUTES = {"size": ("N", 33), "zero": ("K", 0), "bits": ("activation_bits", 7)}
TENSORS = {
    "type": (2, np.ones((1, 1, 1), np.float64)),
    "nan": (2, np.full((1, 1, 1), np.nan, np.float32)),
    "bias": (4, np.ones(31, np.float32)),
}


def corrupt(model: onnx.ModelProto, what: str) -> None:
    node = next(node for node in model.graph.node if node.op_type == "MatMulI2S")
    tensor = {tensor.name: tensor for tensor in model.graph.initializer}
    if what in ATTRIBUTES:
        name, number = ATTRIBUTES[what]
        next(a for a in node.attribute if a.name == name).i = number
    elif what in TENSORS:
        index, array = TENSORS[what]
        tensor[node.input[index]].CopyFrom(onnx.numpy_helper.from_array(array, node.input[index]))
    elif what == "attribute":
        del node.attribute[:]
    elif what == "dynamic":
        node.input[1] = "x"
    elif what == "no bias":
        del node.input[4]
    elif what == "truncated":
        tensor[node.input[1]].raw_data = tensor[node.input[1]].raw_data[:-9]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("attribute", "packed node 'layer.a': attribute 'N' is missing"),
        ("size", "packed node 'layer.a': weight, scale and zero point .* do not fit N = 33"),
        ("zero", "packed node 'layer.a': N = 32, K = 0"),
        ("dynamic", "packed node 'layer.a': weight, scale or zero point is not a constant"),
        ("type", "packed node 'layer.a': weight, scale and zero point .* do not fit"),
        ("nan", "packed node 'layer.a': scale or zero point holds NaN or infinity; convert the model again"),
        ("bits", "packed node 'layer.a': activation_bits = 7; it must be 8, 16 or 32"),
        ("bias", r"packed node 'layer.a': its bias must be a constant float32 \[32\]"),
        ("no bias", r"packed node 'layer.a': its bias must be a constant float32 \[32\]"),
        ("truncated", "packed node 'layer.a': "),
    ],
)
def test_a_damaged_packed_layer_is_one_clear_error(packed, what, message):
    model = onnx.load(packed)
    corrupt(model, what)
    onnx.save(model, packed)
    with pytest.raises(ModelError, match=message) as error:
        inspect(packed)
    assert "\n" not in str(error.value)
