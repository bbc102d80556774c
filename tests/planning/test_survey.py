"""What was measured is measured once: the same again finds it, anything else does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from chains import K, chain, ordinary

import onnx_bitnet as bn
from onnx_bitnet.planning import conversions, survey
from onnx_bitnet.planning.planner import sensitivity


@pytest.fixture
def model(tmp_path):
    return chain(tmp_path / "in.onnx", {"a": ordinary(96), "b": ordinary(K, 96, seed=3) / 8})


@pytest.fixture
def data():
    generator = np.random.default_rng(0)
    return [{"x": generator.standard_normal((16, K), np.float32)} for _ in range(4)]


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Count surveys and conversions, with an empty cache."""
    monkeypatch.setenv("ONNX_BITNET_CACHE", str(tmp_path / "cache"))
    counts = {"surveys": 0, "conversions": 0}

    def count(module, name, what):
        function = getattr(module, name)

        def counting(*args, **options):
            counts[what] += 1
            return function(*args, **options)

        monkeypatch.setattr(module, name, counting)

    count(survey, "_measured", "surveys")
    count(conversions, "convert_as_told", "conversions")

    def since() -> tuple[int, int]:
        found = counts["surveys"], counts["conversions"]
        counts.update(surveys=0, conversions=0)
        return found

    return since


def test_the_same_again_measures_nothing_and_finds_the_same(model, data, counted, tmp_path, monkeypatch):
    first = sensitivity(model, data)
    assert counted()[0] == 1
    assert sensitivity(model, data) == first
    assert counted() == (0, 0)
    planned = bn.plan(model, first.recipe.replace(min_cosine=0.99, rules=()), data=data)
    assert counted() == (0, 1)  # the conversion by all data, which the report is about
    bn.convert(model, tmp_path / "in.bitnet.onnx", {"min_cosine": 0.99}, data=data)
    assert counted() == (0, 1)
    kept = (tmp_path / "in.bitnet.onnx").read_bytes()
    monkeypatch.setenv("ONNX_BITNET_CACHE", "off")
    assert bn.plan(model, {"min_cosine": 0.99}, data=data) == planned
    bn.convert(model, tmp_path / "in.bitnet.onnx", {"min_cosine": 0.99}, data=data, force=True)
    assert (tmp_path / "in.bitnet.onnx").read_bytes() == kept


@pytest.mark.parametrize(
    "goal", [{"min_cosine": 0.95}, {"min_sqnr": 12.0}, {"min_cosine": 0.9, "max_size": 40000}]
)
def test_another_goal_needs_no_survey_and_finds_what_it_would_without(
    model, data, counted, monkeypatch, goal
):
    sensitivity(model, data)
    counted()
    found = sensitivity(model, data, goal)
    assert counted()[0] == 0
    monkeypatch.setenv("ONNX_BITNET_CACHE", "off")
    assert sensitivity(model, data, goal) == found


def test_three_batches_that_judge_themselves_are_served_as_well(model, data, counted):
    few = [{"x": batch["x"][:2]} for batch in data[:3]]
    planned = bn.plan(model, {"min_cosine": 0.9}, data=few)
    counted()
    assert bn.plan(model, {"min_cosine": 0.9}, data=few) == planned
    assert counted() == (0, 1)


def test_other_weights_data_recipes_or_methods_are_not_found(model, data, counted, tmp_path):
    sensitivity(model, data)
    counted()
    proto = onnx.load(model)
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("a"):
            values = onnx.numpy_helper.to_array(tensor).copy()
            values.flat[0] += 1e-3
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, tmp_path / "other.onnx")
    changed = [{"x": batch["x"].copy()} for batch in data]
    changed[1]["x"][0, 0] += 1e-3
    for arguments, options in (
        ((tmp_path / "other.onnx", data), {}),
        ((model, changed), {}),
        ((model, data[::-1]), {}),
        ((model, data, {"min_cosine": 0.99, "format": "i2s"}), {}),
        ((model, data, {"min_cosine": 0.99, "offset": True}), {}),
        ((model, data), {"method": "outputs"}),
        ((model, data), {"method": "weights"}),
    ):
        sensitivity(*arguments, **options)
        assert counted()[0] == 1, (arguments[2:], options)


def test_a_metric_of_the_user_s_is_asked_each_time(model, data, counted):
    name = onnx.load(model).graph.output[0].name
    for _ in range(2):
        bn.plan(
            model,
            {"min_metric": 0.5},
            data=data,
            metric=lambda _, outputs: float(np.isfinite(outputs[0][name]).all()),
        )
        assert counted()[1] > 0


def test_external_weights_are_content_too(model, data, counted, tmp_path):
    proto = onnx.load(model)
    path = tmp_path / "external.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="external.data", size_threshold=0)
    sensitivity(path, data)
    counted()
    raw = bytearray((tmp_path / "external.data").read_bytes())
    raw[2] ^= 1
    (tmp_path / "external.data").write_bytes(raw)
    sensitivity(path, data)
    assert counted()[0] == 1
