"""Times whole models side by side: ONNX Runtime in fp32, dynamic int8 and 2 bits, and this package.

    python bench/models.py [minilm] [digits] [layer] [bert] [qwen] [--threads 1 2] [--rounds 30]

All variants of a model are made from the same float file, whose linear layers are exactly ternary, so that
the 2-bit ones hold the same weights; int4 and int8 gain nothing from that. In every round each variant in
turn runs once to warm up and then for about 20 ms; the table has the medians in ms, and rows per second of
the fastest of ours (tokens, for encoders). Thread pools stop spinning after each run. bert and qwen are
encoders of BitLinear layers on 8 texts of 512 tokens, which take seconds a run and only run when asked for.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from timing import open_session, print_row, print_table_head

import onnx_bitnet as bn
from onnx_bitnet import reference
from onnx_bitnet.timing import memory, peers
from onnx_bitnet.timing.bench import in_turns

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import digits
import encoders
import machine
import minilm

BLOCK = 128
Feeds = dict[str, np.ndarray]


def minilm_model() -> tuple[onnx.ModelProto, dict[str, Feeds]]:
    texts = minilm.sentences()[1]
    return minilm.build(ternary=True), {
        f"{batch} x 128 tokens": minilm.tokenize(texts[:batch], length=128) for batch in (1, 32)
    }


def digits_model() -> tuple[onnx.ModelProto, dict[str, Feeds]]:
    training, test = digits.splits()
    model = digits.build(digits.train(training))
    return model, {f"batch {m}": {"pixels": test.images[:m]} for m in (1, 64)}


def layer_model() -> tuple[onnx.ModelProto, dict[str, Feeds]]:
    rng = np.random.default_rng(0)
    weight = rng.integers(-1, 2, (2560, 2560)).astype(np.float32) * np.float32(0.02)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="layer")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", 2560])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 2560])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return model, {f"m = {m}": {"x": rng.normal(size=(m, 2560)).astype(np.float32)} for m in (1, 8, 128)}


def encoder_model(kind: str) -> tuple[onnx.ModelProto, dict[str, Feeds]]:
    of = encoders.GEOMETRIES[kind]
    return encoders.build(of), {"8 x 512 tokens": encoders.feeds(of, [512] * 8)}


MODELS: dict[str, Callable[[], tuple[onnx.ModelProto, dict[str, Feeds]]]] = {
    "minilm": minilm_model,
    "digits": digits_model,
    "layer": layer_model,
    "bert": partial(encoder_model, "bert"),
    "qwen": partial(encoder_model, "qwen"),
}
DEFAULT = ["minilm", "digits", "layer"]


def float_variant(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def two_bit_variant(source: Path, target: Path) -> None:
    """Spell each MatMul with ternary weights as MatMulNBits with the same values in 2 bits."""
    model = onnx.load(source)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            continue
        name = node.input[1]
        weight = numpy_helper.to_array(weights[name]).T
        scale = np.abs(weight).max(axis=1, keepdims=True)
        codes = np.rint(weight / scale)
        if not np.array_equal(codes * scale, weight):
            continue
        n, k = weight.shape
        blocks = -(-k // BLOCK)
        padded = np.pad(codes + 1, ((0, 0), (0, blocks * BLOCK - k)), constant_values=1)
        tensors = {
            f"{name}.codes": reference.pack_i2s(padded.reshape(n, blocks, BLOCK)),
            f"{name}.scale": np.repeat(scale, blocks, axis=1).reshape(-1),
            f"{name}.zero_point": np.full(n * -(-blocks // 4), 0b01010101, np.uint8),
        }
        model.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in tensors.items())
        model.graph.initializer.remove(weights[name])
        attributes = {"K": k, "N": n, "bits": 2, "block_size": BLOCK, "accuracy_level": 4}
        product = helper.make_node(
            "MatMulNBits",
            [node.input[0], *tensors],
            node.output,
            node.name,
            domain="com.microsoft",
            **attributes,
        )
        node.CopyFrom(product)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, target)


def our_variant(activation_bits: int) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        report = bn.convert(source, target, bn.Recipe(mode="lossless", activation_bits=activation_bits))
        assert report.lossless

    return write


def integer_variant(action: str) -> Callable[[Path, Path], None]:
    """Store every layer in 4 or 8 bits, with activations of 8."""

    def write(source: Path, target: Path) -> None:
        bn.convert(source, target, bn.Recipe(rules=(bn.Rule(action=action),), activation_bits=8))

    return write


VARIANTS: dict[str, Callable[[Path, Path], None]] = {
    "ORT fp32": float_variant,
    "ORT int8": peers.int8,
    "ORT 2-bit": two_bit_variant,
    "ours A8": our_variant(8),
    "ours A16": our_variant(16),
    "ours int4 A8": integer_variant("int4"),
    "ours int8 A8": integer_variant("int8"),
}


def agreement(y: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the relative L2 distance of the last output from the one in fp32."""
    return float(np.linalg.norm(y[-1] - expected[-1]) / np.linalg.norm(expected[-1]))


def rows(feeds: Feeds) -> int:
    """Return how many rows the linear layers see: images, or tokens."""
    first = next(iter(feeds.values()))
    return first.size if first.dtype == np.int64 else first.shape[0]


def file_bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in path.parent.glob(path.name + "*"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default: {', '.join(DEFAULT)}")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    unknown = set(arguments.models) - set(MODELS)
    if unknown:
        parser.error(f"unknown model {', '.join(sorted(unknown))}; use {', '.join(MODELS)}")

    logging.disable(logging.WARNING)  # the int8 quantizer's advice
    machine.print_header(machine.describe(arguments.threads))
    print_table_head("model", "input", "threads", *(f"{name}, ms" for name in VARIANTS), "rows/s")
    facts = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models or DEFAULT:
            model, inputs = MODELS[name]()
            source = Path(folder) / f"{name}.onnx"
            onnx.save(model, source)
            paths = [Path(folder) / f"{name}.{index}.onnx" for index in range(len(VARIANTS))]
            for write, path in zip(VARIANTS.values(), paths, strict=True):
                write(source, path)
            facts.append((name, "file, MB", *(f"{file_bytes(path) / 1e6:.2f}" for path in paths)))
            for threads in arguments.threads:
                sessions = [open_session(path, threads) for path in paths]
                for label, feeds in inputs.items():
                    runs = [partial(session.run, None, feeds) for session in sessions]
                    times = [took.median for took in in_turns(runs, arguments.rounds)]
                    print_row(
                        name,
                        label,
                        threads,
                        *(f"{1e3 * t:.3f}" for t in times),
                        f"{rows(feeds) / min(times[3:]):.0f}",
                    )
            peaks = [memory.peak(path, feeds, threads) for path in paths]
            facts.append(
                (name, "memory, MB", *("-" if peak is None else f"{peak / 1e6:.1f}" for peak in peaks))
            )
            outputs = [session.run(None, feeds) for session in sessions]
            facts.append((name, "error", *(f"{agreement(y, outputs[0]):.1e}" for y in outputs)))
    print("\nFiles; peak memory of opening and running the last input; relative L2 distance from fp32:\n")
    print_table_head("model", "", *VARIANTS)
    for fact in facts:
        print_row(*fact)


if __name__ == "__main__":
    main()
