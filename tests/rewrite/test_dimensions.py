"""What the entries of computed shapes are read as: never anything that the graph does not compute."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrite.graphs import build
from rewrite.steps import reference

from onnx_bitnet.rewrite.dimensions import Dimension, entries
from onnx_bitnet.rewrite.origins import survey
from onnx_bitnet.rewrite.records import Site

SIZES = (2, 3, 7, 5)  # of x; the model states 3 and 5
X = tuple(f"x{axis}" for axis in range(4))
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


def names(root: ir.Graph, model: ir.Model) -> list[int | str] | None:
    """The entries of the output: numbers, and names of a value with an axis."""
    (shape,) = root.outputs
    node = shape.producer()
    assert node is not None
    found = entries(shape, Site(node, "", "", root, survey(model)))
    if found is None:
        return None
    return [f"{e.value.name}{e.axis}" if isinstance(e, Dimension) else e for e in found]


def read(proto: onnx.ModelProto) -> list[int | str] | None:
    model = ir.from_proto(proto)
    return names(model.graph, model)


def computed(proto: onnx.ModelProto) -> list[int]:
    feeds = {"x": np.zeros(SIZES, np.float32), "u": np.zeros((2, 3), np.float32), "n": np.int64([1])}
    (s,) = reference(proto, feeds)
    return list(s.reshape(-1))


def sizes(read: list[int | str] | None) -> list[int]:
    """What the entries are for x."""
    return [entry if isinstance(entry, int) else SIZES[X.index(entry)] for entry in read or ()]


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
    "a shape from its end": ("s = Shape <start = -2> (x)", ["x2", "x3"]),
    "a part of a shape": ("s = Shape <start = 1, end = 3> (x)", ["x1", "x2"]),
    "a shape before its end": ("s = Shape <end = -1> (x)", ["x0", "x1", "x2"]),
    "a shape beyond its end": ("s = Shape <start = -9, end = 9> (x)", [*X]),
    "nothing of a shape": ("s = Shape <start = 3, end = 1> (x)", []),
    "an entry": (f"{SHAPE} \n s = Gather (x_shape, vector_1)", ["x1"]),
    "entries from the end": (f"{SHAPE} \n s = Gather <axis = 0> (x_shape, last_and_first)", ["x3", "x0"]),
    "a number": (f"{ENTRY} \n s = Unsqueeze (e, vector_0)", ["x0"]),
    "numbers together": (
        f"{ENTRY} \n f = Unsqueeze (e, vector_0) \n s = Concat <axis = 0> (minus_1, f, x_shape, four)",
        [-1, "x0", *X, 4],
    ),
    "an entry of several": (
        f"{SHAPE} \n c = Concat <axis = -1> (four, x_shape) \n s = Gather (c, vector_2)",
        ["x1"],
    ),
    "an entry of constants": ("c = Concat <axis = 0> (four, minus_1) \n s = Gather (c, vector_1)", [-1]),
    "Cast, Squeeze and Identity between": (
        f"{SHAPE} \n c = Cast <to = 6> (x_shape) \n d = Gather (c, vector_2) \n e = Squeeze (d) \n "
        "f = Unsqueeze (e, vector_0) \n i = Identity (f) \n s = Cast <to = 7> (i)",
        ["x2"],
    ),
    "part of a part": (
        f"{SHAPE} \n c = Slice (x_shape, vector_1, four) \n s = Slice (c, vector_1, four)",
        ["x2", "x3"],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_entries_are_read(name: str):
    lines, want = READ[name]
    proto = model(lines)
    got = read(proto)
    assert got == want
    assert sizes(got) == computed(proto)


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
            assert sizes(got) == computed(proto)


UNREAD = {
    "an input": "s = Identity (n)",
    "a shape of unknown rank": "s = Shape (u)",
    "an entry of a shape of unknown rank": "u_shape = Shape (u) \n s = Gather (u_shape, vector_0)",
    "one of several is an input": f"{SHAPE} \n s = Concat <axis = 0> (x_shape, n)",
    "one of several is of unknown rank": f"{SHAPE} \n c = Shape (u) \n s = Concat <axis = 0> (x_shape, c)",
    "a float": "s = Identity (half)",
    "a float of several": f"{SHAPE} \n s = Concat <axis = 0> (x_shape, half)",
    "a truth": "s = Identity (yes)",
    "a matrix": "s = Identity (matrix)",
    "computed": f"{SHAPE} \n s = Mul (x_shape, four)",
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
    "a row": f"{SHAPE} \n m = Unsqueeze (x_shape, vector_0) \n s = Gather (m, zero)",
    "truths of entries": f"{SHAPE} \n t = Cast <to = 9> (x_shape) \n s = Cast <to = 7> (t)",
    "entries in 8 bits": f"{SHAPE} \n t = Cast <to = 3> (x_shape) \n s = Cast <to = 7> (t)",
    "entries in float16": f"{SHAPE} \n t = Cast <to = 10> (x_shape) \n s = Cast <to = 7> (t)",
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_else_is_computed_is_not_read(name: str):
    assert read(model(UNREAD[name])) is None


@pytest.mark.parametrize(
    ("part", "want"), [("start = 2", ["x2", "x3"]), ("start: int = @i", None), ("end: int = @i", None)]
)
def test_attributes_of_a_function_are_not_known(part: str, want: list[str] | None):
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
    assert sizes(read(proto)) == computed(proto)


def test_deep_chains_end():
    def chain(count: int) -> onnx.ModelProto:
        steps = [f"s{i + 1} = Identity (s{i})" for i in range(count)]
        return model("\n".join(["s0 = Shape (x)", *steps, f"s = Identity (s{count})"]))

    assert read(chain(6)) == [*X]
    assert read(chain(8)) is None
    assert read(chain(2000)) is None


def test_wide_chains_end():
    steps = [f"s{i + 1} = Concat <axis = 0> (s{i}, s{i})" for i in range(50)]
    assert read(model("\n".join(["s0 = Shape (x)", *steps, "s = Identity (s50)"]))) is None


def test_a_dimension_equals_itself_and_the_number_that_is_stated():
    x, other = (ir.Value(name=name, shape=ir.Shape(["a", 3])) for name in ("x", "other"))
    unknown = ir.Value(name="unknown")
    assert Dimension(x, 0).equals(Dimension(x, 0))
    assert not Dimension(x, 0).equals(Dimension(x, 1))
    assert not Dimension(x, 0).equals(Dimension(other, 0))
    assert Dimension(x, 1).equals(3)
    for entry in (-1, 0, 2):
        assert not Dimension(x, 1).equals(entry)
        assert not Dimension(x, 0).equals(entry)
        assert not Dimension(unknown, 0).equals(entry)
