"""What few bits cost a language model: SmolLM2-135M packed, and by onnxruntime's own quantizers.

    python bench/perplexity.py [--rows 32] [--calibration 64] [--only NAME ..]

The perplexity is that of the same rows of Python's reference text for all. Ours are rounded without data,
and with data (rounding gptq, on rows of other topics). All 210 layers are quantized; the head, which is the
embedding, is float everywhere. HQQ needs torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnx_bitnet as bn

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import smollm2

HEAD = ("output", "keep")
ROTATED = {"mode": "ternary", "rotation": "hadamard:64", "rules": [HEAD]}
T5 = {"format": "t5", "granularity": "block:128"}


def integers(action: str, granularity: str, **more: Any) -> dict[str, Any]:
    """Return the recipe of int4 or int8 everywhere."""
    return {"rules": [HEAD, {"action": action, "granularity": granularity}], **more}


OURS: dict[str, dict[str, Any]] = {
    "ternary": {"mode": "ternary", "rules": [HEAD]} | T5,
    "ternary, rotated": ROTATED | T5,
    "four levels": {"mode": "ternary", "rules": [HEAD], "levels": 4, "granularity": "block:64"},
    "four levels, rotated": ROTATED | {"levels": 4, "granularity": "block:64"},
    "2 planes": {"mode": "ternary", "rules": [HEAD], "planes": 2} | T5,
    "2 planes, rotated": ROTATED | T5 | {"planes": 2},
    "2 planes, rotated, A8": ROTATED | T5 | {"planes": 2, "activation_bits": 8},
    "int4 block:128": integers("int4", "block:128"),
    "int4 block:128, rotated": integers("int4", "block:128", rotation="hadamard:64"),
    "int4 block:128, rotated, A8": integers("int4", "block:128", rotation="hadamard:64", activation_bits=8),
    "int4 block:32, rotated": integers("int4", "block:32", rotation="hadamard:64"),
    "int8": integers("int8", "channel"),
    "int8, A8": integers("int8", "channel", activation_bits=8),
}


def _default(bits: int, block: int, symmetric: bool) -> Any:
    from onnxruntime.quantization import matmul_nbits_quantizer as q

    return q.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)


def _hqq(bits: int, block: int) -> Any:
    from onnxruntime.quantization import matmul_nbits_quantizer as q

    return q.HQQWeightOnlyQuantConfig(block_size=block, bits=bits)


PEERS: dict[str, Callable[[], Any]] = {
    "ORT 2-bit block 128": lambda: _default(2, 128, False),
    "ORT 2-bit block 32": lambda: _default(2, 32, False),
    "ORT 2-bit block 64, HQQ": lambda: _hqq(2, 64),
    "ORT 4-bit block 128": lambda: _default(4, 128, False),
    "ORT 4-bit block 32, symmetric": lambda: _default(4, 32, True),
    "ORT 4-bit block 128, HQQ": lambda: _hqq(4, 128),
    "ORT 8-bit block 128": lambda: _default(8, 128, False),
}


def peer(config: Any, source: Path, target: Path) -> float:
    """Write the model by onnxruntime's quantizer and return its bits per weight."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # a line for each layer
    try:
        quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=config.bits, algo_config=config)
        quantizer.process()
    finally:
        logging.disable(disabled)
    quantizer.model.save_model_to_file(str(target))
    graph = quantizer.model.model.graph
    sizes = {tensor.name: onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type == "MatMulNBits"]
    attributes = [{item.name: item.i for item in node.attribute} for node in layers]
    weights = sum(item["K"] * item["N"] for item in attributes)
    return 8 * sum(sizes[name] for node in layers for name in node.input[1:] if name) / weights


def ours(recipe: dict[str, Any], source: Path, target: Path, data: object) -> float:
    """Write the packed model and return its bits per weight."""
    report = bn.convert(source, target, recipe, data=data, force=True)
    weights = sum(layer.n * layer.k for layer in report.converted)
    return 8 * sum(layer.packed_bytes for layer in report.converted) / weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32, help="of 128 tokens, to measure on")
    parser.add_argument("--calibration", type=int, default=64, help="rows to calibrate with")
    parser.add_argument("--only", nargs="+", choices=["float32", *OURS, *PEERS], metavar="NAME", default=())
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    calibration, evaluation = smollm2.rows(arguments.calibration, arguments.rows)
    batches = [{"input_ids": part} for part in np.array_split(calibration, -(-len(calibration) // 4))]

    def measured(path: Path) -> str:
        perplexity = smollm2.perplexity(bn.session(path, threads=arguments.threads), evaluation)
        return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.1e}"

    def wanted(name: str) -> bool:
        return not arguments.only or name in arguments.only

    print(f"| recipe | bits per weight | perplexity, rounded | calibrated ({evaluation.size} tokens) |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source, packed = Path(folder, "smollm2.onnx"), Path(folder, "packed.onnx")
        onnx.save(smollm2.build(), source)
        if wanted("float32"):
            print(f"| float32 | 32 | {measured(source)} | |", flush=True)
        for name, config in PEERS.items():
            if wanted(name) and (importlib.util.find_spec("torch") or "HQQ" not in name):
                bits = peer(config(), source, packed)
                print(f"| {name} | {bits:.2f} | {measured(packed)} | |", flush=True)
        for name in filter(wanted, OURS):
            cells = []
            for data in (None, batches):
                bits = ours(OURS[name], source, packed, data)
                cells.append(measured(packed))
            print(f"| {name} | {bits:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
