"""Small graphs, one for each way to write a linear layer, for the rewrite tests and the end-to-end tests.

All weights are exactly ternary and all numbers small multiples of 1/8, so that every correct order of
operations gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.rewrite.records import Linear

K, N = 12, 6


class Case(NamedTuple):
    """A model, how many layers of it are packed, and feeds to run it on."""

    model: onnx.ModelProto
    converted: int
    feeds: dict[str, np.ndarray]


def build(
    graph: str,
    weights: Mapping[str, np.ndarray | onnx.TensorProto] | None = None,
    *,
    opset: int = 18,
    ir_version: int = 10,
    functions: str = "",
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """Make a model of `g (inputs) => (outputs) { nodes }` and named weights."""
    imports = ", ".join([f'"" : {opset}', *(f'"{domain}" : 1' for domain in domains)])
    model = onnx.parser.parse_model(
        f"<ir_version: {ir_version}, opset_import: [{imports}]>\n{graph}\n{functions}"
    )
    for name, value in (weights or {}).items():
        tensor = value if isinstance(value, onnx.TensorProto) else ir.to_proto(ir.tensor(value))
        tensor.name = name
        model.graph.initializer.append(tensor)
    return model


def ternary(*shape: int, scale: float = 0.5, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    """Weights -scale, 0 and scale."""
    codes = np.random.default_rng((seed, *shape)).integers(-1, 2, shape)
    return (codes * scale).astype(dtype)


def numbers(*shape: int, dtype: type = np.float32, seed: int = 1) -> np.ndarray:
    """Small multiples of 1/4: activations and biases."""
    return (np.random.default_rng((seed, *shape)).integers(-8, 9, shape) / 4).astype(dtype)


def text(array: np.ndarray) -> str:
    """Write the values of an array as ONNX text."""
    return ", ".join(str(value) for value in array.reshape(-1))


def pack(linear: Linear) -> Quantized:
    """Pack an exactly ternary weight, one scale per output."""
    weight = linear.weight.array().astype(np.float32)
    n, k = weight.shape
    scale = np.abs(weight).max(axis=1, keepdims=True)
    scale[scale == 0] = 1
    codes = (weight / scale + 1).astype(np.uint8)
    assert np.array_equal((codes.astype(np.float32) - 1) * scale, weight), "the weight is not ternary"
    fields = np.pad(codes, ((0, 0), (0, -k % 4)), constant_values=1).reshape(n, -1, 4)
    packed = (fields << np.array([0, 2, 4, 6], np.uint8)).sum(axis=2).astype(np.uint8)
    parameters = scale.reshape(1, n, 1).astype(np.float32)
    return Quantized("i2s", n, k, 0, packed[None], parameters, np.ones_like(parameters), True)


def linear_case(graph: str, x: tuple[int, ...], converted: int = 1, **options: object) -> Case:
    """A case with one input x."""
    weights = options.pop("weights")
    return Case(build(graph, weights, **options), converted, {"x": numbers(*x)})  # type: ignore[arg-type]


def _tensor(kind: int, array: np.ndarray) -> onnx.TensorProto:
    return onnx.helper.make_tensor("", kind, array.shape, array.reshape(-1).tolist())


def _online_chain() -> Case:
    """The chain that transformers' AutoBitLinear leaves unfolded for large weights."""
    weight = np.random.default_rng(3).normal(size=(N, K)).astype(np.float32)
    model = build(
        f"""g (float[b, {K}] x) => (float[b, {N}] y) {{
            magnitude = Abs (W)
            mean = ReduceMean <keepdims = 0> (magnitude)
            clipped = Clip (mean, tiny)
            factor = Reciprocal (clipped)
            scaled = Mul (W, factor)
            rounded = Round (scaled)
            codes = Clip (rounded, low, high)
            ternary = Div (codes, factor)
            turned = Transpose (ternary)
            y = MatMul (x, turned)
        }}""",
        {
            "W": weight / np.abs(weight).mean() * np.float32(0.5),
            "tiny": np.float32(1e-5),
            "low": np.float32(-1),
            "high": np.float32(1),
        },
    )
    return Case(model, 1, {"x": numbers(4, K)})


def _float16() -> Case:
    model = build(
        f"g (float16[b, {K}] x) => (float16[b, {N}] y) {{ p = MatMul (x, W) \n y = Add (b0, p) }}",
        {"W": ternary(K, N, dtype=np.float16), "b0": numbers(N, dtype=np.float16)},
    )
    return Case(model, 1, {"x": numbers(4, K, dtype=np.float16)})


def _subgraph(
    graph: str, weights: Mapping[str, np.ndarray], converted: int, x: tuple[int, ...] = (4, K)
) -> Case:
    feeds = {"x": numbers(*x)}
    if "bool c" in graph:
        feeds["c"] = np.array(True)
    return Case(build(graph, weights), converted, feeds)


W = {"W": ternary(K, N)}
WT = {"W": ternary(N, K)}
B = {"B": numbers(N)}

MATMULS = {
    "matmul": linear_case(
        f"g (float[b, s, {K}] x) => (float[b, s, {N}] y) {{ y = MatMul (x, W) }}", (2, 3, K), weights=W
    ),
    "matmul_rank_unknown": linear_case(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ h = Relu (x) \n y = MatMul (h, W) }}", (2, K), weights=W
    ),
    "matmul_vector": linear_case(
        f"g (float[{K}] x) => (float[{N}] y) {{ y = MatMul (x, W) }}", (K,), weights=W
    ),
    "matmul_left": linear_case(
        f"g (float[b, {K}, m] x) => (float[b, {N}, m] y) {{ y = MatMul (W, x) }}", (2, K, 5), weights=WT
    ),
    "matmul_left_vector": linear_case(
        f"g (float[{K}] x) => (float[{N}] y) {{ y = MatMul (W, x) }}", (K,), weights=WT
    ),
    "matmul_unit_batch": linear_case(
        f"g (float[m, {K}] x) => (float[1, 1, m, {N}] y) {{ y = MatMul (x, W) }}",
        (3, K),
        weights={"W": ternary(1, 1, K, N)},
    ),
    "matmul_unit_batch_small_rank": linear_case(
        f"g (float[b, s, {K}] x) => (float[b, s, {N}] y) {{ y = MatMul (x, W) }}",
        (2, 3, K),
        weights={"W": ternary(1, K, N)},
    ),
    "matmul_unit_batch_vector_opset_11": linear_case(
        f"g (float[{K}] x) => (float[1, {N}] y) {{ y = MatMul (x, W) }}",
        (K,),
        weights={"W": ternary(1, K, N)},
        opset=11,
    ),
    "matmul_unit_batch_left": linear_case(
        f"g (float[{K}, m] x) => (float[1, {N}, m] y) {{ y = MatMul (W, x) }}",
        (K, 5),
        weights={"W": ternary(1, N, K)},
    ),
    "matmul_add": linear_case(
        f"g (float[b, s, {K}] x) => (float[b, s, {N}] y) {{ p = MatMul (x, W) \n y = Add (p, B) }}",
        (2, 3, K),
        weights=W | B,
    ),
    "matmul_add_left": linear_case(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ p = MatMul (x, W) \n y = Add (B, p) }}",
        (3, K),
        weights=W | B,
    ),
    "matmul_add_scalar": linear_case(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ p = MatMul (x, W) \n y = Add (p, B) }}",
        (3, K),
        weights=W | {"B": np.float32(0.25)},
    ),
    "matmul_add_row": linear_case(
        f"g (float[b, {K}] x) => (float[b, {N}] y) {{ p = MatMul (x, W) \n y = Add (p, B) }}",
        (3, K),
        weights=W | {"B": numbers(1, N)},
    ),
    "matmul_add_raises_rank": linear_case(
        f"g (float[b, {K}] x) => (float[1, b, {N}] y) {{ p = MatMul (x, W) \n y = Add (p, B) }}",
        (3, K),
        weights=W | {"B": numbers(1, 1, N)},
    ),
    "matmul_add_read_twice": linear_case(
        f"g (float[b, {K}] x) => (float[b, {N}] y, float[b, {N}] p) {{ p = MatMul (x, W)\ny = Add (p, B) }}",
        (3, K),
        weights=W | B,
    ),
    "matmul_float16": _float16(),
    "matmul_zero_rows": Case(
        build(f"g (float[b, {K}] x) => (float[b, {N}] y) {{ y = MatMul (x, W) }}", W), 1, {"x": numbers(0, K)}
    ),
    "fused_matmul": linear_case(
        f"""g (float[b, {K}, m] x) => (float[b, m, {N}] y) {{
            y = com.microsoft.FusedMatMul <alpha = 0.25, transA = 1, transB = 1> (x, W)
        }}""",
        (2, K, 3),
        weights=WT,
        domains=["com.microsoft"],
    ),
    "fused_matmul_left": linear_case(
        f"""g (float[b, m, {K}] x) => (float[b, {N}, m] y) {{
            y = com.microsoft.FusedMatMul <transA = 1, transB = 1> (W, x)
        }}""",
        (2, 3, K),
        weights=W,
        domains=["com.microsoft"],
    ),
}


def _gemm(attributes: str = "", c: np.ndarray | None = None, *, left: bool = False) -> Case:
    trans_a, trans_b = "transA = 1" in attributes, "transB = 1" in attributes
    names = "W, x" if left else "x, W"
    x_turned, w_turned = (trans_b, trans_a) if left else (trans_a, trans_b)
    if left:
        x = (5, K) if x_turned else (K, 5)
        weight, y = ternary(K, N) if w_turned else ternary(N, K), (N, 5)
    else:
        x = (K, 5) if x_turned else (5, K)
        weight, y = ternary(N, K) if w_turned else ternary(K, N), (5, N)
    weights = {"W": weight} | ({} if c is None else {"C": c})
    inputs = names if c is None else f"{names}, C"
    node = f"y = Gemm <{attributes}> ({inputs})".replace(" <>", "")
    return linear_case(f"g (float{list(x)} x) => (float{list(y)} y) {{ {node} }}", x, weights=weights)


GEMMS = {
    "gemm": _gemm(),
    "gemm_bias": _gemm("transB = 1", numbers(N)),
    "gemm_factors": _gemm("alpha = 2.0, beta = 0.5, transA = 1", numbers(1, N)),
    "gemm_scalar_bias": _gemm("transA = 1, transB = 1", np.array(0.5, np.float32)),
    "gemm_one_bias": _gemm("beta = 2.0", np.array([0.5], np.float32)),
    "gemm_column": _gemm("beta = 2.0", numbers(5, 1)),
    "gemm_matrix": _gemm("transB = 1", numbers(5, N)),
    "gemm_beta_0": _gemm("beta = 0.0", numbers(5, N)),
    "gemm_left": _gemm("alpha = 0.5", numbers(N, 1), left=True),
    "gemm_left_row": _gemm("transA = 1, transB = 1", numbers(5), left=True),
    "gemm_dynamic_c": Case(
        build(
            f"g (float[b, {K}] x, float[b, {N}] c) => (float[b, {N}] y) {{y = Gemm <beta = 0.5> (x, W, c)}}",
            W,
        ),
        1,
        {"x": numbers(4, K), "c": numbers(4, N)},
    ),
}


def _conv(spatial: int, attributes: str = "", bias: bool = False) -> Case:
    dims = ", ".join("hwd"[:spatial])
    weights = {"W": ternary(N, K, *[1] * spatial)} | (B if bias else {})
    names = "x, W, B" if bias else "x, W"
    graph = f"g (float[b, {K}, {dims}] x) => (float[b, {N}, {dims}] y) {{ y = Conv {attributes} ({names}) }}"
    return linear_case(graph, (2, K, 3, 4, 2)[: 2 + spatial], weights=weights)


CONVS = {
    "conv_1d": _conv(1, '<kernel_shape = [1], auto_pad = "SAME_UPPER">'),
    "conv_2d": _conv(
        2, "<kernel_shape = [1, 1], pads = [0, 0, 0, 0], strides = [1, 1], group = 1>", bias=True
    ),
    "conv_3d": _conv(3, bias=True),
}


def _einsum(equation: str, x: tuple[int, ...], w: tuple[int, ...], y: int, converted: int = 1) -> Case:
    order = "W, x" if equation.startswith("W:") else "x, W"
    equation = equation.removeprefix("W:")
    dims = [", ".join("?" for _ in range(rank)) for rank in (len(x), y)]
    graph = (
        f'g (float[{dims[0]}] x) => (float[{dims[1]}] y) {{ y = Einsum <equation = "{equation}"> ({order}) }}'
    )
    return linear_case(graph, x, converted, weights={"W": ternary(*w)})


EINSUMS = {
    "einsum_dense": _einsum("bsd,dn->bsn", (2, 3, K), (K, N), 3),
    "einsum_heads_out": _einsum("bsd,dhk->bshk", (2, 3, K), (K, 2, 3), 4),
    "einsum_heads_in": _einsum("bshk,hkd->bsd", (2, 3, 4, 3), (4, 3, N), 3),
    "einsum_permuted": _einsum("bsd,hkd->hbks", (2, 3, K), (2, 3, K), 4),
    "einsum_ellipsis": _einsum("...d, nd -> ...n", (2, 3, K), (N, K), 3),
    "einsum_ellipsis_middle": _einsum("d...,nd->n...", (K, 2, 3), (N, K), 3),
    "einsum_weight_first": _einsum("W:nd,bd->bn", (3, K), (N, K), 2),
    "einsum_implicit": _einsum("bd,dn", (3, K), (K, N), 2),
    "einsum_vector": _einsum("bd,d->b", (3, K), (K,), 1),
    "einsum_crossed": _einsum("hbk,dkh->bd", (4, 2, 3), (N, 3, 4), 2),
}

_CODES = ternary(K, N, scale=1).astype(np.int8)


def _through(nodes: str, weights: Mapping[str, np.ndarray | onnx.TensorProto], opset: int = 18) -> Case:
    """A MatMul whose weight w comes out of some nodes."""
    graph = f"g (float[b, {K}] x) => (float[b, {N}] y) {{ {nodes} \n y = MatMul (x, w) }}"
    return linear_case(graph, (4, K), weights=weights, opset=opset)


ROADS = {
    "weight_transpose": _through("w = Transpose <perm = [1, 0]> (W)", WT),
    "weight_identity": _through("v = Identity (W) \n w = Identity (v)", W),
    "weight_reshape": _through(
        "w = Reshape (W, shape)", {"W": ternary(K * N), "shape": np.array([0 + K, -1])}
    ),
    "weight_squeeze": _through(
        "v = Squeeze (W, axes) \n w = Transpose (v)", {"W": ternary(1, N, 1, K), "axes": np.array([0, 2])}
    ),
    "weight_squeeze_all_opset_12": _through("w = Squeeze (W)", {"W": ternary(1, K, N, 1)}, opset=12),
    "weight_unsqueeze": _through(
        "v = Unsqueeze (W, axes) \n w = Squeeze (v, axes)", {"W": ternary(K, N), "axes": np.array([-1])}
    ),
    "weight_cast": _through("w = Cast <to = 1> (W)", {"W": ternary(K, N, dtype=np.float16)}),
    "weight_bfloat16": _through("w = Cast <to = 1> (W)", {"W": _tensor(16, ternary(K, N))}),
    "weight_cast_int8": _through(
        "v = Cast <to = 1> (W) \n w = Mul (v, s)", {"W": _CODES, "s": np.float32(0.5)}
    ),
    "weight_dq_tensor": _through(
        "w = DequantizeLinear (W, s, z)", {"W": _CODES + np.int8(3), "s": np.float32(0.5), "z": np.int8(3)}
    ),
    "weight_dq_axis": _through(
        "w = DequantizeLinear <axis = 1> (W, s)",
        {"W": _CODES, "s": np.repeat(np.float32([0.5, 2]), N // 2)},
        opset=13,
    ),
    "weight_dq_blocked_int4": _through(
        f"v = DequantizeLinear <axis = 1, block_size = {K // 2}> (W, s) \n w = Transpose (v)",
        {"W": _tensor(onnx.TensorProto.INT4, _CODES.T), "s": np.full((N, 2), 0.5, np.float32)},
        opset=21,
    ),
    "weight_dq_uint8": _through(
        "w = DequantizeLinear (W, s, z)",
        {"W": (_CODES + 1).astype(np.uint8), "s": np.float32(0.5), "z": np.uint8(1)},
        opset=11,
    ),
    "weight_fake_quantized": _through(
        "q = QuantizeLinear <axis = 1> (W, s, z) \n w = DequantizeLinear <axis = 1> (q, s, z)",
        {"W": ternary(K, N), "s": np.full(N, 0.5, np.float32), "z": np.zeros(N, np.int8)},
        opset=13,
    ),
    "weight_unpacked": _through(
        """shifted = BitShift <direction = "RIGHT"> (W, shifts)
        fields = BitwiseAnd (shifted, mask)
        codes = Reshape (fields, shape)
        numbers = Cast <to = 1> (codes)
        ternary = Sub (numbers, one)
        w = Transpose (ternary)""",
        {
            "W": np.random.default_rng(5)
            .choice([0b00011001, 0b10010001, 0b01100100], (N, K // 4, 1))
            .astype(np.uint8),
            "shifts": np.array([0, 2, 4, 6], np.uint8),
            "mask": np.array(3, np.uint8),
            "shape": np.array([N, K]),
            "one": np.float32(1),
        },
    ),
    "weight_dq_int2": _through(
        "w = DequantizeLinear (W, s)",
        {"W": _tensor(onnx.TensorProto.INT2, _CODES), "s": np.float32(0.5)},
        opset=25,
    ),
    "weight_constant_node": _through(
        f"w = Constant <value = float[{K}, {N}] {{{text(ternary(K, N))}}}> ()",
        {},
    ),
    "weight_constant_floats": _through(
        f"v = Constant <value_floats = [{text(ternary(K * N))}]> ()"
        f"\n shape = Constant <value_ints = [{K}, {N}]> () \n w = Reshape (v, shape)",
        {},
    ),
    "weight_online_chain": _online_chain(),
}

SUBGRAPHS = {
    "if_inner_weight": _subgraph(
        f"""g (bool c, float[b, {K}] x) => (float[b, {N}] y) {{
            y = If (c) <
                then_branch = t () => (float[b, {N}] u) {{
                    v = Constant <value = float[{K}, {N}] {{{text(ternary(K, N))}}}> ()
                    u = MatMul (x, v)
                }},
                else_branch = e () => (float[b, {N}] o) {{ o = MatMul (x, W) }}
            >
        }}""",
        W,
        2,
    ),
    "if_outer_weight_twice": _subgraph(
        f"""g (bool c, float[b, {K}] x) => (float[b, {N}] z) {{
            m = MatMul (x, W)
            y = If (c) <
                then_branch = t () => (float[b, {N}] u) {{ p = MatMul (x, W) \n u = Add (p, B) }},
                else_branch = e () => (float[b, {N}] o) {{ o = Identity (m) }}
            >
            z = Add (y, m)
        }}""",
        W | B,
        2,
    ),
    "loop": _subgraph(
        f"""g (float[b, {K}] x) => (float[b, {K}] y) {{
            y = Loop (trips, yes, x) <
                body = body (int64 i, bool go, float[b, {K}] h) => (bool go_on, float[b, {K}] out) {{
                    go_on = Identity (go)
                    out = MatMul (h, W)
                }}
            >
        }}""",
        {"trips": np.array(2), "yes": np.array(True), "W": ternary(K, K, scale=0.125)},
        1,
    ),
    "scan": _subgraph(
        f"""g (float[3, {K}] x) => (float[3, {N}] y) {{
            y = Scan <num_scan_inputs = 1, body = body (float[{K}] row) => (float[{N}] out) {{
                out = MatMul (row, W)
            }}> (x)
        }}""",
        W,
        1,
        (3, K),
    ),
}

_WEIGHT_IN_BODY = f"""<domain: "local", opset_import: ["" : 18]>
Dense (x) => (y)
{{
    w = Constant <value = float[{K}, {N}] {{{text(ternary(K, N))}}}> ()
    b = Constant <value = float[{N}] {{{text(numbers(N))}}}> ()
    p = MatMul (x, w)
    y = Add (p, b)
}}"""
_WEIGHT_ARGUMENT = """<domain: "local", opset_import: ["" : 18]>
Project (x, weight) => (y)
{
    turned = Transpose <perm = [1, 0]> (weight)
    y = MatMul (x, turned)
}"""

FUNCTIONS = {
    "function_weight_in_body": linear_case(
        f"""g (float[b, {K}] x) => (float[b, {N}] y) {{
            p = local.Dense (x)
            q = local.Dense (x)
            y = Add (p, q)
        }}""",
        (3, K),
        weights={},
        domains=["local"],
        functions=_WEIGHT_IN_BODY,
    ),
    "function_weight_argument": linear_case(
        f"""g (float[b, {K}] x) => (float[b, {N}] y) {{
            p = local.Project (x, W)
            y = local.Project (p, V)
        }}""",
        (3, K),
        2,
        weights={"W": ternary(K, K), "V": ternary(N, K)},
        domains=["local"],
        functions=_WEIGHT_ARGUMENT,
    ),
}

SHARED = {
    "tied_embedding": Case(
        build(
            f"""g (int64[b] ids) => (float[b, {N}] y) {{
                x = Gather (W, ids)
                t = Transpose <perm = [1, 0]> (W)
                y = MatMul (x, t)
            }}""",
            WT,
        ),
        1,
        {"ids": np.array([0, 3, 5])},
    ),
    "shared_weight": linear_case(
        f"""g (float[b, {K}] x) => (float[b, {K}] y) {{
            p = MatMul (x, W)
            q = MatMul (p, W)
            y = Gemm (q, W, B)
        }}""",
        (3, K),
        3,
        weights={"W": ternary(K, K), "B": numbers(K)},
    ),
    "overridable_in_ir_3": linear_case(
        f"g (float[b, {K}] x, float[{K}, {N}] W) => (float[b, {N}] y) {{ y = MatMul (x, W) }}",
        (3, K),
        weights=W,
        opset=11,
        ir_version=3,
    ),
    "names_duplicate_and_empty": linear_case(
        f"""g (float[b, {K}] x) => (float[b, {K}] y) {{
            [same] p = MatMul (x, W)
            [y] q = Relu (p)
            [same] r = MatMul (q, W)
            y = MatMul (r, W)
        }}""",
        (3, K),
        3,
        weights={"W": ternary(K, K)},
    ),
}

GRAPHS: dict[str, Case] = (
    MATMULS | GEMMS | CONVS | EINSUMS | ROADS | SUBGRAPHS | FUNCTIONS | SHARED  # type: ignore[operator]
)
