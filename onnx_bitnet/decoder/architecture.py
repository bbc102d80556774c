"""The geometry of a decoder: what BitNet b1.58 and Llama-like models have in common, and what not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_bitnet.errors import ModelError

_ACTIVATIONS = {"relu2": "relu2", "silu": "silu", "swish": "silu"}
_MODEL_TYPES = {"bitnet": (1e-5, 500000.0), "llama": (1e-6, 10000.0)}
"""What transformers takes for rms_norm_eps and rope_theta where config.json does not say them."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Args:
        theta: base of the frequencies.
        kind: `default`, `linear` (positions are divided by `factor`) or `llama3` (low frequencies are).
        factor: see kind.
        low: llama3's low_freq_factor.
        high: llama3's high_freq_factor.
        context: llama3's original_max_position_embeddings.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    context: int = 8192

    def frequencies(self, size: int) -> np.ndarray:
        """Return the angle per position of each pair of a head of `size`, float32 (size / 2,)."""
        frequency = 1 / self.theta ** (np.arange(0, size, 2) / size)
        if self.kind == "linear":
            frequency /= self.factor
        elif self.kind == "llama3":
            turns = self.context * frequency / (2 * math.pi)
            smooth = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
            frequency = frequency * (smooth + (1 - smooth) / self.factor)
        return frequency.astype(np.float32)

    def tables(self, size: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and sines, float32 (positions, size / 2)."""
        angles = np.outer(np.arange(positions, dtype=np.float32), self.frequencies(size))
        return np.cos(angles), np.sin(angles)


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, grouped-query attention and a gated feed-forward layer.

    Args:
        name: of the model, for its file.
        layers: how many.
        hidden: width of the residual stream.
        ffn: width of the feed-forward layer.
        heads: of queries.
        kv_heads: of keys and values, a divisor of `heads`.
        head_size: width of a head, a multiple of 16.
        vocabulary: tokens.
        rope: rotary embedding.
        positions: longest sequence.
        activation: of the gate, `relu2` (squared ReLU) or `silu`.
        epsilon: of RMSNorm.
        sub_norms: BitNet b1.58: one more RMSNorm before o_proj and one before down_proj.
        input_epsilon: of an RMSNorm inside each BitLinear (`use_rms_norm` in its quantization_config); None
            where it has none.
        tied: the head is the embedding.
        activation_bits: of quantized activations: 8 as BitLinear has them, 16 where the layers were plain.
        bos: token that begins a text, if there is one.
        eos: tokens that end it.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    rope: Rope = Rope(10000.0)
    positions: int = 2048
    activation: str = "silu"
    epsilon: float = 1e-5
    sub_norms: bool = False
    input_epsilon: float | None = None
    tied: bool = False
    activation_bits: int = 8
    bos: int | None = None
    eos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        counts = (self.layers, self.hidden, self.ffn, self.heads, self.kv_heads, self.vocabulary)
        if min(*counts, self.positions) < 1:
            raise ModelError(f"{self.name}: every size must be positive: {self}")
        if self.head_size % 16 or self.head_size < 16:
            raise ModelError(
                f"{self.name}: heads of size {self.head_size} are not built; GroupQueryAttention of "
                "onnxruntime wants a multiple of 16"
            )
        if self.heads % self.kv_heads:
            raise ModelError(f"{self.name}: {self.heads} heads cannot share {self.kv_heads} of keys")

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str) -> Architecture:
        """Read a Hugging Face config.json.

        Raises:
            ModelError: it is of an architecture that is not built, or lacks a size.
        """
        kind = config.get("model_type")
        if kind not in _MODEL_TYPES:
            raise ModelError(
                f"{name}: architecture {kind!r} is not built; only {' and '.join(_MODEL_TYPES)} are. "
                "Export it with torch.onnx.export and use `onnx-bitnet convert`"
            )
        activation = config.get("hidden_act")
        if activation not in _ACTIVATIONS:
            raise ModelError(f"{name}: activation {activation!r} is not built; only relu2 and silu are")
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ModelError(f"{name}: linear layers with biases are not built")
        quantization = config.get("quantization_config") or {}
        heads, hidden = (_size(config, name, key) for key in ("num_attention_heads", "hidden_size"))
        eos = config.get("eos_token_id")
        inner = quantization.get("use_rms_norm")
        return cls(
            name=name,
            layers=_size(config, name, "num_hidden_layers"),
            hidden=hidden,
            ffn=_size(config, name, "intermediate_size"),
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            vocabulary=_size(config, name, "vocab_size"),
            rope=_rope(config, name),
            positions=config.get("max_position_embeddings", 2048),
            activation=_ACTIVATIONS[activation],
            epsilon=config.get("rms_norm_eps", _MODEL_TYPES[kind][0]),
            sub_norms=kind == "bitnet",
            input_epsilon=quantization.get("rms_norm_eps", 1e-6) if inner else None,
            tied=bool(config.get("tie_word_embeddings")),
            activation_bits=8 if quantization or kind == "bitnet" else 16,
            bos=config.get("bos_token_id"),
            eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )

    def replace(self, **changes: Any) -> Architecture:
        """Return a copy with other values."""
        return dataclasses.replace(self, **changes)


def _size(config: Mapping[str, Any], name: str, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ModelError(f"{name}: config.json says {key} = {value!r}, which is no number of anything")
    return value


def _rope(config: Mapping[str, Any], name: str) -> Rope:
    entries = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = entries.get("rope_type", entries.get("type", "default"))
    usual = _MODEL_TYPES[config["model_type"]][1]
    theta = float(entries.get("rope_theta", config.get("rope_theta", usual)))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, float(entries["factor"]))
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return Rope(theta, kind, *(entries[entry] for entry in names))
    raise ModelError(f"{name}: rotary embedding {kind!r} is not built; only default, linear and llama3 are")


GEOMETRIES = {
    "bitnet-2b4t": Architecture(
        name="bitnet-b1.58-2B-4T",
        layers=30,
        hidden=2560,
        ffn=6912,
        heads=20,
        kv_heads=5,
        head_size=128,
        vocabulary=128256,
        rope=Rope(500000.0),
        positions=4096,
        activation="relu2",
        sub_norms=True,
        tied=True,
        bos=128000,
        eos=(128001,),
    ),
    "falcon3-1b": Architecture(
        name="falcon3-1b-1.58",
        layers=18,
        hidden=2048,
        ffn=8192,
        heads=8,
        kv_heads=4,
        head_size=256,
        vocabulary=131072,
        rope=Rope(1000042.0),
        positions=4096,
        epsilon=1e-6,
        eos=(11,),
    ),
    "tiny": Architecture(
        name="tiny",
        layers=2,
        hidden=64,
        ffn=160,
        heads=4,
        kv_heads=2,
        head_size=16,
        vocabulary=256,
        rope=Rope(10000.0),
        positions=256,
        activation="relu2",
        sub_norms=True,
        tied=True,
    ),
}
