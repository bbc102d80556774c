"""`load_weights`: tell by the path which of the readers it takes."""

from __future__ import annotations

from pathlib import Path

from onnx_bitnet.errors import ModelError
from onnx_bitnet.weights.checkpoint import LINEAR_CLASSES, load_checkpoint
from onnx_bitnet.weights.gguf_header import is_gguf
from onnx_bitnet.weights.gguf_weights import load_gguf
from onnx_bitnet.weights.mapping import Weights


def load_weights(path: str | Path, *, linear_class: str | None = None) -> Weights:
    """Read the few-bit weights of a published model, tensor by tensor as they are asked for.

    Takes a Hugging Face checkpoint: its folder, a `.safetensors` file, or the index of a sharded one. Weights
    may be packed (uint8 with `weight_scale`), exactly ternary floats, or float master weights, which are
    rounded as BitLinear rounds them on line: by the mean magnitude of the whole matrix. Or a GGUF file, whose
    tensors of I2_S, TQ1_0, TQ2_0, Q2_0 and PQ2_0 become Quantized.

    >>> weights = load_weights("bitnet-b1.58-2B-4T")                            # doctest: +SKIP
    >>> weights["model.layers.0.mlp.up_proj.weight"].dequantize().shape         # doctest: +SKIP
    (6912, 2560)

    Args:
        path: folder or file.
        linear_class: which way `weight_scale` goes, where config.json does not say it: `bitlinear` divides by
            it, `autobitlinear` multiplies.

    Returns:
        Mapping from name to Quantized; `.others` holds the remaining tensors as arrays (quantized ones of
        GGUF need the package `gguf`), `.metadata` the model's config or the keys of the GGUF file.

    Raises:
        ModelError: nothing is there, part of it is missing or damaged, or it contradicts itself. What
            concerns one tensor alone is raised when that is asked for.
    """
    path = Path(path)
    if linear_class is not None and linear_class not in LINEAR_CLASSES:
        raise ModelError(f"linear_class {linear_class!r} does not exist; use {' or '.join(LINEAR_CLASSES)}")
    if not path.exists():
        raise ModelError(f"{path}: there is no such file or folder")
    return load_gguf(path) if is_gguf(path) else load_checkpoint(path, linear_class)
