"""Graphs of attention to be made one op, and what they must compute then."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from rewrite.graphs import build, numbers
from rewrite.steps import initializers, plain, reference, stock, with_library

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
GUARD = "w = Softmax <axis = -1> (masked) \n nan = IsNaN (w) \n weights = Where (nan, zero, w)"
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
    "lowest": np.finfo(np.float32).min,
    "lowest4": np.full((1, 1, 1, 1), np.finfo(np.float32).min),
    "nothing": np.float32(-np.inf),
    "minus_1e9": np.float32(-1e9),
    "several": np.float32([1, 2, 3, 4, 5, 6, 7]),
    "zeros": np.float32([[[[0]]]]),
    "nothings": np.zeros(7, np.float32),
    "heads3": np.float32([1, 2, 3]).reshape(3, 1, 1),
    "least": np.int64([-(2**63)]),
    "minus_2": np.int64([-2]),
    "minus_1": np.int64([-1]),
    "most": np.int64([2**63 - 1]),
    "two_i": np.int64([2]),
}


class Parts(NamedTuple):
    """The lines of a graph, shapes of inputs in names of SIZES (no mask for ''), and what it states."""

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
    stated: str = ""

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
        stated = f"<{self.stated}>" if self.stated else ""
        return with_numbers(f"g ({self.inputs(fixed)}) => ({y}) {stated} {{ {self.lines()} }}", opset)


BY_HEAD = Parts(
    q="",
    k="kh = Transpose <perm = [0, 1, 3, 2]> (k)",
    scores=SCORES.replace("qh", "q"),
    v="",
    heads="y = MatMul (weights, v)",
    y="",
    q_shape="b, h, s, d",
    k_shape="b, h, t, d",
    v_shape="b, h, t, d",
    y_shape="b, h, s, d",
)
"""Heads as they are, for which no Transpose is."""


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
        with np.errstate(all="ignore"):  # numpy warns of what is masked with -inf
            got = run(after, feeds)
        for one, other in zip(got, want, strict=True):
            assert_close(one, other)


def refused(before: onnx.ModelProto) -> None:
    model = ir.from_proto(before)
    assert fuse_attention(model, Shared.of(model)) == 0
    cleanup(model)
    assert ir.to_proto(model) == plain(before)


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
