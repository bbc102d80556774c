"""MatMulI2S in onnxruntime: the oracle's bits, every way to call it, and every way to misuse it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import packed
import pytest
from corrupted import (
    as_graph_input,
    attribute,
    constant,
    load,
    node_input,
    put,
    python,
    truncate,
    x_last,
    x_type,
)
from onnx import TensorProto, helper
from sessions import assert_same_bits, open_model, options, run

from onnx_bitnet import _native, runtime
from onnx_bitnet.errors import ModelError

DTYPES = (np.float32, np.float16)


# What it computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("seed", range(12))
def test_integer_activations_give_the_bits_of_the_oracle(seed: int, bits: int, dtype: type):
    layer = packed.random_case(seed, bits)
    x = packed.rows(seed, (1 + seed % 7, layer.k), dtype)
    assert_same_bits(run(layer.model(dtype), x), layer.expected(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_float_activations_come_close_to_the_oracle(seed: int, dtype: type):
    layer = packed.random_case(seed, 32)
    x = packed.rows(seed, (5, layer.k), dtype)
    got, want = run(layer.model(dtype), x).astype(np.float64), layer.expected(x).astype(np.float64)
    limit = 1e-6 if dtype is np.float32 else 1e-3
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 16])
def test_results_do_not_depend_on_threads_or_on_other_rows(bits: int, dtype: type):
    rng = np.random.default_rng(bits)
    layer = packed.random_layer(rng, 333, 200, planes=2, block_size=64, bits=bits)
    model, x = layer.model(dtype), packed.rows(1, (70, 200), dtype)
    whole = run(model, x)
    for threads in (1, 2, 4):
        session = open_model(model, threads)
        for m in (1, 2, 3, 5, 8, 17, 33, 64, 70):
            assert_same_bits(session.run(None, {"x": x[:m]})[0], whole[:m])


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_rows_with_nan_or_inf_give_rows_of_nan(bits: int):
    layer = packed.random_case(2, bits)
    x = packed.rows(2, (5, layer.k))
    x[1, 0], x[3, -1] = np.nan, -np.inf
    y = run(layer.model(), x)
    assert np.isnan(y[[1, 3]]).all()
    assert np.isfinite(y[[0, 2, 4]]).all()


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_function_body_and_float_graph_agree(bits: int, dtype: type):
    layer = packed.random_layer(np.random.default_rng(bits), 40, 100, planes=2, block_size=32, bits=bits)
    model, x = layer.model(dtype, rank=3), packed.rows(0, (2, 3, 100), dtype)
    plain = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    body, kernel = plain.run(None, {"x": x})[0], run(model, x)
    scale = np.abs(kernel).max()
    limit = 1e-5 if dtype is np.float32 else 2e-3
    np.testing.assert_allclose(body / scale, kernel / scale, rtol=0, atol=limit)
    if bits != 8:  # 8 bits are too few to be called equal to float
        w = packed.reference.dequantize(layer.weight, layer.scale, layer.zero_point, 100, 32)
        product = x.astype(np.float64) @ w.T.astype(np.float64) + layer.bias
        np.testing.assert_allclose(kernel / scale, product / scale, rtol=0, atol=1e-3)


# Shapes


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_x_of_any_rank(rank: int):
    layer = packed.random_case(7, 8)
    x = packed.rows(7, (*(2, 3, 4)[: rank - 1], layer.k))
    assert_same_bits(run(layer.model(rank=rank), x), layer.expected(x))


def test_one_session_takes_every_batch_and_none():
    layer = packed.random_case(7, 8)
    session = open_model(layer.model(rank=3))
    for batch in [(1, 1), (0, 3), (2, 5), (3, 0), (1, 40)]:
        x = packed.rows(1, (*batch, layer.k))
        assert_same_bits(session.run(None, {"x": x})[0], layer.expected(x))


def test_shape_inference_keeps_names_of_dimensions():
    layer = packed.random_case(7, 8)
    assert open_model(layer.model(rank=3)).get_outputs()[0].shape == ["d0", "d1", layer.n]


@pytest.mark.parametrize("x_shape", [[None, None], ["m", None], [None, "k"], None])
def test_shape_of_y_downstream_is_right_when_dimensions_have_no_names(x_shape: packed.Shape | None):
    layer = packed.random_case(7, 8)
    model = packed.model(
        [layer.node(), helper.make_node("Shape", ["y"], ["shape"])],
        layer.initializers(),
        [packed.value("x", np.float32, x_shape)],
        [packed.value("y", np.float32, None), packed.value("shape", np.int64, None)],
    )
    for m in (2, 3):
        x = packed.rows(m, (m, layer.k))
        y, shape = open_model(model).run(None, {"x": x})
        assert_same_bits(y, layer.expected(x))
        assert shape.tolist() == [m, layer.n]


def test_two_unnamed_dimensions_are_not_taken_for_one():
    """Add would refuse, or fold, shapes that inference wrongly calls equal."""
    layer = packed.random_case(7, 8)
    model = packed.model(
        [layer.node(), layer.node("x2", "y2", "other"), helper.make_node("Add", ["y", "y2"], ["sum"])],
        layer.initializers(),
        [packed.value("x", np.float32, [None, layer.k]), packed.value("x2", np.float32, [None, layer.k])],
        [packed.value("sum", np.float32, None)],
    )
    x, x2 = packed.rows(1, (3, layer.k)), packed.rows(2, (1, layer.k))
    got = open_model(model).run(None, {"x": x, "x2": x2})[0]
    assert_same_bits(got, layer.expected(x) + layer.expected(x2))


# Sessions


@pytest.mark.parametrize("outer", [False, True])
def test_node_in_a_subgraph(outer: bool):
    if outer and tuple(map(int, ort.__version__.split(".")[:2])) < (1, 29):
        pytest.skip("onnxruntime before 1.29 hides the constants of outer graphs from custom ops")
    layer = packed.random_case(8, 8)
    y, constants = packed.value("y", np.float32, None), layer.initializers()
    then = helper.make_graph([layer.node()], "then", [], [y], [] if outer else constants)
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "else", [], [y])
    model = packed.model(
        [helper.make_node("If", ["cond"], ["z"], then_branch=then, else_branch=other)],
        constants if outer else [],
        [packed.value("cond", bool, []), packed.value("x", np.float32, ["m", layer.k])],
        [packed.value("z", np.float32, None)],
    )
    x = packed.rows(8, (4, layer.k))
    session = open_model(model)
    assert_same_bits(session.run(None, {"cond": np.array(True), "x": x})[0], layer.expected(x))
    assert_same_bits(session.run(None, {"cond": np.array(False), "x": x})[0], x)


def test_weight_in_an_external_file(tmp_path: Path):
    layer = packed.random_case(8, 8)
    path = tmp_path / "model.onnx"
    onnx.save(layer.model(), path, save_as_external_data=True, location="weights.data", size_threshold=0)
    x = packed.rows(8, (4, layer.k))
    assert_same_bits(runtime.session(path).run(None, {"x": x})[0], layer.expected(x))


def test_optimized_model_that_onnxruntime_saved(tmp_path: Path):
    """It has lost the function body, so it needs the library."""
    layer = packed.random_case(8, 8)
    saving = options()
    saving.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(layer.model().SerializeToString(), saving)
    x = packed.rows(8, (4, layer.k))
    session = runtime.session(tmp_path / "optimized.onnx")
    assert_same_bits(session.run(None, {"x": x})[0], layer.expected(x))


def test_io_binding():
    layer = packed.random_case(9, 8)
    x = packed.rows(9, (6, layer.k))
    y = np.zeros((6, layer.n), np.float32)
    session = open_model(layer.model())
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    session.run_with_iobinding(binding)
    assert_same_bits(y, layer.expected(x))


def test_two_sessions_from_one_options_object():
    shared = options()
    for seed in (1, 2):
        layer = packed.random_case(seed, 8)
        x = packed.rows(seed, (3, layer.k))
        session = ort.InferenceSession(layer.model().SerializeToString(), shared)
        assert_same_bits(session.run(None, {"x": x})[0], layer.expected(x))


def test_sessions_may_be_made_run_and_destroyed_at_the_same_time():
    cases = []
    for seed in range(4):
        layer = packed.random_case(seed, 8 if seed % 2 else 16)
        x = packed.rows(seed, (9, layer.k))
        cases.append((layer.model().SerializeToString(), x, layer.expected(x)))
    first = ort.InferenceSession(cases[0][0], options(2))

    def work(index: int) -> None:
        model, x, want = cases[index % 4]
        assert_same_bits(ort.InferenceSession(model, options(2)).run(None, {"x": x})[0], want)
        for _ in range(5):
            assert_same_bits(first.run(None, {"x": cases[0][1]})[0], cases[0][2])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(24)))


def test_float32_and_float16_nodes_share_a_model():
    layer = packed.random_case(3, 8)
    model = packed.model(
        [layer.node(), helper.make_node("Cast", ["x"], ["half"], to=10), layer.node("half", "y2", "other")],
        layer.initializers(),
        [packed.value("x", np.float32, ["m", layer.k])],
        [packed.value("y", np.float32, ["m", layer.n]), packed.value("y2", np.float16, ["m", layer.n])],
    )
    x = packed.rows(3, (4, layer.k))
    y, y2 = open_model(model).run(None, {"x": x})
    assert_same_bits(y, layer.expected(x))
    assert_same_bits(y2, layer.expected(x.astype(np.float16)))


# Instruction sets

DIGEST = """
import hashlib, sys
import numpy, packed
from onnx_bitnet import runtime
session = runtime.session(sys.argv[1], threads=2)
x = packed.rows(1, (37, 257), numpy.float32)
print(hashlib.sha256(session.run(None, {"x": x})[0].tobytes()).hexdigest())
"""


@pytest.mark.parametrize("bits", [8, 16])
def test_every_instruction_set_gives_the_same_bits(bits: int, tmp_path: Path):
    rng = np.random.default_rng(bits)
    layer = packed.random_layer(rng, 130, 257, planes=2, block_size=64, bits=bits)
    path = tmp_path / "model.onnx"
    onnx.save(layer.model(), path)
    want = hashlib.sha256(layer.expected(packed.rows(1, (37, 257))).tobytes()).hexdigest()
    for isa, runs_here in _native.isas():
        if runs_here:
            child = python("-c", DIGEST, str(path), ONNX_BITNET_ISA=isa)
            assert child.stdout.strip() == want, f"{isa}: {child.stderr}"


def test_unknown_instruction_set_is_an_error_when_the_session_is_made(tmp_path: Path, monkeypatch):
    path = tmp_path / "model.onnx"
    onnx.save(packed.random_case(0, 8).model(), path)
    monkeypatch.setenv("ONNX_BITNET_ISA", "mmx")
    with pytest.raises(ModelError, match=r"MatMulI2S node 'layer': ONNX_BITNET_ISA"):
        runtime.session(path)


# Misuse


def test_wrong_last_dimension_at_run():
    layer = packed.random_case(0, 8)
    session = open_model(layer.model(x_shape=["m", "k"]))
    with pytest.raises(
        Exception, match=rf"INVALID_ARGUMENT.*'layer'.*is {layer.k + 1}; it must be K = {layer.k}"
    ):
        session.run(None, {"x": np.zeros((2, layer.k + 1), np.float32)})
    x = packed.rows(0, (2, layer.k))
    assert_same_bits(session.run(None, {"x": x})[0], layer.expected(x))


def test_scalar_x_at_run():
    layer = packed.random_case(0, 8)
    model = layer.model()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match="input x has rank 0; it must have rank 1 to 32"):
        run(model, np.array(1, np.float32))


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_weight_behind_identity_must_be_folded_first(level: str):
    layer = packed.random_case(0, 8)
    model = layer.model()
    model.graph.node[0].input[1] = "copy"
    model.graph.node.insert(0, helper.make_node("Identity", ["weight"], ["copy"]))
    made = options()
    made.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    if level == "ORT_DISABLE_ALL":
        with pytest.raises(Exception, match="node 'layer': input weight must be an initializer"):
            ort.InferenceSession(model.SerializeToString(), made)
    else:
        ort.InferenceSession(model.SerializeToString(), made)


# The layer has N = 6, K = 40, 2 planes and 3 groups of 16. What is changed, and what the error must say.
CORRUPTIONS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "K zero": (attribute(K=0), "attribute K is 0; it must be 1 to 2147483647"),
    "K negative": (attribute(K=-40), "attribute K is -40; it must be"),
    "K huge": (attribute(K=1 << 62), "attribute K is 4611686018427387904; it must be"),
    "K largest": (attribute(K=2**31 - 1), "input weight has shape [2, 6, 10]; with N = 6 and K = 2147483647"),
    "K too small": (attribute(K=36), "input weight has shape [2, 6, 10]; with N = 6 and K = 36 it must be"),
    "K missing": (attribute(K=None), "attribute K is missing or no integer"),
    "K a float": (attribute(K=40.0), "attribute K is missing or no integer"),
    "K a list": (attribute(K=[40]), "attribute K is missing or no integer"),
    "K not that of x": (x_last(41), "the last dimension of input x is 41; it must be K = 40"),
    "N zero": (attribute(N=0), "attribute N is 0"),
    "N negative": (attribute(N=-(1 << 63)), "attribute N is -9223372036854775808"),
    "N too large": (attribute(N=7), "input weight has shape [2, 6, 10]; with N = 7"),
    "N missing": (attribute(N=None), "attribute N is missing"),
    "block_size negative": (attribute(block_size=-16), "attribute block_size is -16"),
    "block_size huge": (attribute(block_size=1 << 40), "attribute block_size is 1099511627776"),
    "block_size another": (
        attribute(block_size=8),
        "input scale has shape [2, 6, 3]; it must be [2, 6 or 1, 5 or 1]",
    ),
    "block_size of one": (attribute(block_size=1), "it must be [2, 6 or 1, 40 or 1]"),
    "block_size none": (attribute(block_size=0), "it must be [2, 6 or 1, 1 or 1]"),
    "activation_bits": (
        attribute(activation_bits=9),
        "attribute activation_bits is 9; it must be 8, 16 or 32",
    ),
    "activation_bits zero": (
        attribute(activation_bits=0),
        "attribute activation_bits is 0; it must be 8, 16 or 32",
    ),
    "activation_scale NaN": (
        attribute(activation_scale=np.nan),
        "activation_scale is nan; it must be finite",
    ),
    "activation_scale infinite": (
        attribute(activation_scale=np.inf),
        "activation_scale is inf; it must be finite",
    ),
    "activation_scale negative": (
        attribute(activation_scale=-0.5),
        "activation_scale is -0.5; it must be finite",
    ),
    "activation_scale missing": (
        attribute(activation_scale=None),
        "attribute activation_scale is missing or no float",
    ),
    "weight int8": (constant("weight", lambda w: w.view(np.int8)), "tensor(int8)"),
    "weight flat": (constant("weight", np.ravel), "input weight must be a tensor of rank 3"),
    "weight short": (constant("weight", lambda w: w[:, :, :-1]), "input weight has shape [2, 6, 9]; with"),
    "weight narrow": (constant("weight", lambda w: w[:, :-1]), "input weight has shape [2, 5, 10]; with"),
    "weight without planes": (constant("weight", lambda w: w[:0]), "input weight has shape [0, 6, 10]; with"),
    "weight of 5 planes": (constant("weight", lambda w: w[[0, 1, 0, 1, 0]]), "must be [1 to 4, 6, 10]"),
    "weight truncated": (truncate("weight"), ""),
    "weight a graph input": (as_graph_input("weight", keep=False), "input weight must be an initializer"),
    "weight overridable": (as_graph_input("weight", keep=True), "input weight must be an initializer"),
    "weight nowhere": (node_input(1, "nowhere"), ""),
    "scale of another plane": (
        constant("scale", lambda s: s[:1]),
        "input scale has shape [1, 6, 3]; it must be",
    ),
    "scale flat": (constant("scale", np.ravel), "input scale must be a tensor of rank 3"),
    "scale empty": (constant("scale", lambda s: s[:, :, :0]), "input scale has shape [2, 6, 0]; it must be"),
    "scale double": (
        constant("scale", lambda s: s.astype(np.float64)),
        "input scale must be float32 or float16",
    ),
    "scale infinite": (constant("scale", put((1, 5, 2), np.inf)), "input scale holds NaN or infinity"),
    "scale a graph input": (as_graph_input("scale", keep=False), "input scale must be an initializer"),
    "zero_point NaN": (
        constant("zero_point", put((0, 0, 0), np.nan)),
        "input zero_point holds NaN or infinity",
    ),
    "zero_point overridable": (
        as_graph_input("zero_point", keep=True),
        "input zero_point must be an initializer",
    ),
    "zero_point of 4 groups": (
        constant("zero_point", lambda z: z[:, :, [0, 1, 2, 0]]),
        "input zero_point has shape",
    ),
    "bias short": (constant("bias", lambda b: b[:-1]), "input bias must be float32 [6]"),
    "bias scalar": (constant("bias", lambda b: b[0]), "input bias must be a tensor of rank 1"),
    "bias double": (constant("bias", lambda b: b.astype(np.float64)), "tensor(double)"),
    "bias a graph input": (as_graph_input("bias", keep=False), "input bias must be an initializer"),
    "bias missing": (node_input(4, None), ""),
    "scale empty name": (node_input(2, ""), ""),
    "only x": (node_input(1, None), ""),
    "x double": (x_type(TensorProto.DOUBLE), "tensor(double)"),
}


@pytest.fixture(scope="module")
def load_errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Open every corrupted model in a process of its own, which would show a crash; name -> error or None."""
    layer = packed.random_layer(np.random.default_rng(0), 6, 40, planes=2, block_size=16)
    models = {}
    for name, (change, _) in CORRUPTIONS.items():
        # Without the body: with it, onnxruntime may find other faults first.
        models[name] = layer.model(x_shape=["m", "k"], with_function=False)
        change(models[name])
    return load(models, tmp_path_factory.mktemp("corrupted"))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_model_gives_one_clear_error(name: str, load_errors: dict[str, str | None]):
    error, expected = load_errors[name], CORRUPTIONS[name][1]
    assert error is not None
    assert "\n" not in error
    assert expected in error
    if expected and "tensor(" not in expected:
        assert "MatMulI2S node 'layer': " in error


def test_a_very_long_node_name_is_no_problem():
    model = packed.random_case(0, 8).model()
    model.graph.node[0].name = "n" * 5000
    attribute(activation_bits=7)(model)
    with pytest.raises(
        Exception, match=r"MatMulI2S node '\(a name of 5001 bytes\)': attribute activation_bits is 7"
    ):
        open_model(model)
