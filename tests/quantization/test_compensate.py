"""Error compensation: the fitter against its oracle, what it promises, and whole conversions with data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from chains import K, chain, ordinary, ternary

import onnx_bitnet as bn
from onnx_bitnet import _native, reference
from onnx_bitnet.errors import DataError, RecipeError
from onnx_bitnet.quantization.compensate import Moments, Problem, fit
from onnx_bitnet.quantization.grids import Grid, affine, free_planes, integers, nine
from onnx_bitnet.quantization.quantize import quantize_layer
from onnx_bitnet.quantization.rotation import rotation
from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.scale_types import TYPES

GRIDS = {
    "ternary": (free_planes(1, 3), {}),
    "2 planes": (free_planes(2, 3), {"planes": 2}),
    "3 planes": (free_planes(3, 3), {"planes": 3}),
    "4 levels": (free_planes(1, 4), {"levels": 4}),
    "2 planes of 4 levels": (free_planes(2, 4), {"levels": 4, "planes": 2}),
    "9 levels": (nine(), {"levels": 9, "planes": 2}),
    "offset": (affine(), {"offset": True, "levels": 4}),
    "int4": (integers(4), {"integer_bits": 4}),
    "int8": (integers(8), {"integer_bits": 8}),
}
FIELDS = {name: fields for name, (_, fields) in GRIDS.items()}
each_grid = pytest.mark.parametrize("grid", [grid for grid, _ in GRIDS.values()], ids=GRIDS)


def inputs(rows: int = 400, k: int = 160, seed: int = 0) -> np.ndarray:
    """Rows that depend on one another, some inputs far larger than others, not about 0."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, k)) @ rng.standard_normal((k, k)) / np.sqrt(k)
    return (mixed * np.exp(rng.standard_normal(k)) + rng.standard_normal(k)).astype(np.float32)


def moments(x: np.ndarray, f: np.ndarray | None = None) -> Moments:
    cross = None if f is None else x.T @ f
    means = x.mean(axis=0, dtype=np.float64), (x if f is None else f).mean(axis=0, dtype=np.float64)
    return Moments(len(x), x.T @ x, cross, *means)


def weight(n: int = 24, k: int = 160, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k), np.float32)


def decoded(grid: Grid, index: np.ndarray, theta: np.ndarray, block: int) -> np.ndarray:
    spread = np.repeat(theta, block, axis=1)[:, : index.shape[1]]
    return (grid.coefficient[index] * spread).sum(axis=-1)


# The fitter


@each_grid
def test_parameters_of_a_group_are_the_oracles(grid):
    w, importance = weight(3, 50), np.random.default_rng(2).uniform(0.1, 4, 50).astype(np.float32)
    theta = np.empty((3, 1, grid.template.shape[1]), np.float32)
    _native.fit_grid(grid.coefficient, w, importance, grid.template, theta, block_size=64, rounds=3)
    for row in range(3):
        root = np.sqrt(importance @ w[row] ** 2 / importance.sum())
        expected = reference.fit_levels(w[row], importance, grid.coefficient, grid.template * root, 3)
        np.testing.assert_allclose(theta[row, 0], expected, rtol=1e-4, atol=1e-5)


@each_grid
def test_codes_are_those_of_gptq(grid):
    problem = Problem.of(weight(), moments(inputs()))
    index, theta = fit(problem, grid, 64, np.float32, turns=0)
    values = theta @ grid.coefficient.T
    expected = reference.compensated(problem.target, problem.h, values, np.arange(160) // 64, problem.order)
    # a float32 sum on the other side of a threshold changes the rest of its row
    assert (index == expected).all(axis=1).mean() > 0.8
    error = problem.errors(decoded(grid, index, theta, 64)).sum()
    other = problem.errors(decoded(grid, expected, theta, 64)).sum()
    assert error == pytest.approx(other, rel=0.02)


@each_grid
def test_each_turn_brings_the_error_of_each_row_down(grid):
    problem = Problem.of(weight(), moments(inputs()))
    before = np.full(24, np.inf)
    for turns in range(4):
        index, theta = fit(problem, grid, 64, np.float16, turns=turns)
        after = problem.errors(decoded(grid, index, theta, 64))
        assert (after <= before * 1.001).all()
        before = after


@each_grid
def test_what_is_stored_decodes_to_what_was_fitted(grid):
    for block, scale_type in ((64, np.float16), (160, np.float32)):
        problem = Problem.of(weight(), moments(inputs()))
        index, theta = fit(problem, grid, block, scale_type)
        codes, scale, zero_point = grid.planes(index, theta)
        np.testing.assert_array_equal(scale.astype(scale_type).astype(np.float32), scale)
        packed = reference.pack_i2s(codes)
        got = reference.dequantize(
            packed, scale.astype(scale_type), zero_point.astype(scale_type), 160, block % 160
        )
        np.testing.assert_allclose(got, decoded(grid, index, theta, block), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_it_beats_plain_rounding_by_far(fields):
    x, w = inputs(), weight()
    problem = Problem.of(w, moments(x))
    spec = LayerSpec(granularity="block:64", rounding="gptq", **fields)
    got = quantize_layer(w, spec, moments(x))
    if fields.get("levels") != 9 and not fields.get("offset"):
        plain = quantize_layer(w, LayerSpec(granularity="block:64", rounding="absmean", **fields))
        assert (problem.errors(got.dequantize()) <= problem.errors(plain.dequantize())).all()
        assert problem.errors(got.dequantize()).sum() < 0.7 * problem.errors(plain.dequantize()).sum()
    assert got.dequantize().shape == w.shape


def test_few_rows_do_not_mislead():
    """Rounded by fewer rows than there are inputs, a layer still serves rows of the same kind better."""
    x, w = inputs(rows=2000), weight()
    spec = LayerSpec(granularity="channel", rounding="gptq", integer_bits=4)
    plain = quantize_layer(w, replace(spec, rounding="mse")).dequantize()
    other = Problem.of(w, moments(x[100:]))
    fitted = quantize_layer(w, spec, moments(x[:100])).dequantize()
    assert other.errors(fitted).sum() < other.errors(plain).sum()


def test_a_rotation_is_taken_back():
    x = inputs()
    turned = rotation(160, 128)
    np.testing.assert_allclose(turned.back(turned.rows(x)), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_scales_are_of_the_type_asked_for(fields):
    x, w = inputs(), weight()
    for name in ("bfloat16", "float16", "float32"):
        spec = LayerSpec(granularity="block:64", rounding="gptq", scale_type=name, **fields)
        packed = quantize_layer(w, spec, moments(x))
        wide, kind = packed.scale.astype(np.float32), TYPES[name]
        assert packed.scale.dtype == (np.float32 if name == "float32" else np.float16)
        np.testing.assert_array_equal(wide.astype(kind).astype(np.float32), wide)
    tiny = quantize_layer(1e-5 * w, replace(spec, scale_type="float16"), moments(x))
    assert tiny.scale.dtype == np.float32
    assert tiny.zeros < 0.9


def test_weighted_fits_to_the_size_of_each_input():
    x, w = inputs(), weight()
    h = np.diag(((x - x.mean(axis=0)) ** 2).sum(axis=0))
    weighted = quantize_layer(w, LayerSpec(granularity="block:64", rounding="weighted"), moments(x))
    best = quantize_layer(w, LayerSpec(granularity="block:64", rounding="mse"))
    errors = [np.einsum("nk,kk,nk", q.dequantize() - w, h, q.dequantize() - w) for q in (weighted, best)]
    assert errors[0] < 0.9 * errors[1]


def test_inputs_that_are_always_zero_and_zero_weights_are_no_trouble():
    x, w = inputs(), weight()
    x[:, 5:70] = 0
    w[3] = 0
    for data in (x, np.zeros_like(x)):
        got = quantize_layer(
            w, LayerSpec(granularity="block:32", rounding="gptq"), moments(data)
        ).dequantize()
        assert np.isfinite(got).all()
        assert not got[3].any()


def test_inputs_that_hardly_vary_about_large_means_are_no_trouble():
    """What is left of their moments are the rounding errors of float32 sums, and no positive matrix."""
    noise = np.random.default_rng(0).standard_normal((600, 64), np.float32)
    x = np.linspace(1, 3, 64, dtype=np.float32) + 1e-4 * noise
    second = (x.T @ x).astype(np.float32)
    mean = x.mean(0, dtype=np.float64)
    assert np.linalg.eigvalsh(second - len(x) * np.outer(mean, mean))[0] < 0
    problem = Problem.of(np.ones((2, 64), np.float32), Moments(len(x), second, None, mean, mean))
    assert np.isfinite(problem.feedback).all()


def test_the_target_makes_good_what_the_inputs_lost():
    """The inputs of the converted model are off; the outputs should be those of the float model."""
    f, w = inputs(), weight()
    x = f + 0.5 * inputs(seed=3)
    spec = LayerSpec(granularity="channel", rounding="gptq", integer_bits=8)

    def error(known: Moments) -> float:
        packed = quantize_layer(w, spec, known).dequantize()
        y = x @ packed.T + known.bias_shift(w, packed)
        return float(((y - f @ w.T) ** 2).sum())

    assert error(moments(x, f)) < 0.7 * error(moments(x))


def test_the_bias_keeps_the_mean_of_every_output():
    f, w = inputs(), weight()
    x = f + 0.3 * inputs(seed=4)
    known = moments(x, f)
    packed = quantize_layer(w, LayerSpec(rounding="gptq"), known).dequantize()
    y = x @ packed.T + known.bias_shift(w, packed)
    np.testing.assert_allclose(y.mean(axis=0), (f @ w.T).mean(axis=0), atol=1e-3)


# Rotation


@pytest.mark.parametrize(("k", "block"), [(384, 128), (576, 64), (96, 32), (16, 16), (24, 0), (33, 0)])
def test_a_rotation_takes_the_largest_block_that_fits(k, block):
    found = rotation(k, 128)
    assert (found.block_size if found else 0) == block
    if found:
        x, w = inputs(k=k), weight(k=k)
        np.testing.assert_allclose(found.rows(x) @ found.rows(w).T, x @ w.T, atol=2e-3)
        np.testing.assert_allclose(
            found.rows(x), reference.block_hadamard(x, found.signs, block), rtol=0, atol=0
        )
        turned = moments(x).rotated(found)
        np.testing.assert_allclose(turned.second, found.rows(x).T @ found.rows(x), rtol=1e-3, atol=1e-2)


# Conversions


def batches(count: int = 4) -> list[dict[str, np.ndarray]]:
    return [{"x": part} for part in np.split(inputs(500, K), 5)[:count]]


@pytest.fixture
def model(tmp_path):
    weights = {"a": ordinary(K), "b": ordinary(K, seed=2), "c": ordinary(16, seed=3)}
    return chain(tmp_path / "in.onnx", weights)


def distance(model, packed) -> float:
    """How far results are apart on data that was not used to convert."""
    (output,) = bn.validate(model, packed, batches(5)[4:], layers=False).outputs
    return output.metrics.relative_l2


def test_data_makes_conversions_better_step_by_step(model, tmp_path):
    recipe = {"mode": "ternary", "granularity": "block:32"}
    plain = bn.convert(model, tmp_path / "plain.onnx", recipe)
    alone = bn.convert(model, tmp_path / "alone.onnx", recipe, data=bn.calibrate(model, batches()))
    whole = bn.convert(model, tmp_path / "whole.onnx", recipe, data=batches())
    sizes = {report.converted[0].packed_bytes for report in (plain, alone, whole)}
    assert len(sizes) == 1
    far = [distance(model, tmp_path / f"{name}.onnx") for name in ("plain", "alone", "whole")]
    assert far[1] < 0.8 * far[0]
    assert far[2] < 0.97 * far[1]


def test_a_plan_with_data_says_the_same(model, tmp_path):
    recipe = {"mode": "ternary", "rotation": "hadamard:64"}
    plan = bn.plan(model, recipe, data=batches())
    report = bn.convert(model, tmp_path / "out.onnx", recipe, data=batches())
    assert plan.layers == report.layers
    bn.convert(model, tmp_path / "again.onnx", recipe, data=batches())
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()


@pytest.mark.parametrize("data", [None, batches(2)], ids=["weights alone", "with data"])
def test_layers_that_read_one_value_share_its_rotation(tmp_path, data):
    path = chain(tmp_path / "in.onnx", {"a": ordinary(K), "b": ordinary(K, seed=2)})
    model = onnx.load(path)
    model.graph.node[1].input[0] = "x"
    model.graph.output.append(onnx.helper.make_tensor_value_info("a.y", onnx.TensorProto.FLOAT, ["M", K]))
    onnx.save(model, path)
    recipe = {"mode": "ternary", "planes": 3, "rotation": "hadamard:128"}
    report = bn.convert(path, tmp_path / "out.onnx", recipe, data=data)
    assert [layer.rotation for layer in report.layers] == [64, 64]
    nodes = [node.op_type for node in ir.load(tmp_path / "out.onnx").graph]
    assert sorted(nodes) == ["BlockHadamard", "MatMulI2S", "MatMulI2S"]
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    result = bn.validate(path, tmp_path / "out.onnx", batches(1))
    assert all(layer.local.sqnr_db > 15 for layer in result.layers)
    x = batches(1)[0]
    stock = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    ours = bn.session(tmp_path / "out.onnx")
    for one, other in zip(stock.run(None, x), ours.run(None, x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_ternary_layers_stay_lossless(tmp_path):
    path = chain(tmp_path / "in.onnx", {"a": ternary(K), "b": ordinary(K)})
    report = bn.convert(
        path, tmp_path / "out.onnx", {"mode": "ternary", "rotation": "hadamard:64"}, data=batches()
    )
    assert [layer.lossless for layer in report.layers] == [True, False]
    assert [layer.rotation for layer in report.layers] == [0, 64]


def test_rules_may_ask_for_rotation_offset_and_levels(model, tmp_path):
    rules = [
        ("*.a", {"levels": 9, "format": "t5"}),
        ("*.b", {"levels": 4, "offset": True, "granularity": "block:32"}),
        {"match": "*.c", "action": "int4", "rounding": "gptq", "rotation": "hadamard:32"},
    ]
    report = bn.convert(model, tmp_path / "out.onnx", {"mode": "ternary", "rules": rules}, data=batches())
    assert [layer.planes for layer in report.layers] == [2, 1, 2]
    assert [layer.rotation for layer in report.layers] == [0, 0, 32]
    assert distance(model, tmp_path / "out.onnx") < 0.5


def test_inputs_with_defaults_are_no_trouble(model, tmp_path):
    """Before IR version 4 every initializer had to be an input."""
    old = onnx.load(model)
    old.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in old.graph.initializer
    )
    old.ir_version = 3
    onnx.save(old, tmp_path / "old.onnx")
    report = bn.convert(tmp_path / "old.onnx", tmp_path / "out.onnx", {"mode": "ternary"}, data=batches(2))
    same = bn.convert(model, tmp_path / "other.onnx", {"mode": "ternary"}, data=batches(2))
    assert report.layers == same.layers


def test_a_real_model_keeps_far_more_with_data(minilm_model, tmp_path):
    """Two of six blocks of MiniLM ternary, 32 sentences to calibrate with and 40 others to measure."""
    import minilm

    known, others = (minilm.sentences()[part][:40] for part in (0, 1))
    rules = [("*layer.[01].*", {"mode": "ternary", "granularity": "block:128", "rotation": "hadamard:128"})]
    cosine = []
    for data in (None, [minilm.tokenize(known[:16]), minilm.tokenize(known[16:32])]):
        bn.convert(minilm_model, tmp_path / "out.onnx", {"rules": rules}, data=data, force=True)
        result = bn.validate(minilm_model, tmp_path / "out.onnx", minilm.tokenize(others), layers=False)
        cosine += [item.metrics.row_cosine for item in result.outputs if item.name == "sentence_embedding"]
    assert cosine[1] > 0.9
    assert 1 - cosine[1] < 0.5 * (1 - cosine[0])


def test_one_matrix_has_no_data():
    for recipe in ({"rounding": "gptq"}, {"levels": 9}, {"offset": True, "levels": 4}):
        with pytest.raises(RecipeError, match="need calibration data; use convert"):
            bn.quantize(weight(), recipe)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"rounding": "gptq"}, "need calibration data"),
        ({"levels": 9}, "offset and levels = 9 need calibration data"),
        ({"rotation": "hadamard:48"}, "is neither none nor hadamard:B"),
        ({"offset": 1}, "offset = 1 is not known"),
        ({"offset": True, "format": "t5"}, "holds three levels"),
        ({"levels": 9, "planes": 3}, "two planes already"),
    ],
)
def test_what_cannot_be_is_an_error(model, recipe, message):
    with pytest.raises(RecipeError, match=message):
        bn.plan(model, {"mode": "ternary"} | recipe)


@pytest.mark.parametrize("granularity", ["block:2x16", "tensor"])
def test_outputs_that_share_scales_are_rounded_without_data(model, granularity):
    recipe = {"mode": "ternary", "granularity": granularity}
    with_data, without = (bn.plan(model, recipe, data=data) for data in (batches(1), None))
    assert [layer.sqnr_db for layer in with_data.layers] == [layer.sqnr_db for layer in without.layers]
    assert with_data.layers[0].detail.endswith(
        "; rounding mse: gptq fits each output, and here some share scales"
    )
    with pytest.raises(RecipeError, match="levels = 9 fit each output; use granularity channel"):
        bn.plan(model, recipe | {"levels": 9}, data=batches(1))
    with pytest.raises(RecipeError, match="fits each output; use granularity channel"):
        bn.plan(model, recipe | {"rounding": "gptq"}, data=batches(1))


def test_data_must_suit_the_rounding(model):
    recipe = {"mode": "ternary", "rounding": "gptq"}
    with pytest.raises(RecipeError, match="fits each output; use granularity channel"):
        bn.plan(model, recipe | {"granularity": "tensor"}, data=batches(1))
    with pytest.raises(DataError, match="the calibration lacks second moments"):
        bn.plan(model, recipe, data=bn.calibrate(model, batches(1), second_moments=False))
    with pytest.raises(DataError, match="data: input 'x' holds NaN or infinity"):
        bn.plan(model, recipe, data={"x": np.full((2, K), np.inf, np.float32)})
