"""MatMulTL1, MatMulTL2 and MatMulT5 in onnxruntime: what MatMulI2S computes, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import packed
import pytest
from corrupted import LOAD_ALL, python
from onnx import numpy_helper
from sessions import assert_same_bits, open_model, run

from onnx_bitnet.errors import ModelError
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.inspection import inspect

TERNARY = [form.name for form in FORMATS.values() if not form.four_levels]


@pytest.mark.parametrize("form", TERNARY)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("seed", range(6))
def test_integer_activations_give_the_bits_of_the_oracle(seed: int, bits: int, dtype: type, form: str):
    layer = packed.random_case(seed, bits, form)
    x = packed.rows(seed, (1 + seed % 7, layer.k), dtype)
    assert_same_bits(run(layer.model(dtype), x), layer.expected(x))


@pytest.mark.parametrize("form", TERNARY)
@pytest.mark.parametrize("bits", [8, 16])
def test_planes_in_integer_ratio_need_no_zero_points(bits: int, form: str):
    """They are merged when the session is made; these ops have no zero points that could be merged, too."""
    layer = packed.random_layer(np.random.default_rng(bits), 70, 128, planes=2, bits=bits, ternary=True)
    last = np.abs(layer.scale[1:]).astype(np.float16).astype(np.float32)
    layer = dataclasses.replace(layer, scale=np.concatenate([3 * last, last])).to(form)
    x = packed.rows(bits, (3, layer.k))
    assert_same_bits(run(layer.model(), x), layer.expected(x))


def all_formats(layer: packed.Layer, dtype: type = np.float32) -> onnx.ModelProto:
    """One model with the layer in every format: x -> y_i2s, y_tl1, ..."""
    nodes, initializers = [], {}
    for form in FORMATS:
        own = layer.to(form)
        node = own.node(y=f"y_{form}", name=form)
        node.input[1] = form
        nodes.append(node)
        initializers[form] = numpy_helper.from_array(own.weight, form)
    initializers |= {tensor.name: tensor for tensor in layer.initializers() if tensor.name != "weight"}
    return packed.model(
        nodes,
        list(initializers.values()),
        [packed.value("x", dtype, ["m", layer.k])],
        [packed.value(f"y_{form}", dtype, ["m", layer.n]) for form in FORMATS],
    )


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "k", "block_size"), [(1, 1, 0), (70, 97, 0), (33, 200, 32), (64, 33000, 0)])
def test_all_formats_give_the_same_bits(n: int, k: int, block_size: int, planes: int, bits: int):
    rng = np.random.default_rng(k)
    layer = packed.random_layer(rng, n, k, planes=planes, block_size=block_size, bits=bits, ternary=True)
    for dtype in (np.float32, np.float16):
        session = open_model(all_formats(layer, dtype), threads=2)
        for rows in (0, 1, 5, 40):
            want, *others = session.run(None, {"x": packed.rows(rows, (rows, k), dtype)})
            for got in others:
                assert_same_bits(got, want)


@pytest.mark.parametrize("form", TERNARY)
def test_kernel_and_function_body_agree(form: str):
    layer = packed.random_layer(
        np.random.default_rng(0), 40, 101, planes=2, block_size=32, bits=16, ternary=True
    )
    model, x = layer.to(form).model(rank=3), packed.rows(0, (2, 3, 101))
    plain = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(plain.run(None, {"x": x})[0], run(model, x), rtol=0, atol=1e-4)


def hostile(kind: str) -> onnx.ModelProto:
    """A model whose last output's row is a row of `packed.INVALID`."""
    form, k, text, _ = packed.INVALID[kind]
    layer = packed.random_layer(np.random.default_rng(0), 20, k, planes=2, ternary=True).to(form)
    weight = layer.weight.copy()
    weight[1, 19] = np.frombuffer(bytes.fromhex(text), np.uint8)
    return dataclasses.replace(layer, weight=weight).model(with_function=False)


def wrong_shape(form: str) -> onnx.ModelProto:
    layer = packed.random_layer(np.random.default_rng(0), 6, 40, ternary=True).to(form)
    return dataclasses.replace(layer, weight=layer.weight[:, :, :-1]).model(with_function=False)


def zero_point_given(form: str) -> onnx.ModelProto:
    model = packed.random_layer(np.random.default_rng(0), 6, 40, ternary=True).model(with_function=False)
    model.graph.node[0].op_type = FORMATS[form].op_type
    return model


def k_of_the_largest(form: str) -> onnx.ModelProto:
    model = packed.random_layer(np.random.default_rng(0), 6, 40, ternary=True).to(form).model()
    del model.functions[:]
    next(a for a in model.graph.node[0].attribute if a.name == "K").i = 2**31 - 1
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**31 - 1
    return model


HOSTILE = {kind: (hostile(kind), reason) for kind, (_, _, _, reason) in packed.INVALID.items()}
for name in TERNARY:
    HOSTILE[f"{name} wrong shape"] = wrong_shape(name), "input weight has shape [1, 6, "
    HOSTILE[f"{name} zero point"] = zero_point_given(name), ""
    HOSTILE[f"{name} largest K"] = k_of_the_largest(name), "input weight has shape [1, 6, "


@pytest.fixture(scope="module")
def load_errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Open every hostile model in a process of its own, which would show a crash; name -> error or None."""
    folder = tmp_path_factory.mktemp("hostile")
    for kind, (model, _) in HOSTILE.items():
        (folder / f"{kind}.onnx").write_bytes(model.SerializeToString())
    child = python("-c", LOAD_ALL, *(str(folder / f"{kind}.onnx") for kind in HOSTILE))
    results = dict(json.loads(line) for line in child.stdout.splitlines())
    assert child.returncode == 0, f"crashed at {list(results)[-1:]}: {child.stderr[-2000:]}"
    return {Path(path).stem: error for path, error in results.items()}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_weights_give_one_clear_error(kind: str, load_errors: dict[str, str | None]):
    error, expected = load_errors[kind], HOSTILE[kind][1]
    assert error is not None
    assert "\n" not in error
    if expected:
        assert f"{FORMATS[kind.split()[0]].op_type} node 'layer': " in error
        assert expected in error


@pytest.mark.parametrize("kind", packed.INVALID)
def test_inspection_refuses_the_same_bytes(kind: str, tmp_path: Path):
    onnx.save(hostile(kind), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=f"packed node 'layer': weight: {packed.INVALID[kind][3]}"):
        inspect(tmp_path / "model.onnx")


def test_a_damaged_name_of_an_op_is_no_op():
    model = packed.random_layer(np.random.default_rng(0), 6, 40, ternary=True).model(with_function=False)
    model.graph.node[0].op_type = "MatMulTL3"
    with pytest.raises(Exception, match="MatMulTL3"):
        open_model(model)
