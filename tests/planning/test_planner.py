"""Goals: what the planner chooses reaches them, in few bytes, and its recipe does the same again."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from chains import K, chain, ordinary, ternary

import onnx_bitnet as bn
from onnx_bitnet.errors import DataError, NotFinite, OutputError, RecipeError
from onnx_bitnet.planning import conversions
from onnx_bitnet.planning.candidates import KEEP, Candidate
from onnx_bitnet.planning.frontier import hull
from onnx_bitnet.planning.planner import sensitivity
from onnx_bitnet.planning.survey import Group
from onnx_bitnet.report import Reason
from onnx_bitnet.validation import plots


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Five layers, one of them exactly ternary, that matter more or less."""
    weights = {
        "a": ordinary(96),
        "b": ordinary(K, 96, seed=3) / 8,
        "t": ternary(K),
        "c": ordinary(K, seed=4) / 8,
        "d": ordinary(32, seed=5),
    }
    return chain(tmp_path_factory.mktemp("planner") / "in.onnx", weights)


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    return [{"x": generator.standard_normal((16, K), np.float32)} for _ in range(3)]


@pytest.mark.parametrize("goal", [0.9, 0.99, 0.9999])
def test_a_cosine_is_reached_when_validated(model, data, tmp_path, goal):
    report = bn.convert(model, tmp_path / "out.onnx", {"min_cosine": goal}, data=data)
    assert bn.validate(model, tmp_path / "out.onnx", data).passes(min_cosine=goal)
    assert report.layers[2].lossless
    assert sum(point.chosen for point in report.frontier) == 1
    assert any(note.startswith("the goals were measured on the data and are met") for note in report.notes)


def test_an_sqnr_is_reached_and_more_of_it_costs_more(model, data, tmp_path):
    sizes = []
    for goal in (8, 15, 30):
        report = bn.convert(model, tmp_path / f"{goal}.onnx", {"min_sqnr": goal}, data=data)
        assert bn.validate(model, tmp_path / f"{goal}.onnx", data).passes(min_sqnr=goal)
        sizes.append(sum(layer.packed_bytes or 4 * layer.n * layer.k for layer in report.layers))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


@pytest.mark.parametrize("with_data", [False, True])
def test_a_size_is_kept_and_used(model, data, tmp_path, with_data):
    everything = bn.plan(model, {"rules": [("*", "int8")]}).output_bytes
    size = everything - 4000
    report = bn.convert(
        model, tmp_path / "in.bitnet.onnx", {"max_size": size}, data=data if with_data else None
    )
    assert size - 5000 < report.output_bytes <= size  # another op would bring its body, of 4000
    assert (tmp_path / "in.bitnet.onnx").stat().st_size == report.output_bytes
    assert all(layer.converted for layer in report.layers)


@pytest.mark.parametrize("with_data", [False, True])
def test_the_smallest_size_that_an_error_names_can_be_had(model, data, with_data):
    feeds = data if with_data else None
    with pytest.raises(RecipeError, match="cannot be met") as error:
        bn.plan(model, {"max_size": 1000}, data=feeds)
    (smallest,) = re.findall(r"the smallest choice has (\d+) bytes", str(error.value))
    assert bn.plan(model, {"max_size": int(smallest)}, data=feeds).output_bytes == int(smallest)
    with pytest.raises(RecipeError, match=rf"the smallest choice has {smallest} bytes"):
        bn.plan(model, {"max_size": int(smallest) - 1}, data=feeds)


@pytest.mark.parametrize("with_data", [False, True])
def test_the_frontier_has_the_size_of_the_files(model, data, with_data):
    plan = bn.plan(model, {"min_cosine": 0.98}, data=data if with_data else None)
    (chosen,) = [point for point in plan.frontier if point.chosen]
    assert chosen.nbytes == plan.output_bytes
    assert max(point.nbytes for point in plan.frontier) < 1.2 * model.stat().st_size


def test_the_recipe_converts_alike_and_the_plan_says_the_same(model, data, tmp_path):
    goals = {"min_cosine": 0.99}
    plan = bn.plan(model, goals, data=data)
    report = bn.convert(model, tmp_path / "in.bitnet.onnx", goals, data=data)
    assert (plan.layers, plan.output_bytes) == (report.layers, report.output_bytes)
    assert plan.recipe["min_cosine"] is None
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(plan.recipe))
    bn.convert(model, tmp_path / "again.onnx", path, data=data)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "in.bitnet.onnx").read_bytes()


def test_without_data_it_says_that_it_guessed(model):
    plan = bn.plan(model, {"min_cosine": 0.99})
    assert plan.notes[0] == (
        "the loss was predicted from errors of the weights alone, and not measured; give feeds (data)"
    )
    assert any(layer.converted for layer in plan.layers)
    assert all(point.measured is None for point in plan.frontier)


def test_enough_batches_are_held_apart_to_measure_on(model, data, tmp_path):
    batches = [*data, {"x": data[0]["x"][::-1].copy()}, {"x": -data[1]["x"]}]
    report = bn.convert(model, tmp_path / "out.onnx", {"min_cosine": 0.98}, data=batches)
    assert bn.validate(model, tmp_path / "out.onnx", batches[2:3]).passes(min_cosine=0.98)
    assert "on a fourth of it, rounded by the rest" in report.notes[0]
    assert bn.validate(model, tmp_path / "out.onnx", batches).passes(min_cosine=0.98)


def test_a_metric_of_the_user_s_is_reached(model, data, tmp_path):
    exact = []

    def nearness(_, outputs):
        """How near the outputs come to the first that it is shown, which are the float model's."""
        values = np.concatenate([batch["d.y"] for batch in outputs])
        exact.append(values)
        return 1 - float(np.linalg.norm(values - exact[0]) / np.linalg.norm(exact[0]))

    sizes = []
    data = [*data, *data]  # of four batches and more no part is held apart
    for least in (0.8, 0.98):
        exact.clear()
        path = tmp_path / f"{least}.onnx"
        report = bn.convert(model, path, {"min_metric": least}, data=data, metric=nearness)
        assert bn.validate(model, path, data, metric=nearness).passes(min_metric=least)
        sizes.append(report.output_bytes)
    assert sizes[0] < sizes[1]


def test_a_metric_and_its_value_go_together(model, data):
    def metric(*_):
        return 1.0

    with pytest.raises(RecipeError, match="min_metric and metric go together"):
        bn.plan(model, {"min_metric": 0.9}, data=data)
    with pytest.raises(RecipeError, match="min_metric and metric go together"):
        bn.plan(model, {"min_cosine": 0.9}, data=data, metric=metric)
    with pytest.raises(RecipeError, match="min_metric needs data"):
        bn.plan(model, {"min_metric": 0.9}, metric=metric)


def test_activations_get_eight_bits_where_that_costs_little(model, data):
    """A goal that lossy weights reach leaves room for them; one that wants all but everything does not."""
    bits = [
        {layer.activation_bits for layer in bn.plan(model, {"min_cosine": goal}, data=data).converted}
        for goal in (0.98, 0.999999)
    ]
    assert 8 in bits[0]
    assert 16 in bits[1]
    given = bn.plan(model, {"min_cosine": 0.98, "activation_bits": 16}, data=data).converted
    assert {layer.activation_bits for layer in given} == {16}


def test_the_frontier_says_what_time_each_choice_takes(model, data):
    points = bn.plan(model, {"min_cosine": 0.98}, data=data).frontier
    assert points[-1].time == 1
    assert 0 < points[0].time < 0.5


def test_what_the_planner_rotates_is_its_own_choice(model, data, tmp_path):
    """Weights of which few are large are rotated; normal ones, which are none the better for it, are not."""
    generator = np.random.default_rng(1)
    uneven = generator.standard_t(2, (2, K, K)).astype(np.float32)
    source = chain(tmp_path / "in.onnx", {"a": uneven[0], "b": uneven[1]})
    assert any(layer.rotation for layer in bn.plan(source, {"min_cosine": 0.995}, data=data).layers)
    for path, target in ((model, "custom"), (source, "ort")):
        plan = bn.plan(path, {"min_cosine": 0.995, "target": target}, data=data)
        assert not any(layer.rotation for layer in plan.layers)


@pytest.mark.parametrize("with_data", [False, True])
def test_offsets_and_goals_go_together(model, data, with_data):
    for goal in ({"max_size": 50000}, {"min_cosine": 0.9}):
        assert bn.plan(model, {"offset": True, **goal}, data=data if with_data else None).frontier


def test_nothing_is_left_beside_the_output(model, data, tmp_path):
    bn.convert(model, tmp_path / "out.onnx", {"min_cosine": 0.9}, data=data)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    with pytest.raises(RecipeError):
        bn.convert(model, tmp_path / "no.onnx", {"max_size": 1000}, data=data)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_a_calibration_is_used_in_place_of_feeds(model, data):
    calibration = bn.calibrate(model, data)
    plan = bn.plan(model, {"max_size": 40000}, data=calibration)
    assert "weighted by the data's statistics" in plan.notes[0]


@pytest.mark.parametrize("verb", [bn.plan, sensitivity])
def test_a_calibration_of_another_model_is_refused(model, data, tmp_path, verb):
    def call(calibration):
        goal = {"min_cosine": 0.9}
        return verb(model, goal, data=calibration) if verb is bn.plan else verb(model, calibration, goal)

    other = chain(tmp_path / "other.onnx", {"z": ordinary(8)})
    with pytest.raises(DataError, match=r"other.onnx has no statistics of layers 'layer.a', .*; calibrate"):
        call(bn.calibrate(other, data))
    narrow = chain(tmp_path / "narrow.onnx", {"a": ordinary(8, 32)})
    with pytest.raises(DataError, match=r"layer 'layer.a' has 64 inputs, 32 in the calibration of .*narrow"):
        call(bn.calibrate(narrow))
    known = bn.calibrate(model, data)
    layers = {name: item for name, item in known.layers.items() if name != "layer.b"}
    notes = call(dataclasses.replace(known, layers=layers)).notes
    assert any(f"no data for layer 'layer.b', not in the calibration of {model}: " in note for note in notes)


def test_data_that_can_be_read_once_is_enough(model, data):
    assert bn.plan(model, {"min_cosine": 0.9}, data=iter(data)) == bn.plan(
        model, {"min_cosine": 0.9}, data=data
    )


def test_what_the_search_keeps_is_not_called_the_user_s_will(model, data, tmp_path):
    goals = {"min_cosine": 1.0, "rules": [("layer.[at]", "keep")]}
    for report in (
        bn.convert(model, tmp_path / "out.onnx", goals, data=data),
        bn.plan(model, goals, data=data),
        bn.plan(model, goals),
    ):
        kept = {layer.name: layer.reason for layer in report.kept}
        assert kept["layer.a"] is kept["layer.t"] is Reason.KEPT_BY_RULE
        assert kept["layer.c"] is Reason.KEPT_BY_SEARCH
        assert report.layers[3].detail == ""
        (note,) = (note for note in report.notes if note.startswith("nothing was converted"))
        assert note == "nothing was converted; for 3 of 5 layers: the search for the goals keeps it"
    again = bn.plan(model, report.recipe, data=data)
    assert again.layers[3].reason is Reason.KEPT_BY_RULE


def test_rules_and_kept_layers_are_not_the_planner_s(model, data):
    plan = bn.plan(model, {"max_size": 50000, "keep_first": True, "rules": [("layer.b", "int8")]}, data=data)
    assert plan.layers[0].reason is Reason.KEPT_FIRST
    assert plan.layers[1].planes == 4


def test_a_layer_that_matters_gets_more_bits(tmp_path, data):
    """The second layer feeds only a hundredth of the output."""
    source = chain(tmp_path / "chain.onnx", {"a": ordinary(K), "b": ordinary(K, seed=2)})
    proto = onnx.load(source)
    proto.graph.node[0].input[0], proto.graph.node[1].input[0] = "x", "x"
    proto.graph.node.extend(
        [
            onnx.helper.make_node("Mul", ["b.y", "hundredth"], ["small"]),
            onnx.helper.make_node("Add", ["a.y", "small"], ["y"]),
        ]
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.01), "hundredth"))
    proto.graph.output[0].name = "y"
    onnx.save(proto, source)
    plan = bn.plan(source, {"min_cosine": 0.995}, data=data)
    a, b = plan.layers
    assert b.packed_bytes < a.packed_bytes
    assert b.format == "t5"
    assert b.planes == 1


@pytest.fixture(scope="module")
def logarithmic(tmp_path_factory, data):
    """A layer whose outputs are all positive, by so little that few bits make the logarithm of some NaN."""
    source = chain(tmp_path_factory.mktemp("log") / "in.onnx", {"a": ordinary(K), "b": ordinary(K, seed=2)})
    proto = onnx.load(source)
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    least = np.concatenate([batch["x"] for batch in data]) @ weight
    shift = (least.min(axis=0) - 1e-4).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(shift, "shift"))
    nodes = [
        proto.graph.node[0],
        onnx.helper.make_node("Sub", ["a.y", "shift"], ["positive"]),
        onnx.helper.make_node("Log", ["positive"], ["log"]),
        proto.graph.node[1],
    ]
    nodes[3].input[0] = "log"
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, source)
    return source


def test_what_makes_values_not_finite_is_not_chosen(logarithmic, data, tmp_path):
    report = bn.convert(logarithmic, tmp_path / "out.onnx", {"min_cosine": 0.99}, data=data)
    assert bn.validate(logarithmic, tmp_path / "out.onnx", data).passes(min_cosine=0.99)
    assert [layer.converted for layer in report.layers] == [False, True]


def test_goals_are_reached_on_all_data_and_not_on_what_was_held_apart_alone(tmp_path, monkeypatch):
    """What the third batch shows is easy; what the others do is small beside weights that they do not see.

    Nothing is converted twice on the way.
    """
    generator = np.random.default_rng(0)
    seen, unseen = np.split(np.linalg.qr(generator.standard_normal((K, K)))[0], [2], axis=1)
    weight = 300 * seen @ generator.standard_normal((2, 32)) + ordinary(32)
    source = chain(tmp_path / "in.onnx", {"a": weight.astype(np.float32), "b": ordinary(32, 32, seed=5)})
    easy = generator.standard_normal((32, 2)) @ seen.T
    hard = 10 * generator.standard_normal((3, 32, K - 2)) @ unseen.T
    data = [{"x": x.astype(np.float32)} for x in (hard[0], hard[1], easy, hard[2])]
    converted, convert = [], conversions.convert_as_told

    def noting(source, output, recipe, *, data, **others):
        converted.append((recipe, sum(1 for _ in data)))
        return convert(source, output, recipe, data=data, **others)

    monkeypatch.setattr(conversions, "convert_as_told", noting)
    bn.convert(source, tmp_path / "out.onnx", {"min_cosine": 0.999}, data=data)
    assert bn.validate(source, tmp_path / "out.onnx", data).passes(min_cosine=0.999)
    assert not [what for what in converted if converted.count(what) > 1]


def test_values_that_cease_to_be_finite_are_told(logarithmic, data, tmp_path):
    with pytest.raises(NotFinite, match=r"the input 'log' of layer '\S+' holds NaN .* once layers before it"):
        bn.convert(logarithmic, tmp_path / "out.onnx", {"mode": "ternary"}, data=data)
    assert not list(tmp_path.iterdir())


def test_a_model_elsewhere_is_called_by_its_own_name(logarithmic, data, tmp_path, monkeypatch):
    """What was measured is kept by content, and says nothing of where that was."""
    monkeypatch.setenv("ONNX_BITNET_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / logarithmic.name
    copy.write_bytes(logarithmic.read_bytes())
    for path in (logarithmic, copy):
        with pytest.raises(NotFinite) as error:
            bn.plan(path, {"max_size": 10000}, data=data)
        assert str(error.value).startswith(f"{path}: the input 'log' of layer")


def test_stock_ops_can_be_planned_too(model, data, tmp_path):
    report = bn.convert(model, tmp_path / "out.onnx", {"min_cosine": 0.99, "target": "ort"}, data=data)
    assert bn.validate(model, tmp_path / "out.onnx", data).passes(min_cosine=0.99)
    assert {layer.format for layer in report.converted} <= {"nbits2", "nbits4", "nbits8"}


def test_a_weight_that_is_in_a_branch_too_is_rounded_without_data(model, tmp_path, data):
    """What is fitted to data cannot be had there."""
    graph = onnx.load(model).graph
    inside = onnx.helper.make_node("MatMul", ["a.y", "b"], ["inside.y"], name="inside")
    made = onnx.helper.make_tensor_value_info("inside.y", onnx.TensorProto.FLOAT, None)
    body = onnx.helper.make_graph([inside], "body", [], [made])
    graph.node.append(onnx.helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body))
    graph.input.append(onnx.helper.make_tensor_value_info("yes", onnx.TensorProto.BOOL, []))
    graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["M", K]))
    path = tmp_path / "in.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), path
    )
    calibration = bn.calibrate(path, [{"yes": np.array(True), **batch} for batch in data])
    found = sensitivity(path, calibration, {"min_cosine": 0.9})
    nine = {layer.names[0]: any("nine" in option.name for option in layer.options) for layer in found.layers}
    assert nine == {"layer.a": True, "layer.b": False, "layer.c": True, "layer.d": True}
    assert found.notes[-1] == (
        f"no data for layers 'inside', 'inside_2', not in the calibration of {path}: ranked by weights alone"
    )


def test_tied_layers_are_decided_together(tmp_path, data):
    proto = onnx.load(chain(tmp_path / "in.onnx", {"a": ordinary(K), "b": ordinary(K)}))
    proto.graph.node[1].input[1] = "a"
    onnx.save(proto, tmp_path / "tied.onnx")
    plan = bn.plan(tmp_path / "tied.onnx", {"min_cosine": 0.99}, data=data)
    assert [layer.shared_with for layer in plan.layers] == [None, "layer.a"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"max_size": 1000}, r"max_size = 1000 cannot be met: the smallest choice has \d+ bytes"),
        ({"max_size": 20000, "min_cosine": 0.999}, "the smallest choice that reaches the other goals has"),
        (
            {"min_cosine": 1},
            "the goals cannot be reached: with every layer float that is open to choice, output",
        ),
        ({"max_size": "many"}, "max_size = 'many' is no size"),
        ({"min_cosine": 2}, "min_cosine = 2 is no number above 0 up to 1"),
        ({"min_sqnr": 10, "mode": "ternary"}, "mode 'ternary' has nothing to choose"),
        ({"max_size": 10, "target": "float"}, "target 'float' has nothing to choose"),
    ],
)
def test_what_cannot_be_is_said(model, data, recipe, message):
    with pytest.raises(RecipeError, match=message):
        bn.plan(model, recipe, data=data)


def test_an_unknown_method_is_refused(model):
    with pytest.raises(
        RecipeError,
        match=r"method = 'wieghts' .* \(did you mean 'weights'\?\); use one of auto, weights, outp",
    ):
        sensitivity(model, method="wieghts")


def test_sizes_are_read_as_people_write_them():
    assert [bn.Recipe(max_size=size).max_size for size in ("200MB", "1.5 GiB", "12kb", 7)] == [
        200_000_000,
        3 << 29,
        12_000,
        7,
    ]


def test_layers_are_ranked_and_the_recipe_converts(model, data, tmp_path):
    found = sensitivity(model, data, {"min_cosine": 0.98})
    smallest = [layer.options[0].loss for layer in found.layers]
    assert smallest == sorted(smallest, reverse=True)
    assert {layer.names for layer in found.layers} == {(f"layer.{name}",) for name in "abcd"}
    bn.convert(model, tmp_path / "out.onnx", found.recipe, data=data)
    assert bn.validate(model, tmp_path / "out.onnx", data).passes(min_cosine=0.98)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("method", ["weights", "outputs", "model"])
def test_layers_are_weighed_in_three_ways(model, data, method):
    found = sensitivity(model, data, method=method)
    gains = {layer.gain for layer in found.layers}
    assert (gains == {1.0}) == (method != "model")
    losses = [option.loss for option in found.layers[0].options]
    assert losses[-1] == 0
    assert losses[0] == max(losses)


def test_weighing_needs_data(model):
    for method in ("outputs", "model"):
        with pytest.raises(RecipeError, match=f"method '{method}' needs data"):
            sensitivity(model, method=method)


@pytest.mark.parametrize("goals", [{}, {"max_size": 60000}])
def test_what_convert_reads_is_not_overwritten(model, tmp_path, goals):
    np.savez(tmp_path / "feeds.npz", x=np.ones((2, K), np.float32))
    (tmp_path / "recipe.json").write_text(json.dumps(goals))
    for name, recipe, data in (
        ("feeds.npz", goals, "feeds.npz"),
        ("feeds.npz", goals, "."),
        ("recipe.json", "recipe.json", None),
    ):
        before = (tmp_path / name).read_bytes()
        told = tmp_path / recipe if isinstance(recipe, str) else recipe
        with pytest.raises(OutputError, match=rf"{name}: is part of the input '.*'; choose another"):
            bn.convert(model, tmp_path / name, told, data=data and tmp_path / data, force=True)
        assert (tmp_path / name).read_bytes() == before


def test_the_frontier_is_drawn(model, tmp_path):
    pytest.importorskip("matplotlib")
    plan = bn.plan(model, {"max_size": 60000})
    for name in ("plot.svg", "plot.png"):
        plots.frontier(plan.frontier, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 4000
    with pytest.raises(OutputError, match="nothing to draw"):
        plots.frontier((), tmp_path / "no.svg")


def test_float_is_the_last_resort_however_little_others_seem_to_lose():
    trials = tuple(
        SimpleNamespace(candidate=candidate, nbytes=nbytes, error=0.0, time=1.0)
        for candidate, nbytes in ((Candidate("ternary", {}), 1), (KEEP, 16))
    )
    linear = SimpleNamespace(weight=SimpleNamespace(n=4, k=4))
    options = Group(linear, ("layer",), trials).options()
    assert hull(options) == [0, 1]
