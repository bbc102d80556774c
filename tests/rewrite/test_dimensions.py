"""What is read of computed shapes and numbers: never anything that the graph does not compute."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrite.graphs import build
from rewrite.steps import reference

from onnx_bitnet.rewrite.dimensions import Dimension, Shapes
from onnx_bitnet.rewrite.origins import survey
from onnx_bitnet.rewrite.records import Site

SIZES = (2, 3, 7, 5)  # of x; the model states 3 and 5
X = ("x0", 3, "x2", 5)
HUGE = 2**63 - 1

CONSTANTS = {
    "zero": np.int64(0),
    "minus_1": np.int64([-1]),
    "four": np.int64([4]),
    "pair": np.int32([3, -2]),
    "vector_0": np.int64([0]),
    "vector_1": np.int64([1]),
    "vector_2": np.int64([2]),
    "outside": np.int64([4]),
    "before": np.int64(-5),
    "last_and_first": np.int64([-1, 0]),
    "matrix": np.int64([[0, 1]]),
    "half": np.float32([0.5]),
    "one": np.float32(1),
    "ones": np.float32([[[[[1]]]]]),
    "rows": np.int64([0, -1, 15]),
    "fifteen": np.int64([15]),
    "zero_rows": np.int64([0, 15]),
    "yes": np.array([True]),
}


def model(lines: str, opset: int = 18, functions: str = "") -> onnx.ModelProto:
    """Lines compute s, of x, of u, whose rank is not known, and of the number n."""
    used = {name: value for name, value in CONSTANTS.items() if name in lines}
    return build(
        f"g (float[a, 3, c, 5] x, float[] u, int64[1] n) => (int64[k] s) {{ {lines} }}",
        used,
        opset=opset,
        functions=functions,
        domains=("own",) if functions else (),
    )


def shapes_of(root: ir.Graph, model: ir.Model) -> Shapes:
    node = root.outputs[0].producer()
    assert node is not None
    return Shapes(Site(node, "", "", root, survey(model)))


def names(root: ir.Graph, model: ir.Model) -> list[int | str | None] | None:
    """The entries of the output: numbers, names of a value with an axis, None for anything else."""
    found = shapes_of(root, model).entries(root.outputs[0])
    if found is None:
        return None
    return [f"{e.value.name}{e.axis}" if isinstance(e, Dimension) else e for e in found]


def read(proto: onnx.ModelProto) -> list[int | str | None] | None:
    model = ir.from_proto(proto)
    return names(model.graph, model)


def computed(proto: onnx.ModelProto) -> list[int]:
    feeds = {"x": np.zeros(SIZES, np.float32), "u": np.zeros((2, 3), np.float32), "n": np.int64([1])}
    (s,) = reference(proto, feeds)
    return list(s.reshape(-1))


def number(proto: onnx.ModelProto) -> float | None:
    model = ir.from_proto(proto)
    return shapes_of(model.graph, model).number(model.graph.outputs[0], most_axes=4)


def is_right(read: list[int | str | None] | None, computed: list[int]) -> bool:
    """Whether entries that are numbers or dimensions of x are those that are computed."""
    assert read is not None
    known = [SIZES[X.index(entry)] if entry in X else entry for entry in read]
    return len(known) == len(computed) and all(
        one == other for one, other in zip(known, computed, strict=True) if isinstance(one, int)
    )


SHAPE = "x_shape = Shape (x)"
ENTRY = f"{SHAPE} \n e = Gather (x_shape, zero)"
READ = {
    "a constant": ("s = Identity (four)", [4]),
    "constants": ("s = Concat <axis = 0> (four, minus_1)", [4, -1]),
    "a constant of int32": ("s = Cast <to = 7> (pair)", [3, -2]),
    "a Constant node": ("s = Constant <value = int64[2] {6, 0}> ()", [6, 0]),
    "a Constant node of ints": ("s = Constant <value_ints = [6, 0]> ()", [6, 0]),
    "a Constant node without entries": ("s = Constant <value = int64[0] {}> ()", []),
    "what constants compute": ("s = Mul (four, minus_1)", [-4]),
    "a shape": ("s = Shape (x)", [*X]),
    "a shape from its end": ("s = Shape <start = -2> (x)", ["x2", 5]),
    "a part of a shape": ("s = Shape <start = 1, end = 3> (x)", [3, "x2"]),
    "a shape before its end": ("s = Shape <end = -1> (x)", ["x0", 3, "x2"]),
    "a shape beyond its end": ("s = Shape <start = -9, end = 9> (x)", [*X]),
    "nothing of a shape": ("s = Shape <start = 3, end = 1> (x)", []),
    "an entry": (f"{SHAPE} \n s = Gather (x_shape, vector_1)", [3]),
    "entries from the end": (f"{SHAPE} \n s = Gather <axis = 0> (x_shape, last_and_first)", [5, "x0"]),
    "a number": (f"{ENTRY} \n s = Unsqueeze (e, vector_0)", ["x0"]),
    "numbers together": (
        f"{ENTRY} \n f = Unsqueeze (e, vector_0) \n s = Concat <axis = 0> (minus_1, f, x_shape, four)",
        [-1, "x0", *X, 4],
    ),
    "an entry of several": (
        f"{SHAPE} \n c = Concat <axis = -1> (four, x_shape) \n s = Gather (c, vector_2)",
        [3],
    ),
    "an entry of constants": ("c = Concat <axis = 0> (four, minus_1) \n s = Gather (c, vector_1)", [-1]),
    "Cast, Squeeze and Identity between": (
        f"{SHAPE} \n c = Cast <to = 6> (x_shape) \n d = Gather (c, vector_2) \n e = Squeeze (d) \n "
        "f = Unsqueeze (e, vector_0) \n i = Identity (f) \n s = Cast <to = 7> (i)",
        ["x2"],
    ),
    "part of a part": (
        f"{SHAPE} \n c = Slice (x_shape, vector_1, four) \n s = Slice (c, vector_1, four)",
        ["x2", 5],
    ),
    "a row of entries": (
        f"{SHAPE} \n m = Unsqueeze (x_shape, vector_0) \n s = Gather (m, zero)",
        [*X],
    ),
    "entries along another axis of a matrix": (
        f"{SHAPE} \n m = Unsqueeze (x_shape, vector_0) \n r = Gather <axis = 1> (m, vector_1) \n "
        "s = Squeeze (r, vector_0)",
        [3],
    ),
    "what is computed from a dimension": (f"{SHAPE} \n s = Mul (x_shape, four)", [None, 12, None, 20]),
    "what is added": (f"{SHAPE} \n s = Add (x_shape, four)", [None, 7, None, 9]),
    "what is subtracted": (f"{SHAPE} \n s = Sub (x_shape, four)", [None, -1, None, 1]),
    "what is divided": (f"{SHAPE} \n s = Div (x_shape, vector_2)", [None, 1, None, 2]),
    "what nobody divides": (f"{SHAPE} \n s = Div (x_shape, minus_1)", [None] * 4),
    "as floats": (
        f"{SHAPE} \n f = Cast <to = 1> (x_shape) \n h = Mul (f, half) \n s = Cast <to = 7> (h)",
        [None, 1, None, 2],
    ),
    "nothing to squeeze": (f"{SHAPE} \n s = Squeeze (x_shape)", [*X]),
    "a shape in another": (f"{SHAPE} \n s = Reshape (x_shape, minus_1)", [*X]),
    "of Transposes": (
        "t = Transpose <perm = [3, 0, 1, 2]> (x) \n v = Transpose <perm = [1, 0, 2, 3]> (t) \n s = Shape (v)",
        ["x0", 5, 3, "x2"],
    ),
    "of a Reshape": (
        f"{ENTRY} \n f = Unsqueeze (e, vector_0) \n c = Concat <axis = 0> (f, minus_1, fifteen) \n "
        "r = Reshape (x, c) \n s = Shape (r)",
        ["x0", "r1", 15],
    ),
    "of a Reshape that copies": ("r = Reshape (x, rows) \n s = Shape (r)", ["r0", "r1", 15]),
    "of a Reshape of unknown rank": (
        "u_shape = Shape (u) \n e = Gather (u_shape, vector_0) \n c = Concat <axis = 0> (e, minus_1) \n "
        "r = Reshape (u, c) \n s = Shape (r)",
        ["r0", "r1"],
    ),
    "an entry of a shape of unknown rank": (
        "u_shape = Shape (u) \n s = Gather (u_shape, last_and_first)",
        [None, None],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_entries_are_read(name: str):
    lines, want = READ[name]
    proto = model(lines)
    got = read(proto)
    assert got == want
    assert is_right(got, computed(proto))


BOUNDS = (-HUGE - 1, -5, -4, -1, 0, 1, 3, 4, HUGE)


@pytest.mark.parametrize("more", ["", "axes", "last_axis", "axes, steps"])
def test_slices_are_those_of_the_graph(more: str):
    for start in BOUNDS:
        for end in BOUNDS:
            numbers = {"start": start, "end": end, "axes": 0, "last_axis": -1, "steps": 1}
            used = ["start", "end", *(name for name in more.split(", ") if name)]
            held = [f"{name} = Constant <value = int64[1] {{{numbers[name]}}}> ()" for name in used]
            proto = model("\n".join([SHAPE, *held, f"s = Slice (x_shape, {', '.join(used)})"]))
            got = read(proto)
            assert got == [*X][start:end]
            assert is_right(got, computed(proto))


UNREAD = {
    "an input": "s = Identity (n)",
    "a shape of unknown rank": "s = Shape (u)",
    "one of several is an input": f"{SHAPE} \n s = Concat <axis = 0> (x_shape, n)",
    "one of several is of unknown rank": f"{SHAPE} \n c = Shape (u) \n s = Concat <axis = 0> (x_shape, c)",
    "a truth": "s = Identity (yes)",
    "a matrix": "s = Identity (matrix)",
    "negated": f"{SHAPE} \n s = Neg (x_shape)",
    "an entry beyond the last": f"{SHAPE} \n s = Gather (x_shape, outside)",
    "an entry before the first": f"{SHAPE} \n s = Gather (x_shape, before)",
    "an entry that an input names": f"{SHAPE} \n s = Gather (x_shape, n)",
    "a matrix of entries": f"{SHAPE} \n s = Gather (x_shape, matrix)",
    "entries along another axis": f"{SHAPE} \n s = Gather <axis = 1> (x_shape, vector_0)",
    "a part from an input on": f"{SHAPE} \n s = Slice (x_shape, n, four)",
    "every second": f"{SHAPE} \n s = Slice (x_shape, vector_0, four, vector_0, vector_2)",
    "backwards": f"{SHAPE} \n s = Slice (x_shape, four, vector_0, vector_0, minus_1)",
    "a step without axes": f'{SHAPE} \n s = Slice (x_shape, vector_0, four, "", vector_1)',
    "a part along another axis": f"{SHAPE} \n s = Slice (x_shape, vector_0, four, vector_1)",
    "a part along two axes": f"{SHAPE} \n s = Slice (x_shape, last_and_first, pair, last_and_first)",
    "a Shape of others": "s = own.Shape (x)",
    "a random number": f"{SHAPE} \n s = RandomUniformLike (x_shape)",
    "a part of rows": f"{SHAPE} \n m = Unsqueeze (x_shape, vector_0) \n r = Slice (m, vector_0, vector_1) \n "
    "s = Squeeze (r, vector_0)",
    "entries in a shape with zeros": f"{SHAPE} \n s = Reshape (x_shape, zero_rows)",
    "truths of entries": f"{SHAPE} \n t = Cast <to = 9> (x_shape) \n s = Cast <to = 7> (t)",
    "entries in 8 bits": f"{SHAPE} \n t = Cast <to = 3> (x_shape) \n s = Cast <to = 7> (t)",
    "entries in float16": f"{SHAPE} \n t = Cast <to = 10> (x_shape) \n s = Cast <to = 7> (t)",
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_else_is_computed_is_not_read(name: str):
    assert read(model(UNREAD[name])) is None


@pytest.mark.parametrize(
    ("part", "want"), [("start = 2", ["x2", 5]), ("start: int = @i", None), ("end: int = @i", None)]
)
def test_attributes_of_a_function_are_not_known(part: str, want: list[str | int] | None):
    function = f"""<domain: "own", opset_import: ["" : 18]>
        f <i> (x) => (s) {{ s = Shape <{part}> (x) }}"""
    whole = ir.from_proto(model("s = own.f <i = 1> (x)", functions=function))
    (body,) = whole.functions.values()
    body.inputs[0].shape = ir.Shape(["a", 3, "c", 5])
    assert names(body.graph, whole) == want


@pytest.mark.parametrize("opset", [11, 13, 15])
def test_older_opsets(opset: int):
    unsqueeze = "Unsqueeze <axes = [0]> (e)" if opset < 13 else "Unsqueeze (e, vector_0)"
    proto = model(f"{ENTRY} \n s = {unsqueeze}", opset)
    assert read(proto) == ["x0"]
    assert is_right(read(proto), computed(proto))


def test_deep_chains_end():
    def chain(count: int) -> onnx.ModelProto:
        steps = [f"s{i + 1} = Identity (s{i})" for i in range(count)]
        return model("\n".join(["s0 = Shape (x)", *steps, f"s = Identity (s{count})"]))

    assert read(chain(12)) == [*X]
    assert read(chain(20)) is None
    assert read(chain(2000)) is None


def test_wide_chains_end():
    steps = [f"s{i + 1} = Concat <axis = 0> (s{i}, s{i})" for i in range(50)]
    assert read(model("\n".join(["s0 = Shape (x)", *steps, "s = Identity (s50)"]))) is None


WIDTH = f"{SHAPE} \n w = Slice (x_shape, minus_1, four) \n f = Cast <to = 1> (w)"
NUMBERS = {
    "a constant": ("s = Identity (half)", 0.5),
    "a scalar": ("s = Identity (one)", 1.0),
    "an integer": ("s = Identity (four)", 4.0),
    "one over the root of a width": (f"{WIDTH} \n r = Sqrt (f) \n s = Div (one, r)", 5**-0.5),
    "a power of a width": (f"{WIDTH} \n s = Pow (f, half)", 5**0.5),
    "the root of a root": (f"{WIDTH} \n r = Sqrt (f) \n s = Sqrt (r)", 5**0.25),
    "too many axes": ("s = Identity (ones)", None),
    "several numbers": ("s = Identity (pair)", None),
    "a length that is not stated": (f"{ENTRY} \n s = Cast <to = 1> (e)", None),
    "an input": ("s = Identity (n)", None),
    "the root of what is below zero": (f"{WIDTH} \n m = Sub (one, f) \n s = Sqrt (m)", None),
    "a division by nothing": (f"{WIDTH} \n m = Sub (f, f) \n s = Div (one, m)", None),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str):
    lines, want = NUMBERS[name]
    proto = model(lines)
    assert number(proto) == want
    if want is not None:
        np.testing.assert_allclose(computed(proto), [want], rtol=1e-6)


@pytest.mark.parametrize(
    ("lines", "want"),
    [
        ("s = Identity (x)", None),
        ("s = Transpose <perm = [1, 0, 2]> (u)", 3),
        ("s = Reshape (u, rows)", 3),
        (f"{SHAPE} \n e = Gather (x_shape, vector_0) \n s = Reshape (u, e)", 1),
        ("s = Reshape (u, n)", None),
        ("s = Relu (u)", None),
    ],
)
def test_ranks(lines: str, want: int | None):
    built = ir.from_proto(model(lines))
    (value,) = built.graph.outputs
    value.shape = None
    assert shapes_of(built.graph, built).rank(value) == want
    assert shapes_of(built.graph, built).rank(built.graph.inputs[0]) == 4


def test_a_cycle_ends():
    built = ir.from_proto(model("a = Identity (four) \n s = Concat <axis = 0> (a, four)"))
    (value,) = built.graph.outputs
    node = value.producer()
    assert node is not None
    node.inputs[0].producer().replace_input_with(0, value)  # type: ignore[union-attr]
    assert shapes_of(built.graph, built).entries(value) is None
