"""BlockHadamard in onnxruntime: the oracle's bits, every way to call it, and every way to misuse it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import packed
import pytest
import turns
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
BLOCKS = [2**power for power in range(13)]


# What it computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCKS)
def test_result_has_the_bits_of_the_oracle(block_size: int, dtype: type):
    for blocks in (1, 3):
        turn = turns.random_turn(blocks, block_size, blocks)
        x = packed.rows(block_size, (5, turn.k), dtype)
        assert_same_bits(run(turn.model(dtype), x), turn.expected(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads_or_on_other_rows(dtype: type):
    turn = turns.random_turn(0, 128, 5)
    model, x = turn.model(dtype), packed.rows(1, (500, turn.k), dtype)
    whole = turn.expected(x)
    for threads in (1, 2, 4):
        session = open_model(model, threads)
        for m in (1, 2, 101, 102, 103, 204, 205, 500):  # 102 rows make a task
            assert_same_bits(session.run(None, {"x": x[:m]})[0], whole[:m])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_task(dtype: type):
    turn = turns.random_turn(0, 32, 2**16 // 32 + 1)
    x = packed.rows(0, (3, turn.k), dtype)
    assert_same_bits(run(turn.model(dtype), x, threads=2), turn.expected(x))


def test_twice_without_signs_is_x():
    turn = turns.Turn(64, np.ones(192, np.float32))
    x = np.random.default_rng(0).integers(-1000, 1000, (4, 192)).astype(np.float32)
    model = turn.model()
    assert_same_bits(run(model, run(model, x)), x)  # sums of integers over 8 are exact


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_block(bad: float):
    turn = turns.random_turn(1, 16)
    x = packed.rows(1, (3, turn.k))
    clean = run(turn.model(), x)
    x[1, 20] = bad
    y = run(turn.model(), x)
    assert not np.isfinite(y[1, 16:32]).any()
    y[1, 16:32] = clean[1, 16:32]
    assert_same_bits(y, clean)


def test_float16_result_may_be_infinite():
    turn = turns.Turn(16, np.ones(16, np.float32))
    y = run(turn.model(np.float16), np.full((1, 16), 60000, np.float16))
    assert np.isinf(y[0, 0])
    assert not y[0, 1:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_and_function_body_agree(dtype: type):
    turn = turns.random_turn(2, 128)
    model, x = turn.model(dtype, rank=3), packed.rows(0, (2, 3, turn.k), dtype)
    plain = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    body, kernel = plain.run(None, {"x": x})[0], run(model, x)
    scale = np.abs(kernel).max()
    limit = 1e-6 if dtype is np.float32 else 1e-3
    np.testing.assert_allclose(body / scale, kernel / scale, rtol=0, atol=limit)


def test_turn_before_a_packed_layer_undoes_the_turn_of_its_weight():
    """What the op is for: x W^T = H(x s) (H(W s))^T, row by row."""
    turn = turns.random_turn(3, 32, 2)
    layer = packed.random_layer(np.random.default_rng(3), 20, turn.k, bits=32)
    w = packed.reference.dequantize(layer.weight, layer.scale, layer.zero_point, turn.k)
    unturned = packed.reference.block_hadamard(w, np.ones_like(turn.signs), 32) * turn.signs
    model = packed.model(
        [turn.node("x", "turned"), layer.node("turned")],
        [*turn.initializers(), *layer.initializers()],
        [packed.value("x", np.float32, ["m", turn.k])],
        [packed.value("y", np.float32, ["m", layer.n])],
        with_function=False,
    )
    x = packed.rows(3, (4, turn.k))
    want = x @ unturned.T + layer.bias
    np.testing.assert_allclose(run(model, x), want, rtol=0, atol=2e-6 * np.abs(want).max())


# Shapes


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_x_of_any_rank(rank: int):
    turn = turns.random_turn(4, 8)
    x = packed.rows(4, (*(2, 3, 4)[: rank - 1], turn.k))
    assert_same_bits(run(turn.model(rank=rank), x), turn.expected(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_session_takes_every_batch_and_none(dtype: type):
    turn = turns.random_turn(5, 16)
    session = open_model(turn.model(dtype, rank=3))
    for batch in [(1, 1), (0, 3), (2, 5), (3, 0), (1, 40)]:
        x = packed.rows(1, (*batch, turn.k), dtype)
        assert_same_bits(session.run(None, {"x": x})[0], turn.expected(x))


def test_shape_inference_keeps_names_of_dimensions():
    turn = turns.random_turn(5, 16)
    model = turn.model(rank=3)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert open_model(model).get_outputs()[0].shape == ["d0", "d1", turn.k]


@pytest.mark.parametrize("x_shape", [[None, None], ["m", None], [None, "k"], None])
def test_shape_of_y_downstream_is_right_when_dimensions_have_no_names(x_shape: packed.Shape | None):
    turn = turns.random_turn(6, 16)
    model = packed.model(
        [turn.node(), helper.make_node("Shape", ["y"], ["shape"])],
        turn.initializers(),
        [packed.value("x", np.float32, x_shape)],
        [packed.value("y", np.float32, None), packed.value("shape", np.int64, None)],
        with_function=False,
    )
    for m in (2, 3):
        x = packed.rows(m, (m, turn.k))
        y, shape = open_model(model).run(None, {"x": x})
        assert_same_bits(y, turn.expected(x))
        assert shape.tolist() == [m, turn.k]


def test_two_unnamed_dimensions_are_not_taken_for_one():
    """Add would refuse, or fold, shapes that inference wrongly calls equal."""
    turn = turns.random_turn(7, 16)
    model = packed.model(
        [turn.node(), turn.node("x2", "y2", "other"), helper.make_node("Add", ["y", "y2"], ["sum"])],
        turn.initializers(),
        [packed.value(name, np.float32, [None, turn.k]) for name in ("x", "x2")],
        [packed.value("sum", np.float32, None)],
        with_function=False,
    )
    x, x2 = packed.rows(1, (3, turn.k)), packed.rows(2, (1, turn.k))
    got = open_model(model).run(None, {"x": x, "x2": x2})[0]
    assert_same_bits(got, turn.expected(x) + turn.expected(x2))


# Sessions


def test_float32_and_float16_nodes_share_a_model():
    turn = turns.random_turn(8, 64)
    model = packed.model(
        [turn.node(), helper.make_node("Cast", ["x"], ["half"], to=10), turn.node("half", "y2", "other")],
        turn.initializers(),
        [packed.value("x", np.float32, ["m", turn.k])],
        [packed.value("y", np.float32, ["m", turn.k]), packed.value("y2", np.float16, ["m", turn.k])],
        with_function=False,
    )
    x = packed.rows(8, (4, turn.k))
    y, y2 = open_model(model).run(None, {"x": x})
    assert_same_bits(y, turn.expected(x))
    assert_same_bits(y2, turn.expected(x.astype(np.float16)))


def test_signs_behind_identity_must_be_folded_first():
    turn = turns.random_turn(9, 16)
    model = turn.model(with_function=False)
    model.graph.node[0].input[1] = "copy"
    model.graph.node.insert(0, helper.make_node("Identity", ["signs"], ["copy"]))
    made = options()
    ort.InferenceSession(model.SerializeToString(), made)
    made.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with pytest.raises(Exception, match="node 'turn': input signs must be an initializer"):
        ort.InferenceSession(model.SerializeToString(), made)


# Instruction sets

DIGEST = """
import hashlib, sys
import numpy, packed
from onnx_bitnet import runtime
session = runtime.session(sys.argv[1], threads=2)
x = packed.rows(1, (400, 384), numpy.float32)
print(hashlib.sha256(session.run(None, {"x": x})[0].tobytes()).hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits(tmp_path: Path):
    turn = turns.random_turn(10, 128)
    path = tmp_path / "model.onnx"
    onnx.save(turn.model(), path)
    want = hashlib.sha256(turn.expected(packed.rows(1, (400, 384))).tobytes()).hexdigest()
    for isa, runs_here in _native.isas():
        if runs_here:
            child = python("-c", DIGEST, str(path), ONNX_BITNET_ISA=isa)
            assert child.stdout.strip() == want, f"{isa}: {child.stderr}"


def test_unknown_instruction_set_is_an_error_when_the_session_is_made(tmp_path: Path, monkeypatch):
    path = tmp_path / "model.onnx"
    onnx.save(turns.random_turn(0, 16).model(), path)
    monkeypatch.setenv("ONNX_BITNET_ISA", "mmx")
    with pytest.raises(ModelError, match=r"BlockHadamard node 'turn': ONNX_BITNET_ISA"):
        runtime.session(path)


# Misuse


def test_wrong_last_dimension_at_run():
    turn = turns.random_turn(0, 16)
    session = open_model(turn.model(x_shape=["m", "k"]))
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT.*'turn'.*is 49; it must be K = 48"):
        session.run(None, {"x": np.zeros((2, 49), np.float32)})
    x = packed.rows(0, (2, turn.k))
    assert_same_bits(session.run(None, {"x": x})[0], turn.expected(x))


def test_scalar_x_at_run():
    model = turns.random_turn(0, 16).model(x_shape=["m", "k"])
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match="input x has rank 0; it must have rank 1 to 32"):
        run(model, np.array(1, np.float32))


# The node has K = 48 and blocks of 16. What is changed, and what the error must say.
CORRUPTIONS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "block_size zero": (attribute(block_size=0), "attribute block_size is 0; it must be 1 to"),
    "block_size negative": (attribute(block_size=-16), "attribute block_size is -16; it must be 1 to"),
    "block_size lowest": (attribute(block_size=-(1 << 63)), "attribute block_size is -9223372036854775808"),
    "block_size huge": (attribute(block_size=1 << 40), "attribute block_size is 1099511627776; it must"),
    "block_size no power": (attribute(block_size=24), "is 24; it must be a power of two up to 4096"),
    "block_size odd": (attribute(block_size=3), "is 3; it must be a power of two up to 4096"),
    "block_size beyond": (attribute(block_size=8192), "is 8192; it must be a power of two up to 4096"),
    "block_size 2^30": (attribute(block_size=1 << 30), "is 1073741824; it must be a power of two up to 4096"),
    "block_size of no divisor": (
        attribute(block_size=32),
        "input signs has length K = 48; it must be a multiple of block_size = 32, and not 0",
    ),
    "block_size longer than K": (attribute(block_size=64), "must be a multiple of block_size = 64"),
    "block_size missing": (attribute(block_size=None), "attribute block_size is missing or no integer"),
    "block_size a float": (attribute(block_size=16.0), "attribute block_size is missing or no integer"),
    "block_size a list": (attribute(block_size=[16]), "attribute block_size is missing or no integer"),
    "signs zero": (constant("signs", put(5, 0)), "input signs holds 0 at 5; it must be 1 or -1 everywhere"),
    "signs two": (constant("signs", put(47, 2)), "input signs holds 2 at 47; it must be 1 or -1"),
    "signs NaN": (constant("signs", put(0, np.nan)), "input signs holds nan at 0; it must be 1 or -1"),
    "signs infinite": (constant("signs", put(0, -np.inf)), "input signs holds -inf at 0; it must be"),
    "signs nearly one": (constant("signs", put(1, 0.99999994)), "input signs holds 0.99999994 at 1;"),
    "signs empty": (constant("signs", lambda s: s[:0]), "input signs has length K = 0; it must be"),
    "signs short": (constant("signs", lambda s: s[:-1]), "input signs has length K = 47; it must be"),
    "signs shorter": (constant("signs", lambda s: s[:-16]), "of input x is 48; it must be K = 32"),
    "signs a matrix": (constant("signs", lambda s: s.reshape(3, 16)), "signs must be a tensor of rank 1"),
    "signs a scalar": (constant("signs", lambda s: s[0]), "signs must be a tensor of rank 1"),
    "signs double": (constant("signs", lambda s: s.astype(np.float64)), "tensor(double)"),
    "signs int8": (constant("signs", lambda s: s.astype(np.int8)), "tensor(int8)"),
    "signs truncated": (truncate("signs"), ""),
    "signs a graph input": (as_graph_input("signs", keep=False), "input signs must be an initializer"),
    "signs overridable": (as_graph_input("signs", keep=True), "input signs must be an initializer"),
    "signs nowhere": (node_input(1, "nowhere"), ""),
    "signs empty name": (node_input(1, ""), ""),
    "only x": (node_input(1, None), ""),
    "x double": (x_type(TensorProto.DOUBLE), "tensor(double)"),
    "x too long": (x_last(49), "the last dimension of input x is 49; it must be K = 48"),
}


@pytest.fixture(scope="module")
def load_errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Open every corrupted model; name -> error or None."""
    models = {}
    for name, (change, _) in CORRUPTIONS.items():
        # Without the body: with it, onnxruntime may find other faults first.
        models[name] = turns.random_turn(0, 16).model(x_shape=["m", 48], with_function=False)
        change(models[name])
    return load(models, tmp_path_factory.mktemp("corrupted"))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_model_gives_one_clear_error(name: str, load_errors: dict[str, str | None]):
    error, expected = load_errors[name], CORRUPTIONS[name][1]
    assert error is not None
    assert "\n" not in error
    assert expected in error
    if expected and "tensor(" not in expected:
        assert "BlockHadamard node 'turn': " in error
