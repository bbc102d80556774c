"""Times the attention of many heads: the nodes that exporters write, onnxruntime's own op, and ours.

    python bench/attention.py [--shapes 1x128x12x32 32x128x12x32] [--threads 1 2] [--seconds 2]

A shape is batch x tokens x heads x width. Each batch has a mask that all heads and rows share. All three get
q, k and v as (batch, tokens, heads * width), run in turns and must agree within 1e-5. Shortest times, and
medians in brackets.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import machine
import numpy as np
import onnx
from onnx import helper, numpy_helper
from timing import open_session, print_row, print_table_head

import onnx_bitnet as bn
from onnx_bitnet.timing.bench import TURN, in_turns

SHAPES = ((1, 128, 12, 32), (32, 128, 12, 32), (8, 512, 12, 64), (1, 2048, 16, 64))
VARIANTS = ("nodes", "MultiHeadAttention", "ours")
Shape = tuple[int, int, int, int]


def spelled() -> list[onnx.NodeProto]:
    """Return attention as exporters write it."""
    node = helper.make_node
    nodes = [node("Reshape", [x, "split"], [f"{x}_heads"]) for x in "qkv"]
    nodes += [
        node("Transpose", [f"{x}_heads"], [f"{x}_turned"], perm=[0, 2, 3, 1] if x == "k" else [0, 2, 1, 3])
        for x in "qkv"
    ]
    return [
        *nodes,
        node("MatMul", ["q_turned", "k_turned"], ["products"]),
        node("Div", ["products", "divisor"], ["scaled"]),
        node("Add", ["scaled", "mask"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v_turned"], ["weighed"]),
        node("Transpose", ["weighed"], ["turned"], perm=[0, 2, 1, 3]),
        node("Reshape", ["turned", "join"], ["y"]),
    ]


def fused_by_onnxruntime(heads: int) -> list[onnx.NodeProto]:
    """Return its contrib op, whose mask is for each row."""
    inputs = ["q", "k", "v", "", "", "mask_of_rows"]
    return [
        helper.make_node("Shape", ["scores_like"], ["shape"]),
        helper.make_node("Expand", ["mask", "shape"], ["mask_of_rows"]),
        helper.make_node("MultiHeadAttention", inputs, ["y"], domain="com.microsoft", num_heads=heads),
    ]


def write(path: Path, nodes: list[onnx.NodeProto], shape: Shape) -> None:
    """Write a model of some nodes with inputs q, k, v and mask."""
    _, tokens, heads, width = shape
    constants = {
        "split": np.array([0, 0, heads, width]),
        "join": np.array([0, 0, heads * width]),
        "divisor": np.float32(width**0.5),
        "scores_like": np.zeros((1, 1, tokens, 1), np.float32),
    }
    shapes = {x: ["batch", "tokens", heads * width] for x in "qkv"} | {"mask": ["batch", 1, 1, "tokens"]}
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims) for name, dims in shapes.items()],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def feeds_of(shape: Shape) -> dict[str, np.ndarray]:
    """Return random q, k and v; each batch has its last tokens masked."""
    batch, tokens, heads, width = shape
    rng = np.random.default_rng(0)
    feeds = {x: rng.normal(size=(batch, tokens, heads * width)).astype(np.float32) for x in "qkv"}
    there = np.arange(tokens) < rng.integers(tokens // 2, tokens + 1, (batch, 1, 1, 1))
    return feeds | {"mask": np.where(there, 0, -1e9).astype(np.float32)}


def parse(text: str) -> Shape:
    batch, tokens, heads, width = map(int, text.split("x"))
    return batch, tokens, heads, width


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=parse, nargs="+", default=SHAPES, metavar="BxTxHxW")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each variant")
    arguments = parser.parse_args()

    machine.print_header(machine.describe(arguments.threads))
    print_table_head("shape", "threads", *(f"{name}, us" for name in VARIANTS), "best of others / ours")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.onnx") for name in VARIANTS]
        for shape in arguments.shapes:
            write(paths[0], spelled(), shape)
            write(paths[1], fused_by_onnxruntime(shape[2]), shape)
            bn.convert(paths[0], paths[2], bn.Recipe(attention="fused"), force=True)
            feeds = feeds_of(shape)
            for threads in arguments.threads:
                sessions = [open_session(path, threads) for path in paths]
                results = [session.run(None, feeds)[0] for session in sessions]
                assert all(np.allclose(results[0], other, atol=1e-5) for other in results), "results differ"
                works = [partial(session.run, None, feeds) for session in sessions]
                times = in_turns(works, max(3, round(arguments.seconds / TURN)))
                cells = [f"{1e6 * took.least:.0f} ({1e6 * took.median:.0f})" for took in times]
                *others, ours = times
                ratio = min(took.least for took in others) / ours.least
                middle = min(took.median for took in others) / ours.median
                name = "x".join(map(str, shape))
                print_row(name, threads, *cells, f"{ratio:.2f} ({middle:.2f})")


if __name__ == "__main__":
    main()
