"""Attention as one op: where it may stand, what it computes, and how conversions come to it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from chains import ternary
from rewrite.attentions import (
    BY_HEAD,
    GUARD,
    HEADS,
    SCORES,
    SIZES,
    SOFTMAX,
    B,
    D,
    H,
    K,
    Parts,
    Q,
    S,
    T,
    V,
    Y,
    assert_close,
    assert_same_results,
    attributes,
    feeds_of,
    fuse,
    with_numbers,
)
from rewrite.graphs import build, numbers
from rewrite.steps import initializers, ops, plain, reference, stock, with_library
from written import run as run_stock

import onnx_bitnet as bn
from onnx_bitnet.errors import RecipeError

# ---- What becomes one op

BERT = """
    g (float[b, s, 12] x, float[b, s] attention) => (float[b, s, 12] y) {
        n = Sub (one, attention)
        m = Mul (n, least)
        mask = Unsqueeze (m, axes)
        [query] q = MatMul (x, Wq)
        q4 = Reshape (q, split)
        qh = Transpose <perm = [0, 2, 1, 3]> (q4)
        [key] k = MatMul (x, Wk)
        k4 = Reshape (k, split)
        kt = Transpose <perm = [0, 2, 3, 1]> (k4)
        [value] v = MatMul (x, Wv)
        v4 = Reshape (v, split)
        vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        [scores] p = MatMul (qh, kt)
        scaled = Div (p, two)
        masked = Add (scaled, mask)
        weights = Softmax <axis = -1> (masked)
        [context] heads = MatMul (weights, vh)
        turned = Transpose <perm = [0, 2, 1, 3]> (heads)
        joined = Reshape (turned, join)
        [out] y = MatMul (joined, Wo)
    }"""
BERT_11 = BERT.replace("Unsqueeze (m, axes)", "Unsqueeze <axes = [1, 2]> (m)")


def bert(opset: int = 18, ternary_weights: bool = False) -> onnx.ModelProto:
    """The attention of BERT with 3 heads of 4, as PyTorch exports it."""
    make = (lambda n, k, seed: ternary(n, k, seed=seed)) if ternary_weights else wide
    weights = {f"W{name}": make(H * D, H * D, seed=seed) for seed, name in enumerate("qkvo")}
    constants = {
        "one": np.float32(1),
        "least": np.float32(-10000),
        "two": np.float32(2),
        "split": np.int64([0, 0, H, D]),
        "join": np.int64([0, 0, H * D]),
    }
    constants |= {"axes": np.int64([1, 2])} if opset >= 13 else {}
    return build(BERT if opset >= 13 else BERT_11, weights | constants, opset=opset)


def wide(n: int, k: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((k, n), np.float32) / 4).astype(np.float32)


def bert_feeds() -> dict[str, np.ndarray]:
    """Two texts, one of them shorter."""
    attention = np.ones((B, S), np.float32)
    attention[1, 3:] = 0
    return {"x": numbers(B, S, H * D), "attention": attention}


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 17, 18, 20, 21, 23])
def test_attention_of_bert_becomes_one_op(opset: int):
    before = bert(opset)
    after = fuse(before)
    masks, joined = ["Sub", "Mul", "Unsqueeze"], ["Reshape", "MatMul"]
    assert ops(after) == [*masks, *["MatMul", "Reshape"] * 3, "Attention", *joined]
    assert [function.name for function in after.functions] == ["Attention"]
    (node,) = [node for node in after.graph.node if node.op_type == "Attention"]
    assert (node.domain, node.name) == ("onnx_bitnet", "turned.Attention")
    assert (list(node.input), list(node.output)) == (["q4", "k4", "v4", "mask"], ["turned"])
    assert attributes(node) == {"scale": 0.5, "nan_to_zero": 0}
    kept = [node.SerializeToString() for node in plain(before).graph.node]
    for node in after.graph.node:
        assert node.op_type == "Attention" or node.SerializeToString() in kept
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert_same_results(before, after, bert_feeds())


BODIES = {
    "no mask": (Parts(scores="p = MatMul (qh, kh) \n masked = Div (p, eight)"), "Attention"),
    "mask": (Parts(), "Attention"),
    "guard": (Parts(softmax=GUARD), "Attention"),
    "by head": (BY_HEAD, "AttentionByHead"),
    "by head with guard": (BY_HEAD._replace(softmax=GUARD), "AttentionByHead"),
}


@pytest.mark.parametrize("opset", [11, 12, 13, 18, 21])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_of_all_opsets(name: str, opset: int):
    parts, op_type = BODIES[name]
    before = parts.model(opset)
    after = fuse(before)
    assert ops(after) == [op_type]
    assert [function.name for function in after.functions] == [op_type]
    (imported,) = [item.version for item in after.functions[0].opset_import if item.domain == ""]
    assert imported == opset
    assert_same_results(before, after)


def test_what_is_said_of_y_stays():
    before = Parts(y=Y.replace("y =", "u =") + "\n y = Relu (u)").model()
    before.graph.value_info.append(onnx.helper.make_tensor_value_info("u", 1, ["b", "s", H, D], "text"))
    after = fuse(before)
    assert list(after.graph.value_info) == list(before.graph.value_info)
    assert_same_results(before, after)


def test_no_mask_is_one_zero():
    after = fuse(Parts(scores="masked = MatMul (qh, kh)").model())
    (node,) = after.graph.node
    assert (node.input[3], attributes(node)["scale"]) == ("onnx_bitnet.no_mask", 1.0)
    (zero,) = initializers(after).values()
    assert (zero.shape, zero.item()) == ((1, 1, 1, 1), 0.0)


def twice(first: str, second: str, outputs: str) -> onnx.ModelProto:
    """One attention after the other; what is inside of the second has other names."""
    inputs = Parts(scores=first).inputs()
    second = re.sub(r"\b(qh|kh|vh|p|scores|masked|weights|heads)\b", r"\g<1>2", second)
    return with_numbers(f"g ({inputs}) => ({outputs}) {{ {first} \n {second} }}")


Y_SHAPE = f"float[b, s, {H}, {D}]"


def test_two_attentions_share_their_zero_and_no_name():
    lines = Parts(scores="masked = MatMul (qh, kh)").lines()
    before = twice(lines, lines.replace("y =", "z ="), f"{Y_SHAPE} y, {Y_SHAPE} z")
    before.graph.node[6].name, before.graph.node[7].name = "one", "one.Attention"
    after = fuse(before, 2)
    assert [node.name for node in after.graph.node] == ["one.Attention_2", "z.Attention"]
    assert list(initializers(after)) == ["onnx_bitnet.no_mask"]
    assert_same_results(before, after)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_attention_over_what_attention_made(name: str):
    scores = "p = MatMul (qh, kh) \n masked = Div (p, eight)"
    first = Parts(y=Y.replace("y =", "u ="), scores=scores).lines()
    before = twice(first, Parts(scores=scores).lines().replace(f"({name})", "(u)"), f"{Y_SHAPE} y")
    after = fuse(before, 2)
    assert ops(after) == ["Attention", "Attention"]
    assert list(after.graph.node[1].input)[:3] == ["u" if name == each else each for each in "qkv"]
    feeds = {
        each: numbers(B, S, H, D, seed=seed) for seed, each in enumerate("qkv")
    }  # as many rows as tokens
    assert_same_results(before, after, feeds)


@pytest.mark.parametrize("softmax", [SOFTMAX, GUARD], ids=["no guard", "guard"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_what_is_no_number_goes_as_far_as_in_the_graph(name: str, bad: float, softmax: str):
    before = Parts(mask="b, h, s, t", softmax=softmax).model()
    feeds = feeds_of(before)
    feeds[name][0, 1, 1] = bad
    (want,) = stock(before, feeds, optimize=False)
    after = fuse(before)
    for run in (with_library, stock, reference):
        with np.errstate(all="ignore"):
            (got,) = run(after, feeds)
        for is_so in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(is_so(got), is_so(want))
        finite = np.isfinite(want)
        assert_close(got[finite], want[finite])


@pytest.mark.parametrize("least", [-10000, np.finfo(np.float32).min])
def test_rows_whose_tokens_are_all_masked(least: float):
    before = Parts(mask="b, 1, s, t").model()
    feeds = feeds_of(before)
    feeds["mask"][:] = np.where(numbers(B, 1, S, T) > 0, 0, least)
    feeds["mask"][0, 0, :2] = least
    assert_same_results(before, fuse(before), feeds)


@pytest.mark.parametrize("parts", [Parts(), BY_HEAD], ids=["by token", "by head"])
def test_guarded_rows_whose_tokens_are_all_masked_are_zeros(parts: Parts):
    before = parts._replace(mask="b, 1, s, t", softmax=GUARD).model()
    feeds = feeds_of(before)
    feeds["mask"][:] = np.where(numbers(B, 1, S, T) > 0, 0, -np.inf)
    feeds["mask"][0, 0, :2] = -np.inf
    after = fuse(before)
    assert attributes(after.graph.node[0])["nan_to_zero"] == 1
    assert_same_results(before, after, feeds)
    (y,) = with_library(after, feeds)
    rows = y[0, :2] if parts != BY_HEAD else y[0, :, :2]
    np.testing.assert_array_equal(rows, 0)
    assert np.count_nonzero(y) > y.size / 2


@pytest.mark.parametrize("empty", ["b", "s", "t"])
def test_nothing_gives_nothing(empty: str):
    before = Parts().model()
    sizes = SIZES | {empty: 0}
    feeds = {
        value.name: np.ones(
            [sizes.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim], np.float32
        )
        for value in before.graph.input
    }
    (want,) = stock(before, feeds, optimize=False)
    for run in (with_library, stock):
        (got,) = run(fuse(before), feeds)
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("axis", [0, 2], ids=["batches", "heads"])
def test_a_name_of_a_size_does_not_say_that_another_is_no_wider(axis: int):
    """Onnxruntime puts y where z was if their sizes have the same names."""
    before = with_numbers(
        f"""g (float[a, s, c, {D}] z, float[a, s, c, {D}] q, float[b, t, h, {D}] k, float[b, t, h, {D}] v)
            => (float[n, m, o, e] out) {{
            {Parts(y=Y.replace("y =", "u ="), scores="masked = MatMul (qh, kh)").lines()}
            z1 = Sin (z)
            z2 = Neg (z1)
            u1 = Sin (u)
            u2 = Neg (u1)
            sums = ReduceMean <keepdims = 1> (z2)
            out = Add (u2, sums)
        }}"""
    )
    narrow = [B, S, H, D]
    narrow[axis] = 1
    feeds = {name: numbers(*narrow) for name in "zq"} | {name: numbers(B, T, H, D) for name in "kv"}
    assert_same_results(before, fuse(before), feeds)


def test_ranks_that_nothing_states():
    before = Parts(q=Q.replace("(q)", "(q2)"), more_inputs=", int64[4] shape").model()
    before.graph.node.insert(0, onnx.helper.make_node("Reshape", ["q", "shape"], ["q2"]))
    after = fuse(before)
    assert ops(after) == ["Reshape", "Attention"]
    assert_same_results(before, after, feeds_of(before) | {"shape": np.int64([B, S, H, D])})


def test_numbers_before_the_transposes_stay():
    half_q, half_k = (
        f"n = Mul (q, half) \n {Q.replace('(q)', '(n)')}",
        f"m = Mul (k, two) \n {K.replace('(k)', '(m)')}",
    )
    before = Parts(q=half_q, k=half_k).model()
    after = fuse(before)
    assert ops(after) == ["Mul", "Mul", "Attention"]
    assert_same_results(before, after)


def test_heads_that_something_else_reads_are_made_for_that():
    before = Parts(y=f"{Y} \n z = Relu (kh)", more_outputs=f", float[b, {H}, {D}, t] z").model()
    after = fuse(before)
    assert ops(after) == ["Transpose", "Attention", "Relu"]
    assert_same_results(before, after)


def test_attention_in_a_branch():
    lines = Parts(y=Y.replace("y =", "u ="), scores="p = MatMul (qh, kh) \n masked = Div (p, eight)").lines()
    before = with_numbers(
        f"""g (bool c, {Parts(scores="").inputs()}) => (float[b, s, {H}, {D}] y) {{
            y = If (c) <
                then_branch = t () => (float[b, s, {H}, {D}] u) {{ {lines} }},
                else_branch = e () => (float[b, s, {H}, {D}] w) {{ w = Identity (q) }}
            >
        }}"""
    )
    after = fuse(before)
    (branch,) = [a.g for a in after.graph.node[0].attribute if a.name == "then_branch"]
    assert [node.op_type for node in branch.node] == ["Attention"]
    assert [value.name for value in branch.output] == ["u"]
    assert [tensor.name for tensor in branch.initializer] == ["onnx_bitnet.no_mask"]
    assert_same_results(before, after)


def test_attention_in_a_branch_of_heads_from_outside():
    outside, inside = "\n".join((Q, K, V)), "\n".join((SCORES, SOFTMAX, HEADS, Y.replace("y =", "u =")))
    before = with_numbers(
        f"""g (bool c, {Parts().inputs()}) => (float[b, s, {H}, {D}] y) {{
            {outside}
            y = If (c) <
                then_branch = t () => (float[b, s, {H}, {D}] u) {{ {inside} }},
                else_branch = e () => (float[b, s, {H}, {D}] w) {{ w = Identity (q) }}
            >
        }}"""
    )
    after = fuse(before)
    assert ops(after) == ["If"]
    assert_same_results(before, after)


def test_heads_that_a_branch_turns():
    before = with_numbers(
        f"""g (bool c, {Parts().inputs()}) => (float[b, s, {H}, {D}] y) {{
            {Parts(y="").lines()}
            y = If (c) <
                then_branch = t () => (float[b, s, {H}, {D}] u) {{ {Y.replace("y =", "u =")} }},
                else_branch = e () => (float[b, s, {H}, {D}] w) {{ w = Identity (q) }}
            >
        }}"""
    )
    after = fuse(before)
    assert ops(after) == ["Attention", "Transpose", "If"]
    assert_same_results(before, after)


@pytest.mark.parametrize("mask", ["", "mask"], ids=["no mask", "mask"])
def test_attention_in_a_function(mask: str):
    """Types of its arguments are not known: here it casts them."""
    scores = "n = Constant <value = float {8.0}> () \n p = MatMul (qh, kh) \n "
    scores += "s = Div (p, n) \n masked = Add (s, m)" if mask else "masked = Div (p, n)"
    names = ["q", "k", "v", *([mask] if mask else [])]
    casts = "\n".join(f"{name[0]}_float = Cast <to = 1> ({name})" for name in names)
    body = Parts(scores=scores).lines().replace("m)", "m_float)")
    for name in "qkv":
        body = body.replace(f"({name})", f"({name}_float)")
    before = with_numbers(
        f"""g ({Parts(scores=mask).inputs()}) => (float[b, s, {H}, {D}] y) {{
            a = own.attend ({", ".join(names)})
            y = Relu (a)
        }}""",
        functions=f"""<domain: "own", opset_import: ["" : 18]>
            attend ({", ".join(names)}) => (y) {{ {casts} {body} }}""",
        domains=("own",),
    )
    after = fuse(before)
    called, body = after.functions
    assert (called.name, body.name) == ("Attention", "attend")
    assert [node.op_type for node in body.node if node.op_type not in ("Constant", "Cast")] == ["Attention"]
    assert {item.domain for item in body.opset_import} == {"", "onnx_bitnet"}
    assert_same_results(before, after)


# ---- In a conversion


@pytest.fixture
def lossy(tmp_path: Path) -> Path:
    onnx.save(bert(), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


@pytest.fixture
def exact(tmp_path: Path) -> Path:
    onnx.save(bert(ternary_weights=True), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


NOTE = "1 attention is one op each, in float32; attention 'keep' leaves the graph's own nodes"


def converted(source: Path, name: str, **recipe: object) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    report = bn.convert(source, source.with_name(name), bn.Recipe(**recipe))
    return onnx.load(source.with_name(name)), report.notes


@pytest.mark.parametrize("attention", ["auto", "fused"])
def test_a_lossy_conversion_fuses(lossy: Path, attention: str):
    model, notes = converted(lossy, "out.onnx", mode="ternary", attention=attention, activation_bits=32)
    onnx.checker.check_model(model, full_check=True)
    packed = ["MatMulI2S", "Reshape"]
    assert ops(model) == ["Sub", "Mul", "Unsqueeze", *packed * 3, "Attention", "Reshape", "MatMulI2S"]
    assert notes == (NOTE,)
    kept, notes = converted(lossy, "kept.onnx", mode="ternary", attention="keep", activation_bits=32)
    assert "Attention" not in [*ops(kept), *(function.name for function in kept.functions)]
    assert notes == ()
    (got,) = bn.session(lossy.with_name("out.onnx")).run(None, bert_feeds())
    (want,) = bn.session(lossy.with_name("kept.onnx")).run(None, bert_feeds())
    assert_close(got, want)
    (body,) = run_stock(lossy.with_name("out.onnx"), bert_feeds())
    assert_close(body, want)


def test_an_exact_conversion_fuses_only_when_told(exact: Path):
    for attention, count in (("auto", 0), ("keep", 0), ("fused", 1)):
        model, notes = converted(exact, f"{attention}.onnx", attention=attention)
        assert ops(model).count("MatMulI2S") == 4
        assert ops(model).count("Attention") == count
        assert notes == (NOTE,) * count


def test_the_note_counts(tmp_path: Path):
    lines = Parts().lines()
    onnx.save(twice(lines, lines.replace("y =", "z ="), f"{Y_SHAPE} y, {Y_SHAPE} z"), tmp_path / "in.onnx")
    model, notes = converted(tmp_path / "in.onnx", "out.onnx", attention="fused")
    assert ops(model) == ["Attention"] * 2
    assert notes[-1] == NOTE.replace("1 attention is", "2 attentions are")


def test_nothing_is_fused_by_itself_where_nothing_is_converted(lossy: Path):
    model, _ = converted(lossy, "out.onnx")
    assert ops(model) == ops(onnx.load(lossy))
    model, _ = converted(lossy, "fused.onnx", attention="fused")
    assert ops(model).count("Attention") == 1


def test_the_plan_says_the_same(lossy: Path):
    recipe = bn.Recipe(mode="ternary")
    plan, report = bn.plan(lossy, recipe), bn.convert(lossy, lossy.with_name("in.bitnet.onnx"), recipe)
    assert plan.notes == report.notes
    assert plan.output_bytes == report.output_bytes


def test_layers_of_one_op_and_attention(lossy: Path):
    model, _ = converted(lossy, "out.onnx", mode="ternary", fuse=True)
    assert ops(model)[3:] == ["MatMulI2S", "Split", *["Reshape"] * 3, "Attention", "Reshape", "MatMulI2S"]
    apart, _ = converted(lossy, "apart.onnx", mode="ternary")
    for one, other in zip(with_library(model, bert_feeds()), with_library(apart, bert_feeds()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_converted_file_stays_when_it_is_converted_again(lossy: Path):
    once, _ = converted(lossy, "once.onnx", mode="ternary", rules=[("out", "keep")])
    twice, notes = converted(lossy.with_name("once.onnx"), "twice.onnx", mode="ternary", attention="fused")
    assert not any("attention" in note for note in notes)
    assert ops(twice) == [*ops(once)[:-1], "MatMulI2S"]
    bodies = [{f.name: f for f in model.functions} for model in (once, twice)]
    assert bodies[0]["Attention"] == bodies[1]["Attention"]
    onnx.checker.check_model(twice, full_check=True)


def test_a_kept_attention_is_fused_when_it_is_converted_again(lossy: Path):
    converted(lossy, "once.onnx", mode="ternary", attention="keep")
    twice, _ = converted(lossy.with_name("once.onnx"), "twice.onnx", attention="fused")
    direct, _ = converted(lossy, "direct.onnx", mode="ternary")
    assert ops(twice) == ops(direct)
    (got,), (want,) = (with_library(model, bert_feeds()) for model in (twice, direct))
    np.testing.assert_array_equal(got, want)


def test_validate_still_compares_each_layer(lossy: Path):
    converted(lossy, "out.onnx", mode="ternary")
    result = bn.validate(lossy, lossy.with_name("out.onnx"), [bert_feeds()])
    assert sorted(layer.name for layer in result.layers) == ["key", "out", "query", "value"]
    for layer in result.layers:
        assert layer.local is not None
        assert layer.local.cosine is not None
        assert layer.local.cosine > 0.8


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_float_of_a_fused_file_is_plain(tmp_path: Path, opset: int):
    onnx.save(bert(opset), tmp_path / "in.onnx")
    converted(tmp_path / "in.onnx", "fused.onnx", mode="ternary", activation_bits=32)
    model, _ = converted(tmp_path / "fused.onnx", "float.onnx", target="float")
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions
    assert {item.domain for item in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    assert ops(model).count("Softmax") == 1
    (want,) = bn.session(tmp_path / "fused.onnx").run(None, bert_feeds())
    for run in (stock, reference):
        assert_close(run(model, bert_feeds())[0], want)


@pytest.mark.parametrize("target", ["ort", "simulate", "float"])
def test_other_targets_have_no_op(lossy: Path, target: str):
    with pytest.raises(RecipeError, match=f"target '{target}' has no ops of ours"):
        bn.Recipe(target=target, attention="fused")
    if target != "float":
        model, _ = converted(lossy, "out.onnx", mode="ternary", target=target)
        assert ops(model).count("Softmax") == 1


def test_attention_is_one_of_three_words():
    with pytest.raises(RecipeError, match="attention = 'fuse'"):
        bn.Recipe(attention="fuse")
