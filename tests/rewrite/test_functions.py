"""The function bodies: they must say in standard ops what the packed ops compute."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import packed
import pytest
import turns
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnx_bitnet import runtime
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.rewrite import functions

OPSETS = (11, 12, 13, 15, 17, 18, 20, 21, 23, 24, 25, 26)
LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def run(model: onnx.ModelProto, x: np.ndarray, level: str = "all") -> np.ndarray:
    """Run in stock onnxruntime: without the library."""
    options = runtime.quiet_options()
    options.graph_optimization_level = LEVELS[level]
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "Current official support for domain ai.onnx is till opset" in str(error):
            pytest.skip(f"onnxruntime {ort.__version__} does not know opset {model.opset_import[0].version}")
        raise
    return session.run(None, {"x": x})[0]


def evaluate(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, {"x": x})[0]


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    tolerance = 1e-5 if want.dtype == np.float32 else 2e-3
    scale = np.abs(want[np.isfinite(want)]).max(initial=1e-3)
    np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("opset", OPSETS)
def test_body_computes_the_op_in_every_opset(opset: int, bits: int):
    for seed in range(opset, opset + 4):
        layer = packed.random_case(seed, bits)
        rank = 1 + seed % 4
        dtype = np.float16 if opset >= functions.FLOAT16_OPSET and seed % 2 else np.float32
        model = layer.model(dtype, rank=rank, opset=opset)
        onnx.checker.check_model(model, full_check=True)
        x = packed.rows(seed, (*(2, 1, 3)[: rank - 1], layer.k), dtype)
        want = layer.expected(x)
        assert_close(evaluate(model, x), want)
        for level in LEVELS:
            assert_close(run(model, x, level), want)


TERNARY = [form.name for form in FORMATS.values() if not form.four_levels]


@pytest.mark.parametrize("form", TERNARY)
@pytest.mark.parametrize("opset", functions.OPSETS)
def test_body_of_each_ternary_format_computes_its_op(opset: int, form: str):
    for seed, bits in zip(range(3 * opset, 3 * opset + 3), (8, 16, 32), strict=True):
        layer = packed.random_case(seed, bits, form)
        dtype = np.float16 if opset >= functions.FLOAT16_OPSET and seed % 2 else np.float32
        model = layer.model(dtype, rank=1 + seed % 3, opset=opset)
        onnx.checker.check_model(model, full_check=True)
        x = packed.rows(seed, (*(2, 3)[: seed % 3], layer.k), dtype)
        want = layer.expected(x)
        assert_close(evaluate(model, x), want)
        assert_close(run(model, x, list(LEVELS)[seed % 3]), want)


@pytest.mark.parametrize("form", TERNARY)
@pytest.mark.parametrize("opset", [11, 17])
def test_body_unpacks_every_k(form: str, opset: int):
    rng = np.random.default_rng(opset)
    for k in (*range(1, 32), 47, 48, 49, 240):
        layer = packed.random_layer(rng, 3, k, bits=32, ternary=True).to(form)
        x = packed.rows(k, (2, k))
        assert_close(run(layer.model(opset=opset), x), layer.expected(x))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("opset", [11, 17, 23])
def test_body_gives_the_shape_of_y_to_shape_inference(opset: int, form: str):
    model = packed.random_case(1, 8, form).model(rank=3, opset=opset)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    dims = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims][:2] == ["d0", "d1"]


@pytest.mark.parametrize("opset", [11, 17, 18])
@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("static", [0.0, 0.02])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_with_nan_or_inf_give_rows_of_nan(opset: int, bits: int, static: float, bad: float):
    layer = packed.random_layer(np.random.default_rng(0), 5, 9, bits=bits, activation_scale=static)
    x = packed.rows(0, (3, 9))
    x[1, 4] = bad
    want = layer.expected(x)
    assert np.isnan(want[1]).all()
    for got in (run(layer.model(opset=opset), x), evaluate(layer.model(opset=opset), x)):
        assert_close(got, want)


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("level", LEVELS)
def test_no_rows_give_no_rows(opset: int, level: str):
    layer = packed.random_case(3, 8)
    x = np.zeros((0, layer.k), np.float32)
    assert run(layer.model(opset=opset), x, level).shape == (0, layer.n)


def test_zeros_give_the_bias():
    layer = packed.random_case(4, 8)
    y = run(layer.model(), np.zeros((2, layer.k), np.float32))
    np.testing.assert_array_equal(y, np.stack([layer.bias] * 2))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("opset", [11, 17, 18])
def test_onnxruntime_folds_all_of_the_weight_when_it_loads(opset: int, form: str, tmp_path):
    layer = packed.random_layer(np.random.default_rng(0), 6, 10, planes=2, block_size=4, ternary=True).to(
        form
    )
    options = runtime.quiet_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = LEVELS["basic"]
    ort.InferenceSession(layer.model(opset=opset).SerializeToString(), options)
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert (layer.k, layer.n) in {tuple(tensor.dims) for tensor in graph.initializer}
    left = {node.op_type for node in graph.node}
    assert not left & {"BitShift", "Mod", "Pad", "Transpose", "ReduceSum", "EyeLike"}


def test_only_listed_opsets_have_bodies():
    others = {"MatMulPanel", "BlockHadamard", "Attention", "AttentionByHead"}
    assert functions.FUNCTIONS.keys() == {form.op_type for form in FORMATS.values()} | others
    for op_type in ("MatMulI2S", *others):
        body = functions.FUNCTIONS[op_type]
        assert all(body(opset).domain == functions.DOMAIN for opset in functions.OPSETS)
        for opset in (10, 27):
            with pytest.raises(ValueError, match=f"opset {opset}: function bodies exist for 11 to 26"):
                body(opset)


def test_body_runs_in_a_subgraph_with_an_outer_weight():
    layer = packed.random_case(8, 8)
    y = packed.value("y", np.float32, None)
    then = helper.make_graph([layer.node()], "then", [], [y])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "else", [], [y])
    model = packed.model(
        [helper.make_node("If", ["cond"], ["z"], then_branch=then, else_branch=other)],
        layer.initializers(),
        [packed.value("cond", bool, []), packed.value("x", np.float32, ["m", layer.k])],
        [packed.value("z", np.float32, None)],
    )
    x = packed.rows(8, (4, layer.k))
    feeds = {"cond": np.array(True), "x": x}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert_close(session.run(None, feeds)[0], layer.expected(x))
    assert_close(ReferenceEvaluator(model).run(None, feeds)[0], layer.expected(x))


@pytest.mark.parametrize("opset", OPSETS)
def test_body_of_block_hadamard_computes_the_op_in_every_opset(opset: int):
    for seed, block_size in enumerate((1, 2, 32, 128, 1024)):
        turn = turns.random_turn(seed, block_size)
        rank = 1 + seed % 4
        dtype = np.float16 if opset >= functions.FLOAT16_OPSET and seed % 2 else np.float32
        model = turn.model(dtype, rank=rank, opset=opset)
        onnx.checker.check_model(model, full_check=True)
        x = packed.rows(seed, (*(2, 1, 3)[: rank - 1], turn.k), dtype)
        want = turn.expected(x)
        assert_close(evaluate(model, x), want)
        for level in LEVELS:
            assert_close(run(model, x, level), want)


@pytest.mark.parametrize("opset", [14, 17, 23])  # before 14 onnx does not follow a shape into Reshape
def test_body_of_block_hadamard_gives_the_shape_of_y_to_shape_inference(opset: int):
    model = turns.random_turn(1, 16).model(rank=3, opset=opset)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    dims = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["d0", "d1", 48]


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [(0, 3), (3, 0)])
def test_body_of_block_hadamard_takes_no_rows(opset: int, level: str, batch: tuple[int, int]):
    turn = turns.random_turn(3, 16)
    x = np.zeros((*batch, turn.k), np.float32)
    model = turn.model(rank=3, opset=opset)
    assert run(model, x, level).shape == x.shape
    assert evaluate(model, x).shape == x.shape


@pytest.mark.parametrize("opset", [11, 17])
def test_onnxruntime_folds_the_hadamard_matrix_when_it_loads(opset: int, tmp_path):
    options = runtime.quiet_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = LEVELS["basic"]
    ort.InferenceSession(turns.random_turn(0, 64).model(opset=opset).SerializeToString(), options)
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert (64, 64) in {tuple(tensor.dims) for tensor in graph.initializer}
    left = {node.op_type for node in graph.node}
    assert left <= {"Reshape", "Mul", "Shape", "Slice", "Concat", "MatMul", "Cast", "CastLike"}


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("block_size", [-16, -1, 0, 3, 24, 32, 8192, 2**40])
def test_body_of_block_hadamard_fails_where_blocks_do_not_fit(opset: int, block_size: int):
    model = turns.Turn(block_size, np.ones(48, np.float32)).model(opset=opset)
    x = np.ones((2, 48), np.float32)
    with pytest.raises(Exception, match="Reshape"):
        run(model, x)
    with pytest.raises((ValueError, IndexError)):
        evaluate(model, x)
