"""Calibration: statistics equal to NumPy's on all the data at once, however it comes and is cut up."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from chains import K, chain, ordinary, ternary
from commands import run
from onnx import TensorProto, helper, numpy_helper

import onnx_bitnet as bn
from onnx_bitnet.calibration.activations import HISTOGRAM_BINS, Collector
from onnx_bitnet.calibration.ranges import METHODS, activation_step
from onnx_bitnet.errors import DataError, ModelError, OutputError, RecipeError
from onnx_bitnet.quantization.rotation import rotation
from onnx_bitnet.rewrite.packed import packed_nodes


def batches(count: int = 3, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {"x": (rng.standard_normal((5 + i, K)) * 4.0 ** (i - 1) + 0.25).astype(np.float32)}
        for i in range(count)
    ]


@pytest.fixture
def model(tmp_path):
    return chain(tmp_path / "in.onnx", {"a": ternary(K), "b": ordinary(8), "c": ordinary(16, 8)})


def rows(data=None) -> np.ndarray:
    return np.concatenate([batch["x"] for batch in data or batches()])


def rotated(x: np.ndarray) -> np.ndarray:
    turned = rotation(x.shape[1], 128)
    return x if turned is None else turned.rows(x)


# Statistics


def test_statistics_are_those_of_all_rows_at_once(model):
    calibration = bn.calibrate(model, batches())
    assert list(calibration.layers) == ["layer.a", "layer.b", "layer.c"]
    assert (calibration.samples, calibration.random_data) == (18, False)
    x = rows().astype(np.float64)
    for name, seen in {"layer.a": x, "layer.b": x @ ternary(K)}.items():
        got = calibration.layers[name]
        assert (got.rows, got.k) == seen.shape
        apart = seen - seen.mean()
        expected = {
            "min": seen.min(),
            "max": seen.max(),
            "absmax": np.abs(seen).max(),
            "mean": seen.mean(),
            "variance": seen.var(),
            "kurtosis": (apart**4).mean() / seen.var() ** 2,
            "channel_mean": seen.mean(axis=0),
            "channel_absmean": np.abs(seen).mean(axis=0),
            "second_moment": seen.T @ seen,
            "row_peak": np.sqrt((np.abs(seen).max(axis=1) ** 2).mean()),
            "rotated_row_peak": np.sqrt((np.abs(rotated(seen)).max(axis=1) ** 2).mean()),
        }
        for field, value in expected.items():
            np.testing.assert_allclose(getattr(got, field), value, rtol=2e-5, atol=1e-4, err_msg=field)
        assert got.second_moment.dtype == got.channel_mean.dtype == np.float32
    plain = bn.calibrate(model, batches(), second_moments=False).layers["layer.a"]
    assert (plain.second_moment, plain.rotated_row_peak) == (None, None)
    assert plain.row_peak == calibration.layers["layer.a"].row_peak


def test_the_histogram_is_exact_whatever_came_first():
    x = np.concatenate([rows(batches(3, seed)) for seed in range(60)])
    late = Collector(K, second_moment=False)
    for part in np.array_split(x, 4):
        late.add(part)
    got = late.result()
    edges = np.linspace(-got.histogram_range, got.histogram_range, 2 * HISTOGRAM_BINS + 1)
    np.testing.assert_array_equal(got.histogram, np.histogram(x, edges)[0])
    assert got.absmax < got.histogram_range <= 2 * got.absmax
    for percent in (0, 1, 50, 99, 100):
        width = got.histogram_range / HISTOGRAM_BINS
        assert got.percentile(percent) == pytest.approx(np.percentile(x, percent), abs=3 * width), percent
    assert got.magnitude_percentile(100) == got.absmax


def test_zeros_and_constants_have_statistics_too():
    collector = Collector(2, second_moment=True)
    collector.add(np.zeros((3, 2), np.float32))
    zero = collector.result()
    assert (zero.absmax, zero.variance, zero.kurtosis, zero.percentile(50)) == (0, 0, 0, 0)
    assert zero.histogram.sum() == 6
    collector.add(np.full((1, 2), -3, np.float32))
    assert collector.result().histogram.sum() == 8
    assert collector.result().percentile(1) == pytest.approx(-3, abs=0.01)
    assert all(activation_step(zero, 8, method) > 0 for method in METHODS)


def test_layers_that_read_one_value_share_one_statistic(tmp_path):
    path = chain(tmp_path / "in.onnx", {"a": ternary(K), "b": ordinary(K)})
    model = onnx.load(path)
    model.graph.node[1].input[0] = "x"
    onnx.save(model, path)
    layers = bn.calibrate(path, batches()).layers
    assert layers["layer.a"] is layers["layer.b"]


def test_rows_of_other_layouts_are_what_the_packed_op_reads(tmp_path):
    """Gemm with a transposed A reads columns."""
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], name="gemm", transA=1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [K, "n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(ordinary(8), "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8),
        tmp_path / "in.onnx",
    )
    x = rows()
    got = bn.calibrate(tmp_path / "in.onnx", {"x": np.ascontiguousarray(x.T)}).layers["gemm"]
    np.testing.assert_allclose(got.second_moment, x.T @ x, rtol=1e-5, atol=1e-3)


def test_layers_in_subgraphs_are_named(tmp_path):
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"], name="hidden")],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body)],
        "g",
        [
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", K]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(ordinary(8), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "in.onnx")
    calibration = bn.calibrate(tmp_path / "in.onnx", {"yes": np.array(True), **batches()[0]})
    assert not calibration.layers
    assert "layer 'hidden' has no statistics: it is inside a subgraph" in calibration.notes[0]


# Data


class Reader:
    """What onnxruntime's own quantizers take: a CalibrationDataReader."""

    def __init__(self, data):
        self.data = iter(data)

    def get_next(self):
        return next(self.data, None)


def same(one: bn.Calibration, other: bn.Calibration) -> None:
    assert one.layers.keys() == other.layers.keys()
    for name, left in one.layers.items():
        right = other.layers[name]
        for field in left.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(left, field), getattr(right, field), err_msg=field)


def test_a_small_memory_means_more_passes_and_the_same_result(model):
    """A generator and a reader are read once, and replayed."""
    whole = bn.calibrate(model, batches())
    for data in (batches(), (batch for batch in batches()), Reader(batches())):
        calls = []
        cut = bn.calibrate(model, data, max_memory=1, progress=lambda *call, calls=calls: calls.append(call))
        same(whole, cut)
        assert calls[0] == (0, 9, "batch 0, pass 1 of 3")
        assert calls[-2:] == [(8, 9, "batch 2, pass 3 of 3"), (9, 9, "done")]


def test_later_batches_that_are_larger_are_fetched_in_parts(model):
    data = [{"x": batches()[0]["x"][:1]}, *batches()]
    tight = 2 * 4 * (K + K + 8) + 2 * 4 * (2 * K * K + 64)
    same(bn.calibrate(model, data), bn.calibrate(model, data, max_memory=tight))


def test_max_samples_ends_after_the_batch_that_reaches_it(model):
    assert bn.calibrate(model, batches(), max_samples=6).layers["layer.a"].rows == 11
    assert bn.calibrate(model, batches(), max_samples=5).samples == 5
    for wrong in (0, -1, "3", 1.5):
        with pytest.raises(DataError, match=rf"max_samples is {wrong!r}; give at least 1, or leave it out"):
            bn.calibrate(model, batches(), max_samples=wrong)


@pytest.mark.parametrize(
    ("argument", "wrong", "message"),
    [
        ("max_memory", 0, "max_memory = 0: give a whole number from 1 on"),
        ("max_memory", "3", "max_memory = '3': give a whole number from 1 on"),
        ("seed", -1, "seed = -1: give a whole number from 0 on"),
        ("seed", 0.5, "seed = 0.5: give a whole number from 0 on"),
        ("threads", -1, "threads = -1: give a whole number from 0 to 4096"),
        ("threads", True, "threads = True: give a whole number from 0 to 4096"),
    ],
)
def test_numbers_out_of_range_are_refused(model, argument, wrong, message):
    with pytest.raises(RecipeError, match=message):
        bn.calibrate(model, **{argument: wrong})


def test_every_batch_is_checked_before_the_first_is_run(model):
    calls = []
    bad = [*batches(), {"x": np.zeros((2, K), np.float64)}]
    with pytest.raises(DataError, match="batch 3: input 'x' is float64, the model takes float32"):
        bn.calibrate(model, bad, progress=lambda *call: calls.append(call))
    assert not calls


NOT_FINITE = r"input 'x' holds NaN or infinity, with which layer 'layer.a' cannot be measured; leave .* out"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("recipe", [{"mode": "ternary"}, {"min_cosine": 0.9}, {"activation_scale": "mse"}])
def test_data_that_are_not_finite_are_named(tmp_path, recipe, value):
    model = chain(tmp_path / "in.onnx", {"a": ordinary(16), "b": ordinary(8, 16)})
    data = batches(9)
    data[6]["x"][2, 3] = value
    with pytest.raises(DataError, match=f"^data, batch 6: {NOT_FINITE}"):
        bn.calibrate(model, data)
    with pytest.raises(DataError, match=f"^data, batch 6: {NOT_FINITE}"):
        bn.plan(model, recipe, data=data)
    with pytest.raises(DataError, match=f"^data, batch 6: {NOT_FINITE}"):
        bn.plan(model, recipe, data=iter(data))
    (tmp_path / "feeds").mkdir()
    for index, batch in enumerate(data):
        np.savez(tmp_path / "feeds" / f"{index}.npz", **batch)
    with pytest.raises(DataError, match=f"^{tmp_path}/feeds/6.npz: {NOT_FINITE}"):
        bn.plan(model, recipe, data=tmp_path / "feeds")


def test_samples_held_apart_are_named(tmp_path):
    model = chain(tmp_path / "in.onnx", {"a": ordinary(16), "b": ordinary(8, 16)})
    x = np.ones((64, K), np.float32)
    x[2, 3] = np.nan
    np.savez(tmp_path / "feeds.npz", x=x)
    where = f"^{tmp_path}/feeds.npz, every fourth sample from 2 on: "
    with pytest.raises(DataError, match=where + NOT_FINITE):
        bn.plan(model, {"min_cosine": 0.9}, data=tmp_path / "feeds.npz")


def test_models_that_are_not_finite_are_named(tmp_path):
    """The data are, and what the layer reads is not; infinity in a mask is nothing unusual."""
    model = chain(tmp_path / "in.onnx", {"a": ordinary(16), "b": ordinary(8, 16)})
    proto = onnx.load(model)
    proto.graph.node.insert(1, helper.make_node("Log", ["a.y"], ["log"]))
    proto.graph.node[2].input[0] = "log"
    onnx.save(proto, model)
    where = "layer 'layer.b' on data, batch 0: its input 'log' holds NaN or infinity; check model and data"
    for verb in (bn.calibrate, lambda model, data: bn.plan(model, {"mode": "ternary"}, data=data)):
        with pytest.raises(ModelError, match=where):
            verb(model, batches())


def test_without_data_feeds_are_random_and_said_to_be(model):
    calibration = bn.calibrate(model)
    assert calibration.random_data
    same(calibration, bn.calibrate(model))


@pytest.mark.parametrize("recipe", [{"activation_scale": "mse"}, {"rounding": "gptq"}, {}])
def test_conversions_by_random_feeds_say_so(model, tmp_path, recipe):
    bn.calibrate(model).save(tmp_path / "random.npz")
    plan = bn.plan(model, {"mode": "ternary"} | recipe, data=bn.Calibration.load(tmp_path / "random.npz"))
    assert plan.notes == (
        "the calibration is one of random feeds: these statistics say nothing about real activations; "
        "calibrate on data",
    )


# Files


def test_what_is_saved_is_loaded(model, tmp_path):
    calibration = bn.calibrate(model, batches())
    calibration.save(tmp_path / "c.npz")
    loaded = bn.Calibration.load(tmp_path / "c.npz")
    same(calibration, loaded)
    assert loaded.to_dict() == calibration.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "in.onnx"]


def test_many_may_save_to_one_file(model, tmp_path):
    calibration = bn.calibrate(model, batches())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: calibration.save(tmp_path / "c.npz"), range(32)))
    same(calibration, bn.Calibration.load(tmp_path / "c.npz"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "in.onnx"]


def test_saving_replaces_calibrations_only(model, tmp_path):
    calibration = bn.calibrate(model, batches())
    before = model.read_bytes()
    for force in (False, True):
        with pytest.raises(OutputError, match=r"in.onnx: is part of the input model; choose another"):
            calibration.save(model, force=force)
    assert model.read_bytes() == before
    np.savez(tmp_path / "feeds.npz", x=np.ones(3))
    with pytest.raises(OutputError, match=r"feeds.npz: exists already"):
        calibration.save(tmp_path / "feeds.npz")
    for _ in range(2):
        calibration.save(tmp_path / "feeds.npz", force=True)
    calibration.save(tmp_path / "feeds.npz")
    same(calibration, bn.Calibration.load(tmp_path / "feeds.npz"))


@pytest.mark.parametrize("content", ["missing", "text", "npz", "damaged", "schema"])
def test_a_file_that_is_no_calibration_is_one_clear_line(model, tmp_path, content):
    path = tmp_path / "c.npz"
    if content == "text":
        path.write_text("no")
    elif content == "npz":
        np.savez(path, x=np.zeros(3))
    elif content == "schema":
        np.savez(path, header=np.array('{"schema": "other/1"}'))
    elif content == "damaged":
        bn.calibrate(model, batches()).save(path)
        path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(
        DataError, match=r"c.npz: cannot be read as a calibration: .*; make it with bn.calibrate"
    ):
        bn.Calibration.load(path)


# Static activation scales


def test_ranges():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, K)).astype(np.float32)
    x[7, 3] = 100
    collector = Collector(K, second_moment=False)
    collector.add(x[:1000])
    collector.add(x[1000:])
    statistics = collector.result()
    reach = {method: activation_step(statistics, 8, method) * 127 for method in METHODS}
    assert reach["minmax"] == 100
    assert reach["percentile"] == pytest.approx(np.percentile(np.abs(x), 99.99), abs=0.1)
    assert reach["moving-average"] == pytest.approx(90 + 0.1 * np.abs(x[1000:]).max(), rel=1e-6)

    def error(reach: float) -> float:
        step = reach / 127
        return float(((x - np.clip(np.rint(x / step), -128, 127) * step) ** 2).sum())

    assert error(reach["mse"]) <= 1.01 * min(error(100 * share / 100) for share in range(1, 101))
    assert 3 < reach["kl"] < 100
    assert activation_step(statistics, 16, "mse") * 32767 > 50


def test_one_session_at_a_time(model, monkeypatch):
    """Each holds the weights; with little memory there are as many as there are layers."""
    module = sys.modules["onnx_bitnet.calibration.calibrate"]
    start_part, started = module.start_part, []

    def counted(*arguments):
        assert all(runner() is None for runner in started)
        runner = start_part(*arguments)
        if runner is not None:  # what is fed needs none
            started.append(weakref.ref(runner))
        return runner

    monkeypatch.setattr(module, "start_part", counted)
    bn.calibrate(model, batches(), max_memory=1)
    assert len(started) > 1


def test_zeros_say_nothing_about_a_range():
    """What Relu leaves is half zeros, which are exact with any step."""
    x = np.random.default_rng(0).standard_normal((8000, K)).astype(np.float32)
    reach = []
    for values in (np.abs(x), np.where(np.random.default_rng(1).random(x.shape) < 0.9, 0, x)):
        collector = Collector(K, second_moment=False)
        collector.add(values.astype(np.float32))
        reach.append(activation_step(collector.result(), 8, "kl") * 127)
    assert min(reach) > 0.75 * np.abs(x).max()


def test_a_recipe_may_ask_for_static_scales(model, tmp_path):
    recipe = {"mode": "ternary", "rounding": "mse", "activation_bits": 8, "activation_scale": "percentile"}
    rules = [("*.c", {"activation_scale": "dynamic"})]
    report = bn.convert(model, tmp_path / "out.onnx", recipe | {"rules": rules}, data=batches())
    statistics = bn.calibrate(model, batches()).layers
    steps = [node.node.attributes["activation_scale"].as_float() for node in packed_nodes(load(tmp_path))]
    wanted = [activation_step(statistics[name], 8, "percentile") for name in ("layer.a", "layer.b")]
    assert steps == pytest.approx([*wanted, 0], rel=1e-6)
    assert [layer.activation_scale for layer in report.layers] == pytest.approx([*wanted, 0])
    assert report.notes == ()
    plan = bn.plan(model, recipe | {"rules": rules}, data=bn.calibrate(model, batches()))
    assert plan.layers == report.layers


def load(folder):
    import onnx_ir as ir

    return ir.load(folder / "out.onnx")


def test_static_scales_need_data_of_this_model(model, tmp_path):
    with pytest.raises(
        RecipeError, match="static activation scales and the roundings gptq and weighted need"
    ):
        bn.plan(model, {"activation_scale": "mse"})
    other = chain(tmp_path / "other.onnx", {"a": ternary(8, 32)})
    data = {"x": np.ones((2, 32), np.float32)}
    with pytest.raises(DataError, match=r"layer 'layer.a' has 64 inputs, 32 in the calibration of"):
        bn.plan(model, {"activation_scale": "mse"}, data=bn.calibrate(other, data))


@pytest.mark.parametrize(
    ("recipe", "layer"),
    [({"activation_scale": "mse"}, "layer.a"), ({"rounding": "gptq"}, "layer.b"), ({}, "layer.b")],
)
def test_a_calibration_of_other_layers_is_refused(model, tmp_path, recipe, layer):
    """The first layer is exactly ternary: it needs no rounding."""
    other = chain(tmp_path / "other.onnx", {"z": ternary(8)})
    calibration = bn.calibrate(other, batches())
    with pytest.raises(DataError, match=rf"other.onnx has no statistics of layer '{layer}'; calibrate this"):
        bn.convert(model, tmp_path / "out.onnx", {"mode": "ternary"} | recipe, data=calibration)
    assert not (tmp_path / "out.onnx").exists()


def test_a_calibration_without_the_layers_that_need_one_is_refused(model):
    known = bn.calibrate(model, batches())
    layers = {name: item for name, item in known.layers.items() if name != "layer.b"}
    known = dataclasses.replace(known, layers=layers)
    with pytest.raises(DataError, match=r"has no statistics of layer 'layer.b'; calibrate this model"):
        bn.plan(model, {"rules": [("*.b", {"mode": "ternary"})]}, data=known)
    plan = bn.plan(model, {"mode": "ternary", "activation_scale": "mse"}, data=known)
    (note,) = (note for note in plan.notes if "no data" in note)
    assert note == (
        f"no data for layer 'layer.b', not in the calibration of {model}: weights rounded as without any, "
        "activations by each row's peak"
    )
    assert [bool(layer.activation_scale) for layer in plan.layers] == [True, False, True]


def branches(path, second: np.ndarray):
    """Save a model whose second layer is in both branches of an If."""
    graphs = [
        helper.make_graph(
            [helper.make_node("MatMul", ["h", "w"], [f"{name}.y"], name=name)],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)],
        )
        for name in ("then", "else")
    ]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "v"], ["h"], name="first"),
            helper.make_node("If", ["yes"], ["y"], then_branch=graphs[0], else_branch=graphs[1]),
        ],
        "g",
        [
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", K]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(ordinary(K), "v"), numpy_helper.from_array(second, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("rounding", ["auto", "gptq"])
@pytest.mark.parametrize("as_feeds", [True, False])
def test_layers_out_of_reach_are_converted_without_data_and_named(tmp_path, as_feeds, rounding):
    model = branches(tmp_path / "in.onnx", ordinary(8))
    feeds = [{"yes": np.array(True), **batch} for batch in batches()]
    data = feeds if as_feeds else bn.calibrate(model, feeds)
    recipe = {"mode": "ternary", "rounding": rounding}
    inside = "no data for layers 'else', 'then', inside a subgraph or function, whose values are out of reach"
    plan = bn.plan(model, recipe | {"activation_scale": "mse"}, data=data)
    assert plan.notes == (f"{inside}: weights rounded as without any, activations by each row's peak",)
    plan = bn.plan(model, recipe, data=data)
    assert plan.notes == (f"{inside}: weights rounded as without any",)
    assert [layer.detail.count("rounding mse") for layer in plan.layers] == [0, 1, 1]
    assert bn.plan(model, {"mode": "ternary"}).notes == ()
    with pytest.raises(RecipeError, match=r"layer 'else': .*levels = 9 need data of its inputs, and it is"):
        bn.plan(model, recipe | {"levels": 9}, data=data)
    ternary_inside = branches(tmp_path / "ternary.onnx", ternary(8))
    assert bn.plan(ternary_inside, recipe, data=feeds).notes == ()


# The command


def test_the_command_writes_what_convert_reads(model, tmp_path):
    np.savez(tmp_path / "feeds.npz", **batches()[0])
    done = run("calibrate", model, "--data", tmp_path / "feeds.npz")
    assert done.returncode == 0, done.stderr
    assert "layer.a" in done.stdout
    again = run("calibrate", model, "--data", tmp_path / "feeds.npz")
    assert again.returncode == 1
    assert "in.calibration.npz: exists already" in again.stderr
    options = ("--mode", "ternary", "--activation-bits", "8", "--activation-scale", "kl")
    done = run("convert", model, *options, "--data", tmp_path / "in.calibration.npz")
    assert done.returncode == 0, done.stderr
