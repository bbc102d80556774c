"""Attention as one op: every spelling of it computes the same, and what is not whole stays as it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from chains import ternary
from rewrite.graphs import build, numbers
from rewrite.steps import initializers, ops, reference, stock, with_library
from written import run as run_stock

import onnx_bitnet as bn
from onnx_bitnet.errors import RecipeError
from onnx_bitnet.rewrite.attention import fuse_attention
from onnx_bitnet.rewrite.cleanup import cleanup
from onnx_bitnet.rewrite.replace import Shared

B, S, T, H, D = 2, 5, 7, 3, 4  # batch, rows of q, tokens of k and v, heads, width of a head
SIZES = {"b": B, "s": S, "t": T, "h": H, "d": D, "e": 6}

Q, K, V = (
    f"{name}h = Transpose <perm = [0, 2, {axes}]> ({name})"
    for name, axes in zip("qkv", ("1, 3", "3, 1", "1, 3"), strict=True)
)
SCORES = "p = MatMul (qh, kh) \n scores = Div (p, eight) \n masked = Add (scores, mask)"
SOFTMAX = "weights = Softmax <axis = -1> (masked)"
HEADS = "heads = MatMul (weights, vh)"
Y = "y = Transpose <perm = [0, 2, 1, 3]> (heads)"

NUMBERS = {
    "eight": np.float32(8),
    "eighth": np.float32([[[[0.125]]]]),
    "half": np.float32([0.5]),
    "two": np.float32(2),
    "four": np.float32([[4]]),
    "zero": np.float32(0),
    "huge": np.float32(1e30),
    "several": np.float32([1, 2, 3, 4, 5, 6, 7]),
    "heads3": np.float32([1, 2, 3]).reshape(3, 1, 1),
}


class Parts(NamedTuple):
    """The lines of a graph and the shapes of its inputs, in names of SIZES and numbers; no mask for ''."""

    q: str = Q
    k: str = K
    scores: str = SCORES
    softmax: str = SOFTMAX
    v: str = V
    heads: str = HEADS
    y: str = Y
    q_shape: str = "b, s, h, d"
    k_shape: str = "b, t, h, d"
    v_shape: str = "b, t, h, d"
    mask: str = "b, 1, 1, t"
    y_shape: str = "b, s, h, d"
    more_inputs: str = ""
    more_outputs: str = ""

    def lines(self) -> str:
        return "\n".join((self.q, self.k, self.scores, self.softmax, self.v, self.heads, self.y))

    def inputs(self, fixed: str = "hd") -> str:
        """Declare the inputs, with numbers for the sizes whose names are `fixed`."""
        shapes = {"q": self.q_shape, "k": self.k_shape, "v": self.v_shape}
        shapes |= {"mask": self.mask} if "mask" in words(self.lines()) else {}
        return (
            ", ".join(f"float[{with_sizes(shape, fixed)}] {name}" for name, shape in shapes.items())
            + self.more_inputs
        )

    def model(self, opset: int = 18, fixed: str = "hd") -> onnx.ModelProto:
        y = f"float[{with_sizes(self.y_shape, fixed)}] y{self.more_outputs}"
        return with_numbers(f"g ({self.inputs(fixed)}) => ({y}) {{ {self.lines()} }}", opset)


def with_sizes(shape: str, fixed: str) -> str:
    names = [name.strip() for name in shape.split(",")] if shape else []
    return ", ".join(str(SIZES[name]) if name in SIZES and name in fixed else name for name in names)


def words(graph: str) -> set[str]:
    return set(re.findall(r"\w+", graph))


def with_numbers(
    graph: str, opset: int = 18, functions: str = "", domains: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """Make a model with those of NUMBERS that its text names."""
    used = {name: np.asarray(NUMBERS[name]) for name in sorted(words(graph) & NUMBERS.keys())}
    return build(graph, used, opset=opset, functions=functions, domains=domains)


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnx_ir writes it: without empty fields."""
    result: onnx.ModelProto = ir.to_proto(ir.from_proto(model))
    return result


def fuse(before: onnx.ModelProto, count: int = 1) -> onnx.ModelProto:
    """Fuse `count` attentions; the argument stays as it is."""
    model = ir.from_proto(before)
    assert fuse_attention(model, Shared.of(model)) == count
    cleanup(model)
    after: onnx.ModelProto = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    return after


def feeds_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Numbers for every input that is no initializer."""
    stored = initializers(model)
    feeds = {}
    for seed, value in enumerate(value for value in model.graph.input if value.name not in stored):
        dims = value.type.tensor_type.shape.dim
        shape = [SIZES[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = (
            np.ones(shape, dtype) if dtype == np.bool_ else numbers(*shape, dtype=dtype, seed=seed)
        )
    return feeds


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-6) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def assert_same_results(
    before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray] | None = None
) -> None:
    """Compare results of our kernel, of stock onnxruntime and of onnx.reference with those of the graph."""
    feeds = feeds or feeds_of(before)
    want = stock(before, feeds, optimize=False)
    for run in (with_library, stock, reference):
        got = run(after, feeds)
        for one, other in zip(got, want, strict=True):
            assert_close(one, other)


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
    assert (node.domain, node.name) == ("onnx_bitnet", "context.Attention")
    assert (list(node.input), list(node.output)) == (["q4", "k4", "v4", "mask"], ["turned"])
    assert [(a.name, a.f) for a in node.attribute] == [("scale", 0.5)]
    kept = [node.SerializeToString() for node in plain(before).graph.node]
    for node in after.graph.node:
        assert node.op_type == "Attention" or node.SerializeToString() in kept
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert_same_results(before, after, bert_feeds())


@pytest.mark.parametrize("opset", [11, 12, 13, 18, 21])
@pytest.mark.parametrize("mask", ["", "b, 1, 1, t"], ids=["no mask", "mask"])
def test_bodies_of_all_opsets(mask: str, opset: int):
    parts = Parts(mask=mask, scores=SCORES if mask else "p = MatMul (qh, kh) \n masked = Div (p, eight)")
    before = parts.model(opset)
    after = fuse(before)
    assert ops(after) == ["Attention"]
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
    assert (node.input[3], node.attribute[0].f) == ("onnx_bitnet.no_mask", 1.0)
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
    before.graph.node[5].name, before.graph.node[0].name = "one", "one.Attention"
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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_what_is_no_number_goes_as_far_as_in_the_graph(name: str, bad: float):
    before = Parts(mask="b, h, s, t").model()
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


# ---- Its spellings


def product(scores: str) -> dict[str, str]:
    return {"scores": f"p = MatMul (qh, kh) \n {scores} \n masked = Add (scores, mask)"}


PERM = "Transpose <perm = "
SPELLINGS = {
    "a number's inverse": (product("scores = Mul (p, eighth)"), 0.125),
    "a number on the left": (product("scores = Mul (half, p)"), 0.5),
    "several numbers": (product("a = Div (p, two) \n c = Mul (four, a) \n scores = Mul (c, half)"), 1.0),
    "a number that a node holds": (
        product("c = Constant <value = float {0.25}> () \n scores = Mul (p, c)"),
        0.25,
    ),
    "a number that nodes compute": (product("c = Sqrt (four) \n scores = Div (p, c)"), 0.5),
    "the number nothing": (product("scores = Mul (p, zero)"), 0.0),
    "a number below zero": (product("c = Neg (half) \n scores = Mul (p, c)"), -0.5),
    "numbers on heads of q and k": (
        {
            "q": f"qn = {PERM}[0, 2, 1, 3]> (q) \n qh = Mul (qn, half)",
            "k": f"kn = {PERM}[0, 2, 3, 1]> (k) \n kh = Div (kn, four)",
        },
        0.5 / 4 / 8,
    ),
    "numbers between two Transposes": (
        {
            "q": f"qn = {PERM}[0, 2, 1, 3]> (q) \n qh = Mul (two, qn)",
            "k": f"k1 = {PERM}[0, 2, 1, 3]> (k) \n k2 = Mul (k1, half) \n kh = {PERM}[0, 1, 3, 2]> (k2)",
        },
        0.125,
    ),
    "k turned twice": ({"k": f"k1 = {PERM}[0, 2, 1, 3]> (k) \n kh = {PERM}[0, 1, 3, 2]> (k1)"}, 0.125),
    "k turned in an odd way": (
        {"k": f"k1 = {PERM}[3, 0, 1, 2]> (k) \n kh = {PERM}[1, 3, 0, 2]> (k1)"},
        0.125,
    ),
    "q and v turned twice": (
        {
            "q": f"q1 = {PERM}[0, 1, 3, 2]> (q) \n qh = {PERM}[0, 3, 1, 2]> (q1)",
            "v": f"v1 = {PERM}[2, 0, 1, 3]> (v) \n vh = {PERM}[1, 0, 2, 3]> (v1)",
        },
        0.125,
    ),
    "mask on the left": ({"scores": SCORES.replace("scores, mask", "mask, scores")}, 0.125),
    "no mask": ({"scores": "p = MatMul (qh, kh) \n masked = Div (p, eight)"}, 0.125),
    "no number": ({"scores": "p = MatMul (qh, kh) \n masked = Add (p, mask)"}, 1.0),
    "axis 3": ({"softmax": SOFTMAX.replace("-1", "3")}, 0.125),
    "no axis": ({"softmax": SOFTMAX.replace("<axis = -1>", "")}, 0.125),
    "mask by row": ({"mask": "1, 1, s, t"}, 0.125),
    "mask by head and row": ({"mask": "1, h, s, t"}, 0.125),
    "mask of all": ({"mask": "b, h, s, t"}, 0.125),
    "mask that is the same for all tokens": ({"mask": "b, h, s, 1"}, 0.125),
    "mask of rank 3": ({"mask": "h, 1, t"}, 0.125),
    "mask of rank 2": ({"mask": "s, t"}, 0.125),
    "mask of rank 1": ({"mask": "t"}, 0.125),
    "mask with more heads": (
        {f"{name}_shape": f"b, {n}, 1, d" for name, n in zip("qkv", "stt", strict=True)}
        | {"mask": "1, h, s, t"},
        0.125,
    ),
    "mask with more batches": (
        {f"{name}_shape": f"1, {n}, h, d" for name, n in zip("qkv", "stt", strict=True)},
        0.125,
    ),
    "another width of v": ({"v_shape": "b, t, h, e", "y_shape": "b, s, h, e"}, 0.125),
    "a single row": ({"q_shape": "b, 1, h, d", "y_shape": "b, 1, h, d"}, 0.125),
    "a single token": ({"k_shape": "b, 1, h, d", "v_shape": "b, 1, h, d", "mask": "b, 1, s, 1"}, 0.125),
    "one head": ({f"{name}_shape": f"b, {n}, 1, d" for name, n in zip("qkvy", "stts", strict=True)}, 0.125),
    "one head of k and v for all of q": ({"k_shape": "b, t, 1, d", "v_shape": "b, t, 1, d"}, 0.125),
    "one head of k for all": ({"k_shape": "b, t, 1, d"}, 0.125),
    "one head of v for all": ({"v_shape": "b, t, 1, d"}, 0.125),
    "one head of q for all of k and v": ({"q_shape": "b, s, 1, d"}, 0.125),
    "one q for all of a batch": ({"q_shape": "1, s, h, d"}, 0.125),
    "one k and v for all of a batch": ({"k_shape": "1, t, h, d", "v_shape": "1, t, h, d"}, 0.125),
}


@pytest.mark.parametrize("fixed", ["hd", "bsthde", ""], ids=["some sizes", "all sizes", "no sizes"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_fused(name: str, fixed: str):
    parts, scale = SPELLINGS[name]
    before = Parts(**parts).model(fixed=fixed)
    after = fuse(before)
    assert ops(after) == ["Attention"]
    (node,) = after.graph.node
    assert list(node.input)[:3] == ["q", "k", "v"]
    assert node.attribute[0].f == pytest.approx(scale, rel=1e-6)
    assert_same_results(before, after)


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


# ---- What stays

REFUSED = {
    "scores are an output": {"more_outputs": ", float[b, 3, s, t] masked"},
    "the product is an output": {"more_outputs": ", float[b, 3, s, t] p"},
    "weights are an output": {"more_outputs": ", float[b, 3, s, t] weights"},
    "heads are an output": {"more_outputs": ", float[b, 3, s, 4] heads"},
    "scores are read": {"y": f"{Y} \n z = Relu (masked)", "more_outputs": ", float[b, 3, s, t] z"},
    "the product is read": {"y": f"{Y} \n z = Relu (p)", "more_outputs": ", float[b, 3, s, t] z"},
    "weights are read": {"y": f"{Y} \n z = Relu (weights)", "more_outputs": ", float[b, 3, s, t] z"},
    "heads are read": {"y": f"{Y} \n z = Relu (heads)", "more_outputs": ", float[b, 3, s, 4] z"},
    "heads are turned twice": {
        "y": f"{Y} \n z = {PERM}[0, 2, 1, 3]> (heads)",
        "more_outputs": ", float[b, s, 3, 4] z",
    },
    "Softmax over rows": {"softmax": SOFTMAX.replace("-1", "2")},
    "LogSoftmax": {"softmax": SOFTMAX.replace("Softmax", "LogSoftmax")},
    "a number that is an input": {**product("scores = Div (p, n)"), "more_inputs": ", float n"},
    "a number for each token": product("scores = Mul (p, several)"),
    "a number for each head": product("scores = Mul (p, heads3)"),
    "a number over scores": product("scores = Div (two, p)"),
    "a number beyond float32": product("a = Mul (p, huge) \n scores = Mul (a, huge)"),
    "a division by nothing": product("scores = Div (p, zero)"),
    "a number on v": {"v": f"{Q.replace('q', 'v').replace('vh', 'vn')} \n vh = Mul (vn, half)"},
    "a number on weights": {
        "softmax": f"{SOFTMAX.replace('weights =', 'w =')} \n weights = Mul (w, half)",
    },
    "a number on scores and mask": {
        "scores": "p = MatMul (qh, kh) \n added = Add (p, mask) \n masked = Div (added, eight)",
    },
    "mask is subtracted": {"scores": SCORES.replace("Add", "Sub")},
    "two masks": {
        "scores": "p = MatMul (qh, kh) \n scores = Add (p, other) \n masked = Add (scores, mask)",
        "more_inputs": ", float[s, t] other",
    },
    "a Where": {
        "scores": f"{SCORES.replace('masked', 'added')} \n masked = Where (c, added, zero)",
        "more_inputs": ", bool[s, t] c",
    },
    "a product with itself": {"heads": "heads = MatMul (weights, weights)", "v_shape": "b, t, h, t"},
    "the sides of the product changed": {"heads": "wt = Transpose (weights) \n heads = MatMul (vh, wt)"},
    "q not turned": {"q": "qh = Identity (q)", "q_shape": "b, h, s, d"},
    "k not turned to be multiplied with": {
        "k": f"kh = {PERM}[0, 2, 1, 3]> (k)",
        "k_shape": "b, d, h, t",
    },
    "v not turned": {"v": "vh = Identity (v)", "v_shape": "b, h, t, d"},
    "y turned otherwise": {"y": Y.replace("0, 2, 1, 3", "2, 0, 1, 3"), "y_shape": "s, b, h, d"},
    "y not turned": {"y": "y = Relu (heads)", "y_shape": "b, h, s, d"},
    "q turned otherwise": {"q": f"qh = {PERM}[2, 1, 0, 3]> (q)", "q_shape": "s, h, b, d"},
    "a Transpose without perm": {"q": "qh = Transpose (q)", "q_shape": "d, s, h, b"},
}


def refused(before: onnx.ModelProto) -> None:
    model = ir.from_proto(before)
    assert fuse_attention(model, Shared.of(model)) == 0
    cleanup(model)
    assert ir.to_proto(model) == plain(before)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_whole_stays(name: str):
    refused(Parts(**REFUSED[name]).model())


@pytest.mark.parametrize("opset", [11, 12])
def test_softmax_without_axis_was_another_before_opset_13(opset: int):
    parts = Parts(softmax=SOFTMAX.replace("<axis = -1>", ""))
    refused(parts.model(opset))
    fuse(parts.model(13))


@pytest.mark.parametrize("opset", [9, 10])
def test_opsets_without_bodies(opset: int):
    refused(Parts().model(opset))


@pytest.mark.parametrize("dtype", ["float16", "double", "bfloat16"])
def test_other_types(dtype: str):
    before = Parts().model()
    text = (
        onnx.printer.to_text(before).replace("float[", f"{dtype}[").replace("float eight", f"{dtype} eight")
    )
    refused(onnx.parser.parse_model(text))


@pytest.mark.parametrize(
    "shapes",
    [
        {"q_shape": "b, 1, h, d", "mask": "1, 1, s, t"},
        {"k_shape": "b, 1, h, d", "v_shape": "b, t, h, d", "mask": "t"},
    ],
    ids=["rows", "tokens"],
)
def test_mask_with_more_than_the_scores_have(shapes: dict[str, str]):
    refused(Parts(**shapes).model(fixed="bsthd"))


def test_mask_of_rank_5():
    refused(Parts(mask="1, 1, 1, 1, t", y_shape="n, m, s, h, d").model())


def test_the_opset_of_a_function_counts():
    """Its default axis of Softmax is that of its own opset."""
    scores = "p = MatMul (qh, kh) \n masked = Add (p, mask)"
    lines = Parts(softmax=SOFTMAX.replace("<axis = -1>", ""), scores=scores).lines()
    before = with_numbers(
        f"g ({Parts().inputs()}) => (float[b, s, {H}, {D}] y) {{ y = own.attend (q, k, v, mask) }}",
        functions=f"""<domain: "own", opset_import: ["" : 11]>
            attend (q, k, v, mask) => (y) <float q, float k, float v, float mask> {{ {lines} }}""",
        domains=("own",),
    )
    refused(before)


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
