"""What is recognised as an attention: every spelling computes the same, what is not whole stays as it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from rewrite.attentions import (
    BY_HEAD,
    GUARD,
    HEADS,
    SCORES,
    SOFTMAX,
    B,
    D,
    H,
    Parts,
    Q,
    T,
    V,
    Y,
    assert_same_results,
    attributes,
    feeds_of,
    fuse,
    refused,
    with_numbers,
    words,
)
from rewrite.steps import ops

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
    "a number that is added": ({"scores": SCORES.replace("mask)", "half)")}, 0.125),
    "a product for a mask": (
        {
            "scores": f"m = MatMul (mask, w) \n {SCORES.replace('mask)', 'm)')}",
            "more_inputs": ", float[t, t] w",
        },
        0.125,
    ),
    "a product for a mask, on the left": (
        {
            "scores": f"m = MatMul (mask, w) \n {SCORES.replace('scores, mask', 'm, scores')}",
            "more_inputs": ", float[t, t] w",
        },
        0.125,
    ),
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
    *mask, op = ops(after)
    assert op == "Attention"
    assert mask == ["MatMul"] * name.startswith("a product")
    node = after.graph.node[-1]
    assert list(node.input)[:3] == ["q", "k", "v"]
    assert attributes(node) == {"scale": pytest.approx(scale, rel=1e-6), "nan_to_zero": 0}
    assert_same_results(before, after)


# ---- What follows Softmax

BEHIND_SOFTMAX = {
    "a guard": (GUARD, 1),
    "a guard by a zero of rank 4": (GUARD.replace("zero", "zeros"), 1),
    "a guard by a zero of a node": (
        f"n = Constant <value = float {{-0.0}}> () \n {GUARD.replace('zero', 'n')}",
        1,
    ),
    "two guards": (f"{GUARD.replace('weights', 'u')} \n n2 = IsNaN (u) \n weights = Where (n2, zero, u)", 1),
    "a Cast": (f"{SOFTMAX.replace('weights', 'w')} \n weights = Cast <to = 1> (w)", 0),
    "an Identity": (f"{SOFTMAX.replace('weights', 'w')} \n weights = Identity (w)", 0),
    "a Cast before the guard": (
        GUARD.replace("w =", "u =").replace("nan =", "w = Cast <to = 1> (u) \n nan ="),
        1,
    ),
    "Identity and Cast behind the guard": (
        f"{GUARD.replace('weights', 'u')} \n i = Identity (u) \n weights = Cast <to = 1> (i)",
        1,
    ),
}


@pytest.mark.parametrize("parts", [Parts(), BY_HEAD], ids=["by token", "by head"])
@pytest.mark.parametrize("name", BEHIND_SOFTMAX)
def test_what_follows_softmax_is_in_the_op(name: str, parts: Parts):
    softmax, guard = BEHIND_SOFTMAX[name]
    before = parts._replace(softmax=softmax).model()
    after = fuse(before)
    (node,) = after.graph.node
    assert attributes(node) == {"scale": 0.125, "nan_to_zero": guard}
    assert_same_results(before, after)


# ---- Several masks

OTHERS = ("s, t] other", "h, 1, 1] third", "b, 1, s, 1] fourth", "t] fifth")
MASKS = {
    "two": (2, "masked = Add (m1, other)"),
    "two, on the left": (2, "masked = Add (other, m1)"),
    "three": (3, "m2 = Add (m1, other) \n masked = Add (third, m2)"),
    "four": (4, "m2 = Add (m1, other) \n m3 = Add (third, m2) \n masked = Add (m3, fourth)"),
    "one twice": (2, "masked = Add (m1, mask)"),
    "a sum of two": (2, "m2 = Add (third, other) \n masked = Add (m1, m2)"),
}
FIVE = "m2 = Add (m1, other) \n m3 = Add (m2, third) \n m4 = Add (fourth, m3) \n masked = Add (m4, fifth)"


def with_masks(lines: str, parts: Parts) -> Parts:
    """To m1, the scores with one mask, others are added."""
    scores = f"{parts.scores.replace('masked =', 'm1 =')} \n {lines}"
    used = [f", float[{other}" for other in OTHERS if other.split()[-1] in words(scores)]
    return parts._replace(scores=scores, more_inputs="".join(used))


@pytest.mark.parametrize("parts", [Parts(), BY_HEAD], ids=["by token", "by head"])
@pytest.mark.parametrize("name", MASKS)
def test_several_masks_are_added(name: str, parts: Parts):
    count, lines = MASKS[name]
    before = with_masks(lines, parts).model()
    after = fuse(before)
    *adds, op = ops(after)
    assert adds[-count + 1 :] == ["Add"] * (count - 1)
    assert op in ("Attention", "AttentionByHead")
    assert_same_results(before, after)
    feeds = feeds_of(before)
    least = np.finfo(np.float32).min
    feeds["mask"][1, ..., 2:] = least
    feeds |= {"other": np.where(feeds["other"] > 1, least, feeds["other"])} if "other" in feeds else {}
    assert_same_results(before, after, feeds)


def test_sums_of_masks_have_names_of_their_own():
    before = with_masks("masked = Add (m1, other)", Parts()).model()
    before.graph.node[0].name = before.graph.node[0].output[0] = "y.Attention.mask"
    before.graph.node[2].input[0] = "y.Attention.mask"
    before.graph.output.append(onnx.helper.make_tensor_value_info("y.Attention.mask", 1, ["b", H, "s", D]))
    after = fuse(before)
    assert [node.name for node in after.graph.node] == [
        "y.Attention.mask",
        "y.Attention.mask_2",
        "y.Attention",
    ]
    assert_same_results(before, after)


# ---- Masks that hide scores

HIDDEN = {
    "by the least number": ("masked = Where (c, lowest, scores)", []),
    "by minus infinity": ("masked = Where (c, nothing, scores)", []),
    "by a number of rank 4": ("masked = Where (c, lowest4, scores)", []),
    "but where the condition holds": ("masked = Where (c, scores, lowest)", []),
    "and masked before": ("m1 = Add (scores, mask) \n masked = Where (c, lowest, m1)", []),
    "and masked behind": ("m1 = Where (c, lowest, scores) \n masked = Add (mask, m1)", ["Add"]),
    "twice": ("m1 = Where (c, lowest, scores) \n masked = Where (e, m1, nothing)", ["Where"]),
    "in the shape of scores": (
        "z = Shape (scores) \n ce = Expand (c, z) \n masked = Where (ce, lowest, scores)",
        [],
    ),
    "made a truth in the shape of scores": (
        "ci = Cast <to = 7> (c) \n z = Shape (scores) \n ce = Expand (ci, z) \n cb = Cast <to = 9> (ce) \n "
        "masked = Where (cb, lowest, scores)",
        ["Cast"],
    ),
}


@pytest.mark.parametrize("parts", [Parts(), BY_HEAD], ids=["by token", "by head"])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_scores(name: str, parts: Parts):
    lines, more = HIDDEN[name]
    before = with_conditions(lines, parts).model()
    after = fuse(before)
    *mask, op = ops(after)
    assert sorted(mask) == sorted([*["Cast"] * ("Cast" in lines), "Where", *more])
    assert op in ("Attention", "AttentionByHead")
    feeds = feeds_of(before)
    hides = "c, scores" not in lines
    for scale in (1, 1000):  # of scores: none is so large that it would show beside the number
        feeds["q"] = feeds["q"] * np.float32(scale)
        feeds["c"][:] = not hides
        feeds["c"][1, ..., 4:] = hides  # some tokens of one text
        assert_same_results(before, after, feeds)
        feeds["c"][1, ..., 2, :] = (
            hides  # and all of one row, which takes the mean of v if the number is finite
        )
        if "nothing" not in lines:
            assert_same_results(before, after, feeds)


def with_conditions(lines: str, parts: Parts) -> Parts:
    """Where masks by the conditions c and e, in the place of the sum with a mask."""
    product, scaled, _ = (line.strip() for line in parts.scores.split("\n"))
    inputs = [f", bool[{shape}" for shape in ("b, 1, s, t] c", "s, t] e") if shape[-1] in words(lines)]
    return parts._replace(scores=f"{product} \n {scaled} \n {lines}", more_inputs="".join(inputs))


def test_a_condition_in_a_shape_that_is_stated_as_that_of_scores():
    """As torch's newer exporter writes it: what makes the shape is nothing that attention reads."""
    lines = "z = Shape (other) \n ce = Expand (c, z) \n masked = Where (ce, lowest, scores)"
    parts = with_conditions(lines, Parts())
    parts = parts._replace(more_inputs=f"{parts.more_inputs}, float[b, {H}, s, t] other")
    alike = f"bool[b, {H}, s, t] ce, float[b, {H}, s, t] scores"
    before = parts._replace(stated=alike).model()
    assert ops(fuse(before)) == ["Where", "Attention"]
    assert_same_results(before, fuse(before))
    for stated in ("", alike.replace("s, t] ce", "s, u] ce")):
        before = parts._replace(stated=stated).model()
        assert ops(fuse(before)) == ["Shape", "Expand", "Where", "Attention"]


# ---- Heads of y that something else reads

Z = ", float[b, 3, s, 4] z"
HEADS_READ = {
    "an output": ({"more_outputs": Z.replace("z", "heads")}, ["Transpose"]),
    "read": ({"y": f"{Y} \n z = Relu (heads)", "more_outputs": Z}, ["Transpose", "Relu"]),
    "turned twice": (
        {"y": f"{Y} \n z = {PERM}[0, 2, 1, 3]> (heads)", "more_outputs": ", float[b, s, 3, 4] z"},
        ["Transpose", "Transpose"],
    ),
    "turned otherwise": (
        {"y": Y.replace("0, 2, 1, 3", "2, 0, 1, 3"), "y_shape": "s, b, h, d"},
        ["Transpose"],
    ),
    "turned without perm": ({"y": "y = Transpose (heads)", "y_shape": "d, s, h, b"}, ["Transpose"]),
    "not turned": ({"y": "y = Relu (heads)", "y_shape": "b, h, s, d"}, ["Relu"]),
    "y": ({"heads": HEADS.replace("heads =", "y ="), "y": "", "y_shape": "b, h, s, d"}, []),
}


@pytest.mark.parametrize("softmax", [SOFTMAX, GUARD], ids=["no guard", "guard"])
@pytest.mark.parametrize("name", HEADS_READ)
def test_heads_of_y_are_made_where_something_reads_them(name: str, softmax: str):
    parts, readers = HEADS_READ[name]
    before = Parts(**parts)._replace(softmax=softmax).model()
    after = fuse(before)
    assert ops(after) == ["Attention", "Transpose", *readers]
    assert list(after.graph.node[1].output) == ["y" if name == "y" else "heads"]
    assert list(after.graph.output) == list(before.graph.output)
    assert_same_results(before, after)


# ---- Heads of q, k and v that no Transpose makes

KT = f"kh = {PERM}[0, 1, 3, 2]> (k1)"
K1 = f"k1 = {PERM}[0, 2, 1, 3]> (k)"
V_AS_IT_IS = {"v": "", "heads": "heads = MatMul (weights, v)", "v_shape": "b, h, t, d"}


def rotary(x: str, y: str) -> str:
    """Positions by rotation, as far as it matters here."""
    return f"{y}1 = Neg ({x}) \n {y}2 = Mul ({y}1, two) \n {y}3 = Mul ({x}, half) \n {y} = Add ({y}2, {y}3)"


ROTARY_Q = f"{Q.replace('qh', 'q0')} \n {rotary('q0', 'qh')}"
ROTARY_K = f"{K1.replace('k1', 'k0')} \n {rotary('k0', 'k1')} \n {KT}"
QH, VH = f"float[b, {H}, s, {D}] qh", f"float[b, {H}, t, {D}] vh"
AS_THEY_ARE = {
    "all": (BY_HEAD, "q k v", 0.125),
    "all but y": (
        BY_HEAD._replace(heads="heads = MatMul (weights, v)", y=Y, y_shape="b, s, h, d"),
        "q k v",
        0.125,
    ),
    "no mask": (BY_HEAD._replace(scores="masked = MatMul (q, kh)"), "q k v", 1.0),
    "numbers": (
        BY_HEAD._replace(
            q="qh = Mul (q, half)",
            k=f"k1 = Mul (k, two) \n {KT.replace('kh', 'k2')} \n kh = Div (k2, four)",
            scores=SCORES,
        ),
        "q k1 v",
        0.5 / 4 / 8,
    ),
    "rotary positions": (Parts(q=ROTARY_Q, k=ROTARY_K, stated=QH), "qh k1 vh", 0.125),
    "rotary positions of k": (Parts(k=ROTARY_K), "qh k1 vh", 0.125),
    "rotary positions of q": (Parts(q=ROTARY_Q, k=f"{K1} \n {KT}", stated=QH), "qh k1 vh", 0.125),
    "v": (Parts(k=f"{K1} \n {KT}", **V_AS_IT_IS), "qh k1 v", 0.125),
    "a number on v": (
        Parts(k=f"{K1} \n {KT}", v=f"{V.replace('vh', 'v1')} \n vh = Mul (v1, half)", stated=VH),
        "qh k1 vh",
        0.125,
    ),
    "another width of v": (BY_HEAD._replace(v_shape="b, h, t, e", y_shape="b, h, s, e"), "q k v", 0.125),
    "one head of k and v": (BY_HEAD._replace(k_shape="b, 1, t, d", v_shape="b, 1, t, d"), "q k v", 0.125),
    "one q for all of a batch": (BY_HEAD._replace(q_shape="1, h, s, d"), "q k v", 0.125),
    "mask of all": (BY_HEAD._replace(mask="b, h, s, t"), "q k v", 0.125),
}


@pytest.mark.parametrize("fixed", ["hd", "bsthde"], ids=["some sizes", "all sizes"])
@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_heads_are_taken_as_they_are(name: str, fixed: str):
    parts, inputs, scale = AS_THEY_ARE[name]
    before = parts.model(fixed=fixed)
    after = fuse(before)
    assert [function.name for function in after.functions] == ["AttentionByHead"]
    assert not {"MatMul", "Softmax"} & set(ops(after))
    (node,) = [node for node in after.graph.node if node.op_type == "AttentionByHead"]
    assert list(node.input)[:3] == inputs.split()
    assert attributes(node) == {"scale": pytest.approx(scale, rel=1e-6), "nan_to_zero": 0}
    assert_same_results(before, after)


HELD = "\n".join(
    f"{name} = Constant <value = float {{{number}}}> ()"
    for name, number in {"eight": 8, "half": 0.5, "two": 2}.items()
)
INFERRED = {
    "q": Parts(q=ROTARY_Q, k=ROTARY_K),
    "v": Parts(k=ROTARY_K, v=f"{V.replace('vh', 'v1')} \n vh = Relu (v1)"),
    "a number on v": Parts(k=f"{K1} \n {KT}", v=f"{V.replace('vh', 'vn')} \n vh = Mul (vn, half)"),
    "q not turned": Parts(k=f"{K1} \n {KT}", q="qh = Identity (q)", q_shape="b, h, s, d"),
    "v not turned": Parts(k=f"{K1} \n {KT}", v="vh = Identity (v)", v_shape="b, h, t, d"),
    "q turned without perm": Parts(k=f"{K1} \n {KT}", q="qh = Transpose (q)", q_shape="d, s, h, b"),
}


@pytest.mark.parametrize("name", INFERRED)
def test_ranks_of_heads_are_inferred(name: str):
    before = INFERRED[name].model()
    after = fuse(before)
    assert [function.name for function in after.functions] == ["AttentionByHead"]
    assert_same_results(before, after)


@pytest.mark.parametrize("name", INFERRED)
def test_heads_of_unknown_rank_stay(name: str):
    """Nothing is inferred of the body of a function, which is called with any rank."""
    parts = INFERRED[name]
    refused(called(parts, f"{HELD} {parts.lines()}"))


def called(parts: Parts, lines: str, opset: int = 18) -> onnx.ModelProto:
    """Put lines into a function, which is called with the inputs of parts."""
    return with_numbers(
        f"g ({parts.inputs()}) => (float[b, s, {H}, {D}] y) {{ y = own.attend (q, k, v, mask) }}",
        functions=f"""<domain: "own", opset_import: ["" : {opset}]>
            attend (q, k, v, mask) => (y) <float q, float k, float v, float mask> {{ {lines} }}""",
        domains=("own",),
    )


# ---- K turned by way of three axes

TORCH = """
    shape = Shape (k1)
    last = Slice (shape, minus_1, most)
    middle = Slice (shape, minus_2, minus_1)
    first = Slice (shape, least, minus_2)
    flat_shape = Concat <axis = 0> (minus_1, middle, last)
    back_shape = Concat <axis = 0> (first, last, middle)"""
ONE_BY_ONE = """
    shape = Shape (k1)
    i0 = Constant <value = int64 {0}> ()
    i1 = Constant <value = int64[1] {1}> ()
    i3 = Constant <value = int64 {-1}> ()
    axis = Constant <value = int64[1] {0}> ()
    b0 = Gather (shape, i0)
    batch = Unsqueeze (b0, axis)
    head = Gather <axis = 0> (shape, i1)
    row = Shape <start = 2, end = 3> (k1)
    w0 = Gather (shape, i3)
    width = Unsqueeze (w0, axis)
    flat_shape = Concat <axis = 0> (minus_1, row, width)
    back_shape = Concat <axis = 0> (batch, head, width, row)"""
STATED = f"float[b, {H}, t, {D}] k1"  # as torch states shapes
KNOWN = f"float[{B}, {H}, {T}, {D}] k1"


def constants(flat: str, back: str) -> str:
    lines = f"flat_shape = Constant <value = int64[3] {{{flat}}}> () \n "
    return lines + f"back_shape = Constant <value = int64[4] {{{back}}}> ()"


def detour(shapes: str, k1: str = K1, turned: str = "kt = Transpose <perm = [0, 2, 1]> (k3)") -> str:
    return f"{k1} \n {shapes} \n k3 = Reshape (k1, flat_shape) \n {turned} \n kh = Reshape (kt, back_shape)"


RIGHT = constants(f"-1, {T}, {D}", f"{B}, {H}, {D}, {T}")
MIXED = f"c = Constant <value = int64[1] {{{D}}}> () \n {TORCH.replace('first, last', 'first, c')}"
AS_K_IS = detour(TORCH.replace("k1", "k"), "").replace("(k1, flat_shape)", "(k, flat_shape)")
ROOTS = {
    "q": f"{Q.replace('qh', 'q1')} \n qh = Mul (q1, half)",
    "k": f"{detour(TORCH).replace('kh', 'k5')} \n kh = Mul (k5, half)",
}
DETOURS = {
    "as torch writes it": (Parts(k=detour(TORCH), stated=STATED), "Attention", 0.125),
    "with roots of the number": (
        Parts(**ROOTS, scores="masked = MatMul (qh, kh)", stated=STATED),
        "Attention",
        0.25,
    ),
    "entries one by one": (Parts(k=detour(ONE_BY_ONE), stated=STATED), "Attention", 0.125),
    "constants": (Parts(k=detour(RIGHT), stated=KNOWN), "Attention", 0.125),
    "constants, batches times heads": (
        Parts(k=detour(RIGHT.replace("-1", str(B * H))), stated=KNOWN),
        "Attention",
        0.125,
    ),
    "one constant": (Parts(k=detour(MIXED), stated=STATED), "Attention", 0.125),
    "heads as they are": (BY_HEAD._replace(k=AS_K_IS), "AttentionByHead", 0.125),
    "rotary positions": (
        Parts(k=detour(TORCH, ROTARY_K.replace(KT, "")), stated=STATED),
        "AttentionByHead",
        0.125,
    ),
}


@pytest.mark.parametrize("fixed", ["hd", "bsthde"], ids=["some sizes", "all sizes"])
@pytest.mark.parametrize("name", DETOURS)
def test_k_turned_by_way_of_three_axes(name: str, fixed: str):
    parts, op_type, scale = DETOURS[name]
    before = parts.model(fixed=fixed)
    after = fuse(before)
    assert {"Shape", "Slice", "Reshape", "Concat", "MatMul", "Softmax"}.isdisjoint(ops(after))
    assert [function.name for function in after.functions] == [op_type]
    (node,) = [node for node in after.graph.node if node.op_type == op_type]
    assert attributes(node) == {"scale": pytest.approx(scale, rel=1e-6), "nan_to_zero": 0}
    assert_same_results(before, after)


def changed(one: str, other: str, shapes: str = TORCH) -> str:
    assert shapes.count(one) == 1
    return detour(shapes.replace(one, other))


WRONG = {
    "rows and width in the first": changed("minus_1, middle, last", "minus_1, last, middle"),
    "rows and width in the second": changed("first, last, middle", "first, middle, last"),
    "batches and heads": changed("(batch, head", "(head, batch", ONE_BY_ONE),
    "heads twice": changed("(batch, head", "(head, head", ONE_BY_ONE),
    "five entries": changed("first, last, middle", "first, minus_1, last, middle"),
    "an entry that is inferred": changed("(batch, head", "(batch, minus_1", ONE_BY_ONE),
    "an entry that is computed": changed("back_shape =", "m = Mul (middle, two_i) \n back_shape =").replace(
        "last, middle)", "last, m)"
    ),
    "an entry that is an input": changed("first, last", "first, n"),
    "the shape of k before": changed("Shape (k1)", "Shape (k)"),
    "the shape of something alike": changed("shape = Shape (k1)", "k2 = Neg (k1) \n shape = Shape (k2)"),
    "another row": detour(RIGHT.replace(f"-1, {T}", f"-1, {2 * T}")),
    "constants for batches and heads": detour(RIGHT.replace(f"{B}, {H}", f"{H}, {B}")),
    "constants for rows and width": detour(RIGHT.replace(f"{D}, {T}", f"{T}, {D}")),
    "a constant -1": detour(RIGHT.replace(f"{H}, {D}", f"-1, {D}")),
    "no Transpose": detour(TORCH, turned="kt = Identity (k3)"),
    "another Transpose": detour(TORCH, turned=f"kt = {PERM}[0, 1, 2]> (k3)"),
    "Transpose without perm": detour(TORCH, turned="kt = Transpose (k3)"),
    "no three axes": detour(TORCH, turned=f"k5 = Neg (k3) \n kt = {PERM}[0, 2, 1]> (k5)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_k_turned_by_way_of_other_shapes_stays(name: str):
    refused(Parts(k=WRONG[name], stated=KNOWN, more_inputs=", int64[1] n").model())


def test_constants_that_no_known_shape_proves_stay():
    refused(Parts(k=detour(RIGHT)).model())
    refused(Parts(k=detour(RIGHT), stated=STATED).model())
    refused(Parts(k=detour(MIXED), stated=STATED.replace(str(D), "d")).model(fixed="h"))


def test_heads_of_k_of_unknown_rank_stay():
    k = detour(TORCH, ROTARY_K.replace(KT, ""))
    refused(Parts(k=k).model())
    fuse(Parts(k=k, stated=STATED).model())


# ---- What stays

THROUGH = "w = Softmax <axis = -1> (masked) \n c = Cast <to = type> (w) \n weights = Cast <to = 1> (c)"
REFUSED = {
    "scores are an output": {"more_outputs": ", float[b, 3, s, t] masked"},
    "the product is an output": {"more_outputs": ", float[b, 3, s, t] p"},
    "weights are an output": {"more_outputs": ", float[b, 3, s, t] weights"},
    "scores are read": {"y": f"{Y} \n z = Relu (masked)", "more_outputs": ", float[b, 3, s, t] z"},
    "the product is read": {"y": f"{Y} \n z = Relu (p)", "more_outputs": ", float[b, 3, s, t] z"},
    "weights are read": {"y": f"{Y} \n z = Relu (weights)", "more_outputs": ", float[b, 3, s, t] z"},
    "Softmax over rows": {"softmax": SOFTMAX.replace("-1", "2")},
    "LogSoftmax": {"softmax": SOFTMAX.replace("Softmax", "LogSoftmax")},
    "a number that is an input": {**product("scores = Div (p, n)"), "more_inputs": ", float n"},
    "a number for each token": product("scores = Mul (p, several)"),
    "a number for each head": product("scores = Mul (p, heads3)"),
    "a number over scores": product("scores = Div (two, p)"),
    "a number beyond float32": product("a = Mul (p, huge) \n scores = Mul (a, huge)"),
    "a division by nothing": product("scores = Div (p, zero)"),
    "a number on weights": {
        "softmax": f"{SOFTMAX.replace('weights =', 'w =')} \n weights = Mul (w, half)",
    },
    "a number on scores and mask": {
        "scores": "p = MatMul (qh, kh) \n added = Add (p, mask) \n masked = Div (added, eight)",
    },
    "mask is subtracted": {"scores": SCORES.replace("Add", "Sub")},
    **{
        f"a Where {name}": {
            "scores": f"{SCORES.replace('masked', 'added')} \n masked = Where ({operands})",
            "more_inputs": ", bool[s, t] c, float n",
        }
        for name, operands in {
            "that puts zeros": "c, added, zero",
            "whose number leaves scores beside it": "c, minus_1e9, added",
            "that puts the largest": "c, huge, added",
            "that puts an input": "c, added, n",
            "that puts several numbers": "c, added, several",
            "of scores on both sides": "c, added, added",
        }.items()
    },
    "a shape of scores that something else reads": {
        "scores": with_conditions(HIDDEN["in the shape of scores"][0], Parts()).scores,
        "more_inputs": ", bool[b, 1, s, t] c",
        "more_outputs": ", int64[4] z",
    },
    "scores on themselves": {"scores": "p = MatMul (qh, kh) \n masked = Add (p, p)"},
    "scores on scaled ones": {"scores": SCORES.replace("mask)", "p)")},
    "five masks": {
        "scores": with_masks(FIVE, Parts()).scores,
        "more_inputs": with_masks(FIVE, Parts()).more_inputs,
    },
    "a guard by another number": {"softmax": GUARD.replace("zero", "half")},
    "a guard by several zeros": {"softmax": GUARD.replace("zero", "nothings")},
    "a guard by an input": {"softmax": GUARD.replace("zero", "n"), "more_inputs": ", float n"},
    "a guard by weights": {"softmax": GUARD.replace("zero", "w")},
    "a guard the other way round": {"softmax": GUARD.replace("zero, w", "w, zero")},
    "a guard of something else": {
        "softmax": GUARD.replace("zero, w", "zero, other"),
        "more_inputs": ", float[b, 3, s, t] other",
    },
    "a guard by what scores are": {"softmax": GUARD.replace("IsNaN (w)", "IsNaN (masked)")},
    "a guard against infinity": {"softmax": GUARD.replace("IsNaN", "IsInf")},
    "a guard, turned": {"softmax": GUARD.replace("nan = IsNaN (w)", "no = IsNaN (w) \n nan = Not (no)")},
    "a guard whose IsNaN is read": {
        "softmax": GUARD,
        "y": f"{Y} \n z = Not (nan)",
        "more_outputs": ", bool[b, 3, s, t] z",
    },
    "a guard whose IsNaN is an output": {"softmax": GUARD, "more_outputs": ", bool[b, 3, s, t] nan"},
    "a guard whose Where is read": {
        "softmax": GUARD,
        "y": f"{Y} \n z = Relu (weights)",
        "more_outputs": ", float[b, 3, s, t] z",
    },
    "a guard whose Where is an output": {"softmax": GUARD, "more_outputs": ", float[b, 3, s, t] weights"},
    "a guard whose Softmax is read": {
        "softmax": GUARD,
        "y": f"{Y} \n z = Relu (w)",
        "more_outputs": ", float[b, 3, s, t] z",
    },
    "weights through float16": {"softmax": f"{THROUGH.replace('type', '10')}"},
    "weights through double": {"softmax": f"{THROUGH.replace('type', '11')}"},
    "weights through bfloat16": {"softmax": f"{THROUGH.replace('type', '16')}"},
    "a Cast that is read": {
        "softmax": THROUGH.replace("type", "1"),
        "y": f"{Y} \n z = Relu (c)",
        "more_outputs": ", float[b, 3, s, t] z",
    },
    "a product with itself": {"heads": "heads = MatMul (weights, weights)", "v_shape": "b, t, h, t"},
    "the sides of the product changed": {"heads": "wt = Transpose (weights) \n heads = MatMul (vh, wt)"},
    "k not turned to be multiplied with": {
        "k": f"kh = {PERM}[0, 2, 1, 3]> (k)",
        "k_shape": "b, d, h, t",
    },
    "q not turned": {"q": "qh = Identity (q)", "q_shape": "b, h, s, d"},
    "v not turned": {"v": "vh = Identity (v)", "v_shape": "b, h, t, d"},
    "a number on v": {"v": f"{V.replace('vh', 'vn')} \n vh = Mul (vn, half)"},
    "q turned otherwise": {"q": f"qh = {PERM}[2, 1, 0, 3]> (q)", "q_shape": "s, h, b, d"},
    "a Transpose without perm": {"q": "qh = Transpose (q)", "q_shape": "d, s, h, b"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_whole_stays(name: str):
    refused(Parts(**REFUSED[name]).model())


@pytest.mark.parametrize("name", ["p", "scores", "masked"])
def test_what_goes_with_the_op_is_not_its_v(name: str):
    heads = f"y = MatMul (weights, {name})"
    refused(BY_HEAD._replace(heads=heads, stated=f"float[b, {H}, s, t] {name}").model())


@pytest.mark.parametrize("opset", [11, 12])
def test_softmax_without_axis_was_another_before_opset_13(opset: int):
    parts = Parts(softmax=SOFTMAX.replace("<axis = -1>", ""))
    refused(parts.model(opset))
    fuse(parts.model(13))


@pytest.mark.parametrize("opset", [9, 10])
def test_opsets_without_bodies(opset: int):
    refused(Parts().model(opset))


@pytest.mark.parametrize("parts", [Parts(), BY_HEAD], ids=["by token", "by head"])
@pytest.mark.parametrize("dtype", ["float16", "double", "bfloat16"])
def test_other_types(dtype: str, parts: Parts):
    before = parts.model()
    text = (
        onnx.printer.to_text(before).replace("float[", f"{dtype}[").replace("float eight", f"{dtype} eight")
    )
    refused(onnx.parser.parse_model(text))


@pytest.mark.parametrize(
    "shapes",
    [
        {"q_shape": "b, 1, h, d", "mask": "1, 1, s, t"},
        {"k_shape": "b, 1, h, d", "v_shape": "b, t, h, d", "mask": "t"},
        BY_HEAD._replace(q_shape="b, h, 1, d", mask="1, 1, s, t")._asdict(),
        BY_HEAD._replace(k_shape="b, h, 1, d", v_shape="b, h, t, d", mask="t")._asdict(),
    ],
    ids=["rows", "tokens", "rows by head", "tokens by head"],
)
def test_mask_with_more_than_the_scores_have(shapes: dict[str, str]):
    refused(Parts(**shapes).model(fixed="bsthd"))


def test_mask_of_rank_5():
    refused(Parts(mask="1, 1, 1, 1, t", y_shape="n, m, s, h, d").model())


def test_the_opset_of_a_function_counts():
    """Its default axis of Softmax is that of its own opset."""
    scores = "p = MatMul (qh, kh) \n masked = Add (p, mask)"
    lines = Parts(softmax=SOFTMAX.replace("<axis = -1>", ""), scores=scores).lines()
    refused(called(Parts(), lines, opset=11))
