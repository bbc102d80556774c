"""BitLinear layers as exporters and people spell them: small graphs written down, so no torch is needed.

The chain that quantizes activations, the way a weight is made and what scales the product are as
torch.onnx.export writes them for transformers' BitLinear and AutoBitLinear and for training code with
straight-through estimators, by its newer exporter (`dynamo`) and by the older one (`script`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from ml_dtypes import bfloat16
from rewrite.graphs import K, N, build, ternary

NUMBERS = {"float": 1, "float16": 10, "bfloat16": 16}
TYPES = {"float": np.float32, "float16": np.float16, "bfloat16": bfloat16}

DYNAMO = """
    magnitude = Abs (x{wide})
    peak = ReduceMax <keepdims = 1> (magnitude, last)
    clamped = Clip (peak, tiny)
    inverse = Reciprocal (clamped)
    s = Mul (inverse, L)
    scaled = Mul (x{wide}, s)
    rounded = Round (scaled)
    q = Clip (rounded, low, L)"""
SCRIPT = """
    c_tiny = Constant <value = float {1e-5}> ()
    c_L = Constant <value = float {127.0}> ()
    c_low = Constant <value = float {-128.0}> ()
    x32 = Cast <to = 1> (x)
    magnitude = Abs (x32)
    peak = ReduceMax <axes = [-1], keepdims = 1> (magnitude)
    clamped = Clip (peak, c_tiny)
    inverse = Reciprocal (clamped)
    s = Mul (inverse, c_L)
    scaled = Mul (x32, s)
    rounded = Round (scaled)
    q = Clip (rounded, c_low, c_L)"""
ONLINE = """
    size = Abs (V)
    mean = ReduceMean <keepdims = 0> (size)
    mean_clamped = Clip (mean, tiny)
    m = Reciprocal (mean_clamped)
    V_scaled = Mul (V, m)
    V_rounded = Round (V_scaled)
    V_codes = Clip (V_rounded, minus_one, one)
    V_q = Div (V_codes, m)"""


class Spelling(NamedTuple):
    """A model with one layer and an input x.

    Args:
        model: the model.
        exact: results are equal bit for bit.
        tolerance: of the largest output, where they are not.
    """

    model: onnx.ModelProto
    exact: bool = False
    tolerance: float = 1e-6


def constants(dtype: str = "float") -> dict[str, np.ndarray]:
    """The small constants of the chains, in the type that the chain computes in."""
    kind = TYPES[dtype]
    values = {"tiny": 1e-5, "L": 127, "low": -128, "one": 1, "minus_one": -1, "two": 2}
    return {"last": np.array([-1])} | {name: np.array(value, kind) for name, value in values.items()}


def master(scale: float = 0.02) -> np.ndarray:
    """A weight as training has it: not ternary."""
    return (np.random.default_rng(7).normal(size=(N, K)) * scale).astype(np.float32)


def packed() -> np.ndarray:
    """A ternary weight in transformers' bytes: byte row r holds the output rows r, r + N / 4, ..."""
    codes = (ternary(8, K, scale=1) + 1).astype(np.uint8).reshape(4, 2, K)
    return (codes << np.array([0, 2, 4, 6], np.uint8)[:, None, None]).sum(axis=0).astype(np.uint8)


def layer(
    nodes: str,
    weights: dict[str, np.ndarray],
    dtype: str = "float",
    chain: str = "float",
    opset: int = 20,
    n: int = N,
) -> onnx.ModelProto:
    return build(
        f"g ({dtype}[b, s, {K}] x) => ({dtype}[b, s, {n}] y) {{ {nodes} }}",
        constants(chain) | {"W": ternary(K, N, scale=1, dtype=TYPES[dtype])} | weights,
        opset=opset,
    )


def auto(dtype: str, exporter: str, mode: str) -> Spelling:
    """AutoBitLinear: fake quantization in float32; offline y = (x' W + bias) * weight_scale."""
    kind, to = TYPES[dtype], NUMBERS[dtype]
    wide = "32" if dtype != "float" else ""
    nodes = SCRIPT if exporter == "script" else DYNAMO.format(wide=wide)
    if wide and exporter == "dynamo":
        nodes = "x32 = Cast <to = 1> (x)" + nodes
    nodes += f"\n divided = Div (q, s) \n d = Cast <to = {to}> (divided)"
    if mode == "online":
        nodes += f"{ONLINE} \n V_cast = Cast <to = {to}> (V_q) \n W_t = Transpose <perm = [1, 0]> (V_cast)"
        nodes += "\n product = MatMul (d, W_t) \n y = Add (product, bias)"
    else:
        nodes += (
            "\n product = MatMul (d, W) \n biased = Add (bias, product) \n y = Mul (biased, weight_scale)"
        )
    weights = {
        "V": master(),
        "bias": np.linspace(-1, 1, N).astype(kind),
        "weight_scale": np.array([0.03], kind),
    }
    model = layer(nodes, weights, dtype, opset=17 if exporter == "script" else 20)
    return Spelling(model, tolerance={"float": 1e-6, "float16": 3e-3, "bfloat16": 2e-2}[dtype])


def bitlinear(dtype: str) -> Spelling:
    """BitLinear: integers times codes out of bytes, divided by weight_scale * s, and an expanded bias."""
    kind, to = TYPES[dtype], NUMBERS[dtype]
    steps = "".join(
        f'\n b{i} = BitwiseAnd (W8, mask{i}) \n f{i} = BitShift <direction = "RIGHT"> (b{i}, shift{i})'
        f"\n r{i + 1} = ScatterND (r{i}, rows{i}, f{i})"
        for i in range(4)
    )
    chain = DYNAMO.format(wide="")
    if dtype == "bfloat16":  # its Abs is computed in float32, and a Max takes the place of Clip
        chain = chain.replace(
            "magnitude = Abs (x)",
            "x_w = Cast <to = 1> (x) \n m_w = Abs (x_w) \n magnitude = Cast <to = 16> (m_w)",
        ).replace("Clip (peak, tiny)", "Max (peak, tiny)")
    nodes = f"""{chain}
        batch = Shape <start = 0, end = 2> (x)
        q8 = Cast <to = 3> (q)
        d = Cast <to = {to}> (q8)
        {steps}
        codes = Cast <to = {to}> (r4)
        trits = Sub (codes, one)
        W_t = Transpose <perm = [1, 0]> (trits)
        product = MatMul (d, W_t)
        both = Mul (weight_scale, s)
        divided = Div (product, both)
        shape = Concat <axis = 0> (batch, width)
        wide_bias = Expand (bias, shape)
        y = Add (divided, wide_bias)"""
    weights = {
        "W8": packed(),
        "r0": np.zeros((8, K), np.uint8),
        "bias": np.linspace(-1, 1, 8).astype(kind).reshape(1, 8),
        "weight_scale": np.array([37.3], kind),
        "width": np.array([8]),
    }
    for i in range(4):
        weights |= {f"mask{i}": np.array(3 << 2 * i, np.uint8), f"shift{i}": np.array(2 * i, np.uint8)}
        weights[f"rows{i}"] = np.array([[2 * i], [2 * i + 1]])
    model = layer(nodes, weights, dtype, dtype, n=8)
    for name in ("divided", "product"):  # the exporter states all shapes; those of y and these must agree
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, to, ["b", "s", 8]))
    return Spelling(model, tolerance={"float": 1e-6, "float16": 2e-2, "bfloat16": 3e-2}[dtype])


def straight_through(exporter: str) -> Spelling:
    """x + (q(x) - x) and w + (q(w) - w), as training code has it."""
    chain = SCRIPT if exporter == "script" else DYNAMO.format(wide="")
    x = "x32" if exporter == "script" else "x"
    nodes = f"""{chain}
        divided = Div (q, s)
        lost = Sub (divided, {x})
        d = Add ({x}, lost)
        {ONLINE}
        V_lost = Sub (V_q, V)
        V_d = Add (V, V_lost)
        W_t = Transpose <perm = [1, 0]> (V_d)
        y = MatMul (d, W_t)"""
    model = layer(nodes, {"V": master()}, opset=17 if exporter == "script" else 20)
    return Spelling(model, tolerance=1e-5)


_PEAK = "peak = ReduceMax <keepdims = 1> (magnitude, last)"
_PEAK0 = "flat = ReduceMax <keepdims = 0> (magnitude, last)"
_STEP = f"""
    magnitude = Abs (x)
    {_PEAK}
    a = Max (tiny, peak)
    step = Div (a, L)"""
_INVERSE = "inverse = Div (one, a)"
_S = "s = Mul (L, inverse)"
_CLIP = "q = Clip (rounded, low, L)"
_BY_S = f"""
    {_INVERSE}
    {_S}
    scaled = Mul (s, x)
    rounded = Round (scaled)
    {_CLIP}"""
_BY_STEP = f"\n scaled = Div (x, step) \n rounded = Round (scaled) \n {_CLIP}"
_FAKE = "\n d = Mul (q, step) \n product = MatMul (d, W) \n y = Mul (product, weight_scale)"
_SCALES = {
    "weight_scale": np.array([0.03], np.float32),
    "scales": np.linspace(0.01, 0.05, N).astype(np.float32),
}


def fake(chain: str = _STEP + _BY_S, **numbers: float) -> Spelling:
    """Fake quantization written by hand; numbers take the place of its constants."""
    return Spelling(layer(chain + _FAKE, _SCALES | {name: np.float32(v) for name, v in numbers.items()}))


def by_s(tail: str, *, exact: bool = False, **numbers: float) -> Spelling:
    """Integers written by hand: `tail` makes y of their product with the weight."""
    nodes = f"{_STEP}{_BY_S} \n product = MatMul (q, W) \n {tail}"
    return Spelling(layer(nodes, _SCALES | {name: np.float32(v) for name, v in numbers.items()}), exact)


SPELLINGS: dict[str, Spelling] = (
    {
        f"auto_{mode}_{exporter}_{dtype}": auto(dtype, exporter, mode)
        for mode in ("offline", "online")
        for exporter in ("dynamo", "script")
        for dtype in TYPES
    }
    | {f"bitlinear_{dtype}": bitlinear(dtype) for dtype in TYPES}
    | {f"straight_through_{exporter}": straight_through(exporter) for exporter in ("dynamo", "script")}
    | {
        "exact": by_s("f = Mul (step, weight_scale) \n y = Mul (product, f)", exact=True),
        "exact_per_output": by_s("f = Mul (scales, step) \n y = Mul (f, product)", exact=True),
        "exact_unscaled": by_s("y = Mul (product, step)", exact=True),
        "scaled_one_by_one": by_s("p = Mul (product, step) \n y = Div (p, weight_scale)"),
        "scaled_per_output": by_s("p = Mul (product, scales) \n y = Mul (p, step)"),
        "step": fake(_STEP + _BY_STEP),
        "one_division": fake(
            _STEP + _BY_S.replace("s = Mul (L, inverse)", "s = Div (L, a)").replace(_INVERSE, "")
        ),
        "keepdims_0": fake(_STEP.replace(_PEAK, f"{_PEAK0} \n peak = Unsqueeze (flat, last)") + _BY_S),
        "unclipped": fake(_STEP + _BY_S.replace(_CLIP, "q = Identity (rounded)")),
        "clipped_evenly": fake(
            _STEP + _BY_S.replace(_CLIP, "minus_L = Neg (L) \n u = Max (rounded, minus_L) \n q = Min (u, L)")
        ),
    }
)


UNLIKE: dict[str, tuple[onnx.ModelProto, str]] = {
    "eps": (fake(tiny=1e-6).model, "its smallest peak is 1e-06, the op's is 1e-05"),
    "no eps": (
        fake(_STEP.replace("a = Max (tiny, peak)", "a = Identity (peak)") + _BY_S).model,
        "its smallest peak is 0, the op's is 1e-05",
    ),
    "eps added": (
        fake(_STEP.replace("a = Max (tiny, peak)", "a = Add (peak, tiny)") + _BY_S).model,
        "it adds 1e-05 to the peak",
    ),
    "levels": (fake(L=7, low=-8).model, "it has 7 levels, the op has 127"),
    "clip": (fake(low=-100).model, "it clips to -100 .. 127, the op to -128 .. 127"),
    "peak limited": (
        fake(_STEP.replace("a = Max (tiny, peak)", "a = Clip (peak, tiny, two)") + _BY_S).model,
        "it limits the peak to 2",
    ),
    "per tensor": (
        fake(_STEP.replace("(magnitude, last)", "(magnitude)") + _BY_S).model,
        "its peak is not that of a row",
    ),
    "of another value": (
        fake(
            _STEP.replace("magnitude = Abs (x)", "other = Relu (x) \n magnitude = Abs (other)") + _BY_S
        ).model,
        "the scale is not made of the row's own peak",
    ),
    "static": (
        fake(_STEP + _BY_S.replace(_S, "s = Identity (two)").replace(_INVERSE, "")).model,
        "the scale is not made of the row's own peak",
    ),
    "not undone": (
        Spelling(
            layer(_STEP + _BY_S + "\n t = Mul (step, two) \n d = Mul (q, t) \n y = MatMul (d, W)", {})
        ).model,
        "its integers are not divided by the scale that made them",
    ),
}
"""Models with a chain that is not the op's, and why it is not."""
