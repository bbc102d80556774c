"""Convert and plan: the order of the steps, sharing, modes, rules, and what a conversion never does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from chains import K, chain, ordinary, ternary

import onnx_bitnet as bn
from onnx_bitnet import files
from onnx_bitnet.errors import ModelError, OutputError, RecipeError, Refused
from onnx_bitnet.inspection import inspect
from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.packed import packed_nodes


def test_auto_packs_what_is_ternary_and_says_what_it_leaves(mixed, tmp_path):
    report = bn.convert(mixed, tmp_path / "out.onnx")
    assert [layer.name for layer in report.converted] == ["layer.a", "layer.c"]
    assert [(layer.name, layer.reason) for layer in report.kept] == [("layer.b", Reason.NOT_TERNARY)]
    assert report.lossless
    assert "mode 'auto' left 1 layers float" in report.notes[0]
    assert report.output_bytes == (tmp_path / "out.onnx").stat().st_size < report.source_bytes


def test_lossless_packs_the_same_and_notes_nothing(mixed, tmp_path):
    report = bn.convert(mixed, tmp_path / "out.onnx", {"mode": "lossless"})
    assert len(report.converted) == 2
    assert report.notes == ()


def test_ternary_packs_everything_and_counts_the_loss(mixed, tmp_path):
    report = bn.convert(mixed, tmp_path / "out.onnx", bn.Recipe(mode="ternary"))
    assert [layer.lossless for layer in report.layers] == [True, False, True]
    assert not report.lossless
    assert 5 < report.layers[1].sqnr_db < 12


def test_results_are_those_of_the_dequantized_weights(mixed, tmp_path):
    bn.convert(mixed, tmp_path / "out.onnx", bn.Recipe(mode="ternary", activation_bits=32))
    x = np.random.default_rng(0).standard_normal((3, K), np.float32)
    (got,) = bn.session(tmp_path / "out.onnx").run(None, {"x": x})
    packed = bn.quantize(np.ascontiguousarray(ordinary(K).T), {"mode": "ternary"}).dequantize()
    expected = x @ ternary(K) @ packed.T @ ternary(8, seed=2)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ([("*.b", "keep")], ["layer.a", "layer.c"]),
        ([{"match": "*", "min_size": 4000, "keep": True}], ["layer.c"]),
        ([{"op_type": "MatMul", "keep": True}], []),
        ([("re:[ab]$", {"planes": 2}), ("*", "keep")], ["layer.a", "layer.b"]),
    ],
)
def test_the_first_rule_that_fits_decides(mixed, tmp_path, rules, names):
    report = bn.convert(mixed, tmp_path / "out.onnx", {"mode": "ternary", "rules": rules})
    assert [layer.name for layer in report.converted] == names
    assert all(layer.reason is Reason.KEPT_BY_RULE for layer in report.kept)


def test_a_rule_may_ask_for_more_than_the_mode(mixed, tmp_path):
    rules = [("*.b", {"mode": "ternary", "planes": 3, "granularity": "channel", "activation_bits": 8})]
    report = bn.convert(mixed, tmp_path / "out.onnx", {"rules": rules})
    layer = report.layers[1]
    assert (layer.planes, layer.granularity, layer.activation_bits) == (3, "channel", 8)


@pytest.mark.parametrize("scale", [0.5, [0.25 + 0.01 * n for n in range(K)]])
@pytest.mark.parametrize("action", [None, "int4"])
def test_a_rule_may_give_the_scales(mixed, tmp_path, scale, action):
    rules = [{"match": "*.b", "scale": scale, "action": action, "levels": 4}]
    report = bn.convert(mixed, tmp_path / "out.onnx", {"rules": rules})
    assert report.layers[1].granularity == ("tensor" if isinstance(scale, float) else "channel")
    packed = list(packed_nodes(ir.load(tmp_path / "out.onnx")))[1].quantized()
    step = np.float32(scale).reshape(-1, 1)
    low, high = (-1, 2) if action is None else (-8, 7)
    expected = np.clip(np.rint(ordinary(K).T / step), low, high) * step
    np.testing.assert_allclose(packed.dequantize(), expected, rtol=1e-4)
    again = json.loads(json.dumps(report.recipe))
    assert bn.plan(mixed, again).layers == report.layers


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"scale": [1.0, 2.0]}, "rule '.*' gives 2 scales, layer 'layer.b' has 64 outputs"),
        ({"scale": 1.0, "planes": 2}, "gives scales for one plane"),
        ({"scale": 0.0}, "scale 0.0 is no number from 1e-30"),
        ({"scale": "big"}, "scale 'big' is no number"),
        ({"scale": 1.0, "keep": True}, "a scale goes with neither keep nor a granularity"),
    ],
)
def test_scales_that_do_not_fit_are_refused(mixed, rule, message):
    with pytest.raises(RecipeError, match=message):
        bn.plan(mixed, {"rules": [{"match": "*.b"} | rule]})


@pytest.mark.parametrize(("action", "planes", "sqnr"), [("int4", 2, 17), ("int8", 4, 38)])
def test_integers_are_planes(mixed, tmp_path, action, planes, sqnr):
    report = bn.convert(mixed, tmp_path / "out.onnx", {"rules": [("*.b", action)]})
    assert report.layers[1].planes == planes
    assert report.layers[1].sqnr_db > sqnr


@pytest.mark.parametrize("form", ["i2s", "tl1", "tl2", "t5"])
def test_a_format_that_is_named_is_used(mixed, tmp_path, form):
    report = bn.convert(mixed, tmp_path / "out.onnx", {"mode": "ternary", "format": form})
    assert {(layer.format, layer.detail) for layer in report.layers} == {(form, "")}
    packed = inspect(tmp_path / "out.onnx").packed
    assert {layer.format for layer in packed} == {form}
    sizes = [round(layer.packed_bytes * 8 / (layer.n * layer.k), 6) for layer in report.layers]
    assert [round(layer.bits_per_weight, 6) for layer in packed] == sizes
    bn.convert(mixed, tmp_path / "i2s.onnx", {"mode": "ternary"})
    x = np.random.default_rng(0).standard_normal((3, K), np.float32)
    got, expected = (bn.session(tmp_path / name).run(None, {"x": x})[0] for name in ("out.onnx", "i2s.onnx"))
    np.testing.assert_array_equal(got, expected)


def test_layers_may_have_formats_of_their_own(mixed, tmp_path):
    rules = [("*.a", {"format": "t5"}), ("*.b", "int8")]
    report = bn.convert(mixed, tmp_path / "out.onnx", {"format": "tl2", "rules": rules})
    assert [layer.format for layer in report.layers] == ["t5", "i2s", "tl2"]
    assert [layer.detail for layer in report.layers] == [
        "",
        "int8 needs four levels, which only i2s holds",
        "",
    ]
    model = onnx.load(tmp_path / "out.onnx")
    assert [function.name for function in model.functions] == ["MatMulTL2", "MatMulI2S", "MatMulT5"]
    assert len(model.graph.node[0].input) == 4
    onnx.checker.check_model(model, full_check=True)


def test_auto_says_why_it_takes_i2s(mixed):
    report = bn.plan(mixed)
    assert [layer.format for layer in report.converted] == ["i2s", "i2s"]
    assert all(layer.detail.startswith("i2s loads fastest") for layer in report.converted)


@pytest.mark.parametrize(
    ("wanted", "format", "why"),
    [
        ({"target_cpu": "avx512vbmi"}, "t5", "t5 takes a fifth less memory"),
        ({"target_cpu": "amx"}, "i2s", "i2s loads fastest"),
        ({}, "i2s", "i2s loads fastest"),
        ({"target_cpu": "avx512vbmi", "fuse": True}, "i2s", "layout panel and fused layers are i2s"),
        ({"target_cpu": "avx512vbmi", "layout": "panel"}, "i2s", "layout panel and fused layers are i2s"),
        ({"target_cpu": "avx512vbmi", "activation_bits": 32}, "i2s", "i2s: t5 is fast with one plane"),
        ({"target_cpu": "avx512vbmi", "format": "tl2"}, "tl2", ""),
        ({"target_cpu": "avx512vbmi", "target": "ort"}, "nbits2", ""),
    ],
)
def test_auto_takes_the_format_that_suits_the_cpu_and_the_shape(tmp_path, wanted, format, why):
    model = chain(tmp_path / "m.onnx", {"large": ternary(2048, 2048), "small": ternary(64, 2048)})
    large, small = bn.convert(model, tmp_path / "out.onnx", wanted).layers
    assert large.format == format
    assert large.detail.startswith(why)
    assert small.format == ("i2s" if format == "t5" else format)


def test_a_rule_cannot_put_four_levels_into_a_ternary_format(mixed, tmp_path):
    recipe = {"mode": "ternary", "levels": 4, "rules": [("*.b", {"format": "t5"})]}
    with pytest.raises(RecipeError, match="format 't5' holds three levels"):
        bn.convert(mixed, tmp_path / "out.onnx", recipe)
    assert not (tmp_path / "out.onnx").exists()


def test_first_and_last_can_be_kept(mixed, tmp_path):
    report = bn.convert(mixed, tmp_path / "out.onnx", {"keep_first": True, "keep_last": True})
    assert [layer.reason for layer in report.layers] == [
        Reason.KEPT_FIRST,
        Reason.NOT_TERNARY,
        Reason.KEPT_LAST,
    ]


def test_tied_weights_are_packed_once(tmp_path):
    model = onnx.load(chain(tmp_path / "in.onnx", {"a": ternary(K), "b": ternary(K)}))
    model.graph.node[1].input[1] = "a"
    onnx.save(model, tmp_path / "tied.onnx")
    report = bn.convert(tmp_path / "tied.onnx", tmp_path / "out.onnx")
    assert [layer.shared_with for layer in report.layers] == [None, "layer.a"]
    names = [tensor.name for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer]
    assert sum(name.endswith(".i2s") for name in names) == 1


def test_a_plan_says_the_same_and_writes_nothing(mixed, tmp_path):
    before = sorted(tmp_path.iterdir())
    plan = bn.plan(mixed, {"mode": "ternary"})
    assert sorted(tmp_path.iterdir()) == before
    report = bn.convert(mixed, tmp_path / "out.onnx", {"mode": "ternary"})
    assert plan.layers == report.layers
    assert plan.output is None


@pytest.mark.parametrize("size", [K, 2100])
@pytest.mark.parametrize(
    "recipe",
    [{}, {"mode": "ternary", "format": "t5"}, {"mode": "ternary", "target": "ort"}, {"target": "simulate"}],
)
def test_a_plan_tells_the_size_to_the_byte(tmp_path, size, recipe):
    source = chain(tmp_path / "in.onnx", {"a": ternary(size, size), "b": ordinary(size, size)})
    report = bn.convert(source, tmp_path / "in.bitnet.onnx", recipe)
    assert (tmp_path / "in.bitnet.onnx.data").exists() == (size > K)
    assert bn.plan(source, recipe).output_bytes == report.output_bytes


def test_the_same_input_gives_the_same_bytes(mixed, tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        bn.convert(mixed, tmp_path / name / "out.onnx", {"mode": "ternary"})
    assert (tmp_path / "1/out.onnx").read_bytes() == (tmp_path / "2/out.onnx").read_bytes()


def test_the_effective_recipe_is_in_the_file_and_converts_alike(mixed, tmp_path):
    bn.convert(mixed, tmp_path / "a.onnx", {"mode": "ternary", "rules": [("*.b", {"planes": 2})]})
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert metadata["onnx_bitnet.version"]
    bn.convert(mixed, tmp_path / "b.onnx", json.loads(metadata["onnx_bitnet.recipe"]))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_converting_twice_changes_nothing_more(mixed, tmp_path):
    bn.convert(mixed, tmp_path / "once.onnx")
    report = bn.convert(tmp_path / "once.onnx", tmp_path / "twice.onnx")
    assert report.converted == ()
    assert (tmp_path / "once.onnx").read_bytes() == (tmp_path / "twice.onnx").read_bytes()


def test_the_input_is_not_touched(mixed, tmp_path):
    before = mixed.read_bytes(), mixed.stat().st_mtime_ns
    bn.convert(mixed, tmp_path / "out.onnx", {"mode": "ternary"})
    assert (mixed.read_bytes(), mixed.stat().st_mtime_ns) == before


def test_large_weights_come_and_go_in_data_files(tmp_path):
    source = chain(tmp_path / "inline.onnx", {"a": ternary(2048, 2048)})
    ir.save(ir.load(source), tmp_path / "in.onnx", external_data="in.data")
    report = bn.convert(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert report.source_bytes > 2048 * 2048 * 4
    (packed,) = packed_nodes(files.read(tmp_path / "out.onnx").model)
    assert isinstance(packed.tensors[0], ir.ExternalTensor)
    x = np.random.default_rng(0).standard_normal((2, 2048), np.float32)
    (got,) = bn.session(tmp_path / "out.onnx").run(None, {"x": x})
    np.testing.assert_allclose(got, x @ ternary(2048, 2048), rtol=1e-3, atol=1e-2)


def test_progress_counts_the_layers(mixed, tmp_path):
    seen = []
    bn.convert(mixed, tmp_path / "out.onnx", progress=lambda *call: seen.append(call))
    assert seen == [(0, 3, "layer.a"), (1, 3, "layer.b"), (2, 3, "layer.c"), (3, 3, "")]


def test_unused_data_is_mentioned(mixed, tmp_path):
    report = bn.convert(mixed, tmp_path / "out.onnx", {"mode": "lossless"}, data=[{"x": 0}])
    assert report.notes == ("the calibration data was not used: no step of this recipe needs any",)


def bad(path: Path, change) -> Path:
    weight = ordinary(K)
    return chain(path, {"a": change(weight)})


def set_first(value):
    def change(weight):
        weight[3, 5] = value
        return weight

    return change


@pytest.mark.parametrize("mode", ["auto", "lossless", "ternary"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_first(np.nan),
            r"layer.a: weight holds 1 NaN or infinite values, the first \(nan\) at output 5, input 3",
        ),
        (set_first(-np.inf), r"layer.a: weight holds 1 NaN or infinite values, the first \(-inf\)"),
        (lambda weight: weight[:, :0], r"layer.a: weight of shape \(0, 64\) is empty"),
        (lambda weight: weight[:0], r"layer.a: weight of shape \(64, 0\) is empty"),
    ],
)
def test_a_weight_that_cannot_be_is_an_error(tmp_path, mode, change, message):
    source = bad(tmp_path / "in.onnx", change)
    with pytest.raises(ModelError, match=message) as error:
        bn.convert(source, tmp_path / "out.onnx", {"mode": mode})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.onnx").exists()
    report = bn.convert(source, tmp_path / "out.onnx", {"mode": mode, "rules": [("*", "keep")]})
    assert report.converted == ()


def test_a_rule_that_fits_nothing_is_an_error_with_near_misses(mixed, tmp_path):
    with pytest.raises(RecipeError, match=r"rule 'layr.a' matches no layer; near misses: layer.a"):
        bn.convert(mixed, tmp_path / "out.onnx", {"rules": [("layr.a", "keep")]})
    with pytest.raises(RecipeError, match=r"rule '\*' for Gemm matches no layer"):
        bn.convert(mixed, tmp_path / "out.onnx", {"rules": [{"op_type": "Gemm", "keep": True}]})


def test_an_existing_output_is_refused_or_replaced(mixed, tmp_path):
    (tmp_path / "out.onnx").write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        bn.convert(mixed, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == b"precious"
    bn.convert(mixed, tmp_path / "out.onnx", force=True)
    assert len(list(packed_nodes(ir.load(tmp_path / "out.onnx")))) == 2


def test_strict_writes_nothing_when_a_layer_is_refused(mixed, tmp_path):
    with pytest.raises(Refused, match=r"1 of 3 layers are refused, the first is 'layer.b': not-ternary"):
        bn.convert(mixed, tmp_path / "out.onnx", strict=True)
    assert not (tmp_path / "out.onnx").exists()
    bn.convert(mixed, tmp_path / "out.onnx", {"rules": [("*.b", "keep")]}, strict=True)


def test_a_damaged_write_is_noticed_and_leaves_nothing(mixed, tmp_path, monkeypatch):
    save = ir.save

    def damage(model, path, **options):
        save(model, path, **options)
        data = bytearray(Path(path).read_bytes())
        at = data.index(bn.quantize(np.ascontiguousarray(ternary(K).T)).weight.tobytes())
        data[at + 7] ^= 2
        Path(path).write_bytes(data)

    monkeypatch.setattr(ir, "save", damage)
    with pytest.raises(OutputError, match=r"layer 'layer.a' decodes to other values than were written"):
        bn.convert(mixed, tmp_path / "out.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx"]


_PEAK = """
import re, sys
import onnx_bitnet as bn
peaks = []
for source, output in (sys.argv[1:3], sys.argv[3:]):
    bn.convert(source, output, {"mode": "ternary", "rounding": "absmean"})
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells in kB what a process held at most")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """A second model with eight times the layers takes no more than the first: 16 MB each, 256 MB in all."""
    weight = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    for name, count in (("small", 2), ("large", 16)):
        proto = onnx.load(chain(tmp_path / f"{name}.onnx", {f"w{index}": weight for index in range(count)}))
        location = f"{name}.onnx.data"
        onnx.save(proto, tmp_path / f"{name}.onnx", save_as_external_data=True, location=location)
    paths = [tmp_path / file for name in ("small", "large") for file in (f"{name}.onnx", f"{name}.out.onnx")]
    done = subprocess.run([sys.executable, "-c", _PEAK, *paths], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 << 10


@pytest.mark.parametrize("what", ["shape", "name", "order"])
def test_a_model_that_onnxruntime_runs_but_the_checker_refuses(mixed, tmp_path, what):
    """A verification that holds outputs to more than their inputs would leave such models unconverted."""
    model = onnx.load(mixed)
    if what == "shape":
        model.graph.output[0].type.tensor_type.ClearField("shape")
    elif what == "name":
        model.graph.name = ""
    else:
        nodes = list(reversed(model.graph.node))
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    onnx.save(model, mixed)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(mixed)
    report = bn.convert(mixed, tmp_path / "out.onnx")
    assert len(report.converted) == 2
    result = bn.validate(mixed, tmp_path / "out.onnx")
    assert result.outputs[0].metrics.cosine > 0.999


def test_a_model_without_shapes_is_checked_for_all_else(mixed, tmp_path):
    model = onnx.load(mixed)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.node.append(onnx.helper.make_node("Relu", ["x"], ["more"], nothing=1))
    onnx.save(model, mixed)
    with pytest.raises(OutputError, match=r"verification failed: .*Unrecognized attribute: nothing"):
        bn.convert(mixed, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_value_that_nothing_makes_is_one_error(mixed, tmp_path, caplog):
    model = onnx.load(mixed)
    model.graph.node[1].input[0] = "ghost"
    onnx.save(model, mixed)
    with pytest.raises(ModelError, match=r"node 'layer.b' reads 'ghost', which nothing makes"):
        bn.convert(mixed, tmp_path / "out.onnx")
    assert not caplog.records


def test_nodes_that_feed_each_other_are_one_error(mixed, tmp_path):
    model = onnx.load(mixed)
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]
    onnx.save(model, mixed)
    with pytest.raises(ModelError, match="in a cycle"):
        bn.convert(mixed, tmp_path / "out.onnx")
