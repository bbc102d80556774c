"""Hugging Face checkpoints of BitNet and of other ternary models.

A linear layer is stored in one of these ways, and is the same matrix W = scale * T in the end:

    packed    uint8 (N / 4, K) and weight_scale: byte [r, k] holds T + 1 of rows r, N/4 + r, 2N/4 + r and
              3N/4 + r in two bits each, lowest first. BitLinear divides by weight_scale, AutoBitLinear
              multiplies.
    unpacked  floats -1, 0, 1 and weight_scale
    ternary   floats -s, 0, s of a tensor, a row or a block of inputs
    master    any floats; BitLinear on line rounds them to rint(W / m), clipped, times m, the mean of |W|
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_bitnet.errors import ModelError, one_line
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.quantization.detect import check_weight, detect
from onnx_bitnet.quantization.quantize import quantize_layer
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.weights.mapping import Weights
from onnx_bitnet.weights.shards import Shards

LINEAR_CLASSES = ("bitlinear", "autobitlinear")
_FLOATS = ("F32", "F16", "BF16")
_NO_LINEAR = re.compile(r"(^|\.)(embed_\w+|\w*embeddings?|lm_head|wte|wpe)\.weight")
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
_SCALE = "_scale"


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint was quantized, from `quantization_config` in its config.json.

    Args:
        linear_class: `bitlinear` or `autobitlinear`; None where nothing says it.
        online: the forward pass rounds master weights.
        kept: names of modules that are not quantized.
    """

    linear_class: str | None
    online: bool = False
    kept: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], path: Path, linear_class: str | None) -> Scheme:
        """Read a config; `linear_class` fills in what it does not say.

        Raises:
            ModelError: it is of another method, or says something else than `linear_class`.
        """
        entries = config.get("quantization_config")
        if entries is None:
            return cls(linear_class)
        if entries.get("quant_method") != "bitnet":
            raise ModelError(
                f"{path}: quantized by {entries.get('quant_method')!r}, which cannot be read; "
                "use the checkpoint it was made from"
            )
        said = entries.get("linear_class", LINEAR_CLASSES[0])
        if said not in LINEAR_CLASSES or linear_class not in (None, said):
            raise ModelError(
                f"{path}: linear_class is {said!r} in config.json; it must be "
                f"{linear_class or ' or '.join(LINEAR_CLASSES)}"
            )
        online = said == LINEAR_CLASSES[1] and entries.get("quantization_mode") == "online"
        return cls(said, online, tuple(entries.get("modules_to_not_convert") or ()))

    def quantizes(self, name: str) -> bool:
        """Whether a matrix of this name is the weight of a quantized layer."""
        module = name.removesuffix(".weight")
        kept = any(f".{module}.".find(f".{part}.") >= 0 for part in self.kept)
        return name.endswith(".weight") and not kept and not _NO_LINEAR.search(name)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return what config.json, or another file beside it, says; nothing if there is none.

    Raises:
        ModelError: it is no JSON object.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not JSON: {one_line(error)}; download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not the config of a model; download it again")
    return config


def load_checkpoint(path: Path, linear_class: str | None = None) -> Weights:
    """Read a checkpoint; see load_weights."""
    shards = Shards(path)
    config = read_config(shards.folder)
    scheme = Scheme.of(config, path, linear_class)
    names = shards.names()
    _check_layers(path, config, names)
    weights, others = {}, {}
    for name in names:
        matrix = len(shards.shape(name)) == 2 and scheme.quantizes(name)
        if matrix and shards.dtype(name) in ("U8", *_FLOATS):
            weights[name] = partial(_load, shards, name, scheme)
            if shards.dtype(name) == "U8" and name + _SCALE not in names:
                raise ModelError(
                    f"{path}: {name + _SCALE!r} is missing, without which packed weights mean nothing; "
                    "download the checkpoint again"
                )
        elif not name.endswith(_SCALE):
            others[name] = partial(shards.array, name)
    return Weights(path, weights, others, config)


def _check_layers(path: Path, config: Mapping[str, Any], names: list[str]) -> None:
    """Raise ModelError unless the layers that the config counts are there."""
    there = {int(match[2]) for match in map(_LAYER.search, names) if match}
    count = config.get("num_hidden_layers")
    lost = sorted(set(range(count)) - there) if there and isinstance(count, int) else []
    if lost:
        raise ModelError(
            f"{path}: half a checkpoint: nothing of layer {lost[0]} is there, {len(lost)} of {count} layers "
            "are missing; download the rest"
        )


def _load(shards: Shards, name: str, scheme: Scheme) -> Quantized:
    weight = shards.array(name)
    where = f"{shards.path}: {name!r}"
    scale = shards.array(name + _SCALE) if name + _SCALE in shards.names() else None
    if weight.dtype == np.uint8:
        assert scale is not None  # load_checkpoint saw it
        return _scaled(where, _unpack(where, weight), scale, scheme)
    check_weight(weight, where)
    exact = None if scheme.online else detect(weight)
    if scale is not None:
        if exact is None or exact.block_size or not ((exact.scale == 1) | (exact.scale == 0)).all():
            raise ModelError(
                f"{where}: weight_scale contradicts the weights, which are not -1, 0 and 1; "
                "one of the two is from another checkpoint"
            )
        codes = (np.sign(weight.astype(np.float32)) + 1).astype(np.uint8)
        return _scaled(where, codes, scale, scheme)
    return quantize_layer(weight, LayerSpec(granularity="tensor", rounding="absmean", exact=exact))


def _unpack(where: str, packed: np.ndarray) -> np.ndarray:
    """Return codes uint8 (N, K) of rows packed four to a byte, N / 4 apart."""
    codes = np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    if (codes == 3).any():
        raise ModelError(f"{where}: holds code 3, which stands for no ternary weight; the file is damaged")
    return codes


def _scaled(where: str, codes: np.ndarray, scale: np.ndarray, scheme: Scheme) -> Quantized:
    """Pack codes (N, K) with weight_scale, which is one number or one for each output."""
    n, k = codes.shape
    if scheme.linear_class is None:
        raise ModelError(
            f"{where}: no config.json says whether weight_scale multiplies or divides; "
            "give linear_class: 'autobitlinear' (multiplies) or 'bitlinear' (divides)"
        )
    values = scale.astype(np.float32).reshape(-1)
    if values.size not in (1, n) or not (np.isfinite(values) & (values > 0)).all():
        raise ModelError(
            f"{where}: weight_scale contradicts the weights: shape {list(scale.shape)}, "
            f"{values.min(initial=np.inf)} to {values.max(initial=-np.inf)}, where {n} outputs want one or "
            f"{n} positive numbers"
        )
    if scheme.linear_class == LINEAR_CLASSES[0]:
        values = np.float32(1) / values
    return Quantized(
        "i2s",
        n,
        k,
        0,
        FORMATS["i2s"].pack(codes)[None],
        values.reshape(1, -1, 1),
        np.ones((1, 1, 1), np.float32),
        lossless=True,
        zeros=float((codes == 1).mean()),
    )
