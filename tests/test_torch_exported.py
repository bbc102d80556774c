"""`distill_onnx`: from an ONNX file to one with trained ternary layers, everything else as it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from written import run

import onnx_bitnet as bn
from onnx_bitnet.errors import DataError, ModelError, OutputError, RecipeError

torch = pytest.importorskip("torch", reason="install the extra [torch]")
from onnx_bitnet.torch import Settings, distill_onnx  # noqa: E402

SIZE, WIDTH, WORDS = 64, 96, 20
FEW = Settings(2)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def weight(k: int, n: int, seed: int) -> np.ndarray:
    return random(k, n, seed=seed, scale=k**-0.5)


def save(path, nodes, inputs, outputs, constants, opset=18, kind=TensorProto.FLOAT):
    """Write a model; nodes are (operator, inputs, output, attributes), named after their outputs."""
    graph = helper.make_graph(
        [helper.make_node(op, i, [o], name=f"node_{o}", **a) for op, i, o, a in nodes],
        "small",
        [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    helper.set_model_props(model, {"author": "somebody"})
    onnx.save(model, path)
    return path


def perceptron(path):
    """x -> MatMul, Add -> Relu -> Gemm -> y."""
    constants = {
        "w1": weight(SIZE, WIDTH, 1),
        "b1": random(WIDTH),
        "w2": weight(WIDTH, 8, 2),
        "b2": random(8),
    }
    nodes = [
        ("MatMul", ["x", "w1"], "a", {}),
        ("Add", ["a", "b1"], "b", {}),
        ("Relu", ["b"], "c", {}),
        ("Gemm", ["c", "w2", "b2"], "y", {}),
    ]
    return save(path, nodes, [("x", 1, ["n", SIZE])], [("y", ["n", 8])], constants)


def transformer(path):
    """Tokens -> embedding -> attention of one head with a mask and a residual -> mean of the tokens."""
    heads = {name: weight(SIZE, SIZE, seed) for seed, name in enumerate(("q", "k", "v", "o"))}
    constants = heads | {
        "words": random(WORDS, SIZE),
        "gain": 1 + random(SIZE, scale=0.1),
        "shift": random(SIZE, scale=0.1),
        "one": np.float32(1),
        "far": np.float32(1e9),
        "root": np.float32(SIZE**0.5),
        "axis_1": np.array([1]),
    }
    nodes = [
        ("Gather", ["words", "ids"], "x", {}),
        ("Cast", ["attention_mask"], "mask", {"to": TensorProto.FLOAT}),
        ("Sub", ["mask", "one"], "absent", {}),
        ("Mul", ["absent", "far"], "far_absent", {}),
        ("Unsqueeze", ["far_absent", "axis_1"], "bias", {}),
        *(("MatMul", ["x", name], f"x{name}", {}) for name in "qkv"),
        ("Transpose", ["xk"], "keys", {"perm": [0, 2, 1]}),
        ("MatMul", ["xq", "keys"], "dots", {}),
        ("Div", ["dots", "root"], "scores", {}),
        ("Add", ["scores", "bias"], "masked", {}),
        ("Softmax", ["masked"], "weights", {"axis": -1}),
        ("MatMul", ["weights", "xv"], "context", {}),
        ("Shape", ["x"], "shape", {}),
        ("Reshape", ["context", "shape"], "merged", {}),
        ("MatMul", ["merged", "o"], "attended", {}),
        ("Add", ["attended", "x"], "residual", {}),
        ("LayerNormalization", ["residual", "gain", "shift"], "hidden", {}),
        ("ArgMax", ["hidden"], "best", {"axis": -1}),
    ]
    tokens = ["batch", "sequence"]
    inputs = [(name, TensorProto.INT64, tokens) for name in ("ids", "attention_mask")]
    save(path, nodes, inputs, [("hidden", [*tokens, SIZE])], constants)
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("best", TensorProto.INT64, [*tokens, 1]))
    onnx.save(model, path)
    return path


def sentences(count: int = 96, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 13, size=(count, 1))
    mask = (np.arange(12) < lengths).astype(np.int64)
    return {"ids": rng.integers(0, WORDS, size=(count, 12)) * mask, "attention_mask": mask}


def error(model, reference, feeds, output=0) -> float:
    expected, got = (run(path, feeds)[output] for path in (reference, model))
    return float(np.square(got - expected).sum() / np.square(expected - expected.mean(axis=0)).sum())


@pytest.fixture
def mlp(tmp_path):
    return perceptron(tmp_path / "model.onnx")


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:32"])
def test_trained_layers_convert_losslessly(mlp, tmp_path, granularity):
    ternary, packed, rounded = (tmp_path / f"{name}.onnx" for name in ("ternary", "packed", "rounded"))
    done = distill_onnx(mlp, ternary, {"x": random(512, SIZE)}, Settings(80, 3e-3), granularity=granularity)
    assert done.layers == ("node_a", "node_y")
    assert not done.left
    assert [step.number for step in done.steps] == list(range(1, 81))
    report = bn.convert(ternary, packed, bn.Recipe(mode="lossless"))
    assert report.lossless
    assert [(layer.name, layer.activation_bits) for layer in report.converted] == [
        ("node_a", 8),
        ("node_y", 8),
    ]
    assert {layer.granularity for layer in report.converted} == {granularity}
    others = {"x": random(64, SIZE, seed=9)}
    trained = run(ternary, others)[0]
    np.testing.assert_allclose(bn.session(packed).run(None, others)[0], trained, atol=2e-5)
    bn.convert(mlp, rounded, bn.Recipe(mode="ternary", granularity=granularity, activation_bits=8))
    assert error(ternary, mlp, others) < 0.75 * error(rounded, mlp, others)


def test_what_is_computed_in_training_is_what_the_file_computes(mlp, tmp_path):
    settings = Settings(1, learning_rate=0.0)
    feeds = {"x": random(16, SIZE)}
    (step,) = distill_onnx(mlp, tmp_path / "t.onnx", feeds, settings).steps
    assert error(tmp_path / "t.onnx", mlp, feeds) == pytest.approx(step.output_loss, rel=1e-3)


def test_the_rest_of_the_model_stays_as_it_was(mlp, tmp_path):
    before = mlp.read_bytes()
    done = distill_onnx(mlp, tmp_path / "t.onnx", {"x": random(64, SIZE)}, FEW, layers=("*_a",))
    assert done.layers == ("node_a",)
    assert mlp.read_bytes() == before
    old, new = onnx.load(mlp), onnx.load(tmp_path / "t.onnx")
    assert new.metadata_props == old.metadata_props
    assert (new.graph.input, new.graph.output) == (old.graph.input, old.graph.output)
    kept = {node.name: node for node in new.graph.node}
    assert [kept[name] for name in ("node_c", "node_y")] == list(old.graph.node)[2:]
    assert kept["node_a"].op_type == "MatMul"
    constants = {item.name: item for item in new.graph.initializer}
    assert all(constants[item.name] == item for item in old.graph.initializer if item.name in ("w2", "b2"))
    assert not {"w1", "b1"} & set(constants)


@pytest.mark.parametrize("bits", [16, 32])
def test_activations_of_more_bits_stay_float_in_the_file(mlp, tmp_path, bits):
    distill_onnx(mlp, tmp_path / "t.onnx", {"x": random(64, SIZE)}, FEW, activation_bits=bits)
    assert [node.op_type for node in onnx.load(tmp_path / "t.onnx").graph.node] == [
        "MatMul",
        "Add",
        "Relu",
        "MatMul",
        "Add",
    ]
    report = bn.convert(tmp_path / "t.onnx", tmp_path / "p.onnx", bn.Recipe(mode="lossless"))
    assert [layer.activation_bits for layer in report.converted] == [16, 16]


def test_a_transformer_learns_from_one_batch_with_padding(tmp_path):
    model, ternary = transformer(tmp_path / "model.onnx"), tmp_path / "t.onnx"
    np.savez(tmp_path / "feeds.npz", **sentences())
    settings = Settings(60, 2e-3, match=("*v", "context"))
    done = distill_onnx(model, ternary, tmp_path / "feeds.npz", settings, granularity="block:32")
    assert done.layers == ("node_xq", "node_xk", "node_xv", "node_attended")
    assert all(0 < step.match_loss < 1 for step in done.steps)
    assert done.steps[-1].output_loss < 0.7 * done.steps[0].output_loss
    others = sentences(seed=1)
    distill_onnx(model, tmp_path / "first.onnx", others, Settings(1, 0.0), granularity="block:32")
    assert error(ternary, model, others) < 0.7 * error(tmp_path / "first.onnx", model, others)
    assert bn.convert(ternary, tmp_path / "packed.onnx", bn.Recipe(mode="lossless")).lossless


def test_padding_does_not_count(tmp_path):
    model, feeds = transformer(tmp_path / "model.onnx"), sentences(8)
    losses = []
    for mask in ("attention_mask", "none"):
        output = tmp_path / f"{mask}.onnx"
        losses.append(distill_onnx(model, output, feeds, Settings(1, 0.0), mask=mask).steps[0].output_loss)
    there = feeds["attention_mask"] == 1
    expected, got = (run(path, feeds)[0][there] for path in (model, tmp_path / "none.onnx"))
    meant = np.square(got - expected).sum() / np.square(expected - expected.mean(axis=0)).sum()
    assert losses[0] == pytest.approx(meant, rel=1e-3)
    assert abs(losses[1] - losses[0]) > 1e-3 * meant


def test_layers_that_share_a_weight_still_do(tmp_path):
    constants = {"w": weight(SIZE, SIZE, 1), "b": random(SIZE)}
    nodes = [
        ("MatMul", ["x", "w"], "a", {}),
        ("Tanh", ["a"], "t", {}),
        ("Gemm", ["t", "w", "b"], "y", {}),
    ]
    model = save(tmp_path / "model.onnx", nodes, [("x", 1, ["n", SIZE])], [("y", ["n", SIZE])], constants)
    distill_onnx(model, tmp_path / "t.onnx", {"x": random(64, SIZE)}, Settings(3))
    large = [item for item in onnx.load(tmp_path / "t.onnx").graph.initializer if len(item.dims) == 2]
    assert len(large) == 1


def test_pointwise_convolutions_and_float16_are_distilled(tmp_path):
    half = {
        "w": random(8, 16, 1, 1, scale=0.2).astype(np.float16),
        "b": random(8).astype(np.float16),
        "k": random(4, 8, 3, 3, scale=0.2).astype(np.float16),
    }
    nodes = [
        ("Conv", ["x", "w", "b"], "a", {}),
        ("HardSwish", ["a"], "c", {}),
        ("Conv", ["c", "k"], "y", {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ]
    shape = ["n", 16, 6, 6]
    kind = TensorProto.FLOAT16
    model = save(tmp_path / "m.onnx", nodes, [("x", kind, shape)], [("y", ["n", 4, 3, 3])], half, kind=kind)
    data = {"x": random(32, 16, 6, 6).astype(np.float16)}
    done = distill_onnx(model, tmp_path / "t.onnx", data, Settings(60, 1e-3), granularity="channel")
    assert done.layers == ("node_a",)
    assert done.steps[-1].output_loss < done.steps[0].output_loss
    assert bn.convert(tmp_path / "t.onnx", tmp_path / "p.onnx", bn.Recipe(mode="lossless")).lossless


def test_ternary_layers_and_those_without_a_way_are_left(tmp_path):
    constants = {"t": np.sign(weight(SIZE, SIZE, 1)), "w": weight(SIZE, SIZE, 2), "d": weight(SIZE, SIZE, 3)}
    nodes = [
        ("MatMul", ["x", "t"], "a", {}),
        ("MatMul", ["a", "w"], "y", {}),
        ("MatMul", ["x", "d"], "dead", {}),
    ]
    model = save(tmp_path / "m.onnx", nodes, [("x", 1, ["n", SIZE])], [("y", ["n", SIZE])], constants)
    feeds = [{"x": random(4, SIZE, seed=seed)} for seed in range(2)]
    done = distill_onnx(model, tmp_path / "t.onnx", iter(feeds), Settings(5))
    assert done.layers == ("node_y",)
    assert done.left == {
        "node_a": "its weights are ternary",
        "node_dead": "it has no way to a float output",
    }
    with pytest.raises(RecipeError, match="nothing to train: layer 'node_a': its weights are ternary"):
        distill_onnx(model, tmp_path / "t2.onnx", feeds, FEW, layers=("node_a",))


def test_what_cannot_be_trained_through_is_named(mlp, tmp_path):
    model = onnx.load(mlp)
    model.graph.node[2].op_type = "Round"
    onnx.save(model, mlp)
    data = {"x": random(8, SIZE)}
    with pytest.raises(ModelError, match=r"node 'node_c' \(Round\) cannot be trained through"):
        distill_onnx(mlp, tmp_path / "t.onnx", data, FEW)
    assert distill_onnx(mlp, tmp_path / "t.onnx", data, FEW, layers=("node_y",)).layers == ("node_y",)


def test_what_is_asked_for_must_be_there(mlp, tmp_path):
    data, output = {"x": random(8, SIZE)}, tmp_path / "t.onnx"
    with pytest.raises(RecipeError, match="'node_z' matches no linear layer; near misses: node_"):
        distill_onnx(mlp, output, data, FEW, layers=("node_z",))
    with pytest.raises(RecipeError, match="'hidden' matches no node"):
        distill_onnx(mlp, output, data, Settings(1, match=("hidden",)))
    with pytest.raises(RecipeError, match="'b' cannot be matched"):
        distill_onnx(mlp, output, data, Settings(1, match=("b",)), layers=("node_y",))
    with pytest.raises(RecipeError, match="granularity"):
        distill_onnx(mlp, output, data, FEW, granularity="auto")
    with pytest.raises(DataError, match="no data to distill with"):
        distill_onnx(mlp, output, None, FEW)
    with pytest.raises(DataError, match="has shape"):
        distill_onnx(mlp, output, {"x": random(8, 3)}, FEW)
    with pytest.raises(OutputError, match="part of the input model"):
        distill_onnx(mlp, mlp, data, FEW)
    np.savez(tmp_path / "feeds.npz", **data)
    with pytest.raises(OutputError, match=r"feeds.npz: is part of the input '.*feeds.npz'"):
        distill_onnx(mlp, tmp_path / "feeds.npz", tmp_path / "feeds.npz", FEW, force=True)
    assert not output.exists()


def test_a_loss_that_is_not_finite_stops_it(mlp, tmp_path):
    data = {"x": random(8, SIZE)}
    data["x"][0, 0] = np.inf
    with pytest.raises(ModelError, match="the loss of step 1 is not finite"):
        distill_onnx(mlp, tmp_path / "t.onnx", data, FEW)
    assert list(tmp_path.iterdir()) == [mlp]


def test_layers_inside_of_subgraphs_are_left(tmp_path):
    def branch(seed):
        inner = numpy_helper.from_array(weight(SIZE, SIZE, seed), f"w{seed}")
        node = helper.make_node("MatMul", ["x", f"w{seed}"], [f"z{seed}"], name=f"inside{seed}")
        z = helper.make_tensor_value_info(f"z{seed}", TensorProto.FLOAT, None)
        return helper.make_graph([node], f"branch{seed}", [], [z], [inner])

    nodes = [
        ("ReduceMax", ["x"], "most", {"keepdims": 0}),
        ("Cast", ["most"], "which", {"to": TensorProto.BOOL}),
        ("If", ["which"], "c", {"then_branch": branch(1), "else_branch": branch(2)}),
        ("MatMul", ["c", "w"], "y", {}),
    ]
    inputs, outputs = [("x", 1, ["n", SIZE])], [("y", ["n", 8])]
    model = save(tmp_path / "m.onnx", nodes, inputs, outputs, {"w": weight(SIZE, 8, 3)})
    done = distill_onnx(model, tmp_path / "t.onnx", {"x": random(8, SIZE)}, FEW)
    assert done.layers == ("node_y",)
    assert set(done.left) == {"inside1", "inside2"}


def test_stopping_leaves_nothing_behind(mlp, tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill_onnx(mlp, tmp_path / "t.onnx", {"x": random(8, SIZE)}, FEW, on_step=stop)
    assert list(tmp_path.iterdir()) == [mlp]
