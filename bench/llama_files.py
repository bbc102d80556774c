"""Writes a ternary model with random weights as llama.cpp reads it: bench/decoder.py's peer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnx_bitnet.decoder import Architecture

HEAD = "Q4_0"
_ALPHABET = 3 + 256  # three special tokens and the bytes come before the other tokens
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # kinds of token


def write(path: Path, of: Architecture, kind: str) -> None:
    """Write a model of the architecture `bitnet` whose layers are of one of TYPES."""
    import gguf

    writer = gguf.GGUFWriter(path, "bitnet")
    writer.add_block_count(of.layers)
    writer.add_context_length(of.positions)
    writer.add_embedding_length(of.hidden)
    writer.add_feed_forward_length(of.ffn)
    writer.add_head_count(of.heads)
    writer.add_head_count_kv(of.kv_heads)
    writer.add_layer_norm_rms_eps(of.epsilon)
    writer.add_rope_freq_base(of.rope.theta)
    writer.add_rope_dimension_count(of.head_size)
    writer.add_vocab_size(of.vocabulary)
    _add_tokens(writer, of.vocabulary)
    rng = np.random.default_rng(0)
    for name, shape in _tensors(of):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        stored = HEAD if name.startswith("token") else kind
        writer.add_tensor(name, _blocks(rng, *shape, stored), raw_dtype=gguf.GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokens(writer: Any, vocabulary: int) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{index}" for index in range(_ALPHABET, vocabulary)]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256 + [_NORMAL] * (vocabulary - _ALPHABET)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(of: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    q, kv = of.heads * of.head_size, of.kv_heads * of.head_size
    yield "token_embd.weight", (of.vocabulary, of.hidden)
    yield "output_norm.weight", (of.hidden,)
    for index in range(of.layers):
        for name, shape in {
            "attn_norm": (of.hidden,),
            "attn_q": (q, of.hidden),
            "attn_k": (kv, of.hidden),
            "attn_v": (kv, of.hidden),
            "attn_sub_norm": (q,),
            "attn_output": (of.hidden, q),
            "ffn_norm": (of.hidden,),
            "ffn_gate": (of.ffn, of.hidden),
            "ffn_up": (of.ffn, of.hidden),
            "ffn_sub_norm": (of.ffn,),
            "ffn_down": (of.hidden, of.ffn),
        }.items():
            yield f"blk.{index}.{name}.weight", shape


def _blocks(rng: np.random.Generator, n: int, k: int, kind: str) -> np.ndarray:
    """Return random ternary weights (n, k) as bytes of one of TYPES."""
    size, parts = TYPES[kind]
    data = np.empty((n, k // size, sum(count for _, count in parts)), np.uint8)
    scale = np.frombuffer(np.float16((1.5 / k) ** 0.5).tobytes(), np.uint8)
    end = 0
    for fields, count in parts:
        start, end = end, end + count
        data[..., start:end] = (
            scale
            if fields is None
            else fields[rng.integers(0, len(fields), (*data.shape[:2], count), np.uint8)]
        )
    return data.reshape(n, -1)


def _fields(count: int, weights: list[int], first: int = 0) -> np.ndarray:
    """Return the bytes that stand for some trits: the sum of (trit + first) * weight."""
    trits = np.indices((3,) * count).reshape(count, -1) + first
    return np.array(weights) @ trits


def _fractions(count: int) -> np.ndarray:
    """Return the bytes of TQ1_0 for 5 or 4 trits: v / 243 as a fraction of 256, rounded up."""
    return ((_fields(count, [81, 27, 9, 3, 1][:count]) * 256 + 242) // 243).astype(np.uint8)


_SCALE = None, 2
TYPES: dict[str, tuple[int, list[tuple[np.ndarray | None, int]]]] = {
    "TQ1_0": (256, [(_fractions(5), 48), (_fractions(4), 4), _SCALE]),
    "TQ2_0": (256, [(_fields(4, [1, 4, 16, 64]).astype(np.uint8), 64), _SCALE]),
    "Q4_0": (32, [_SCALE, (_fields(2, [1, 16], 7).astype(np.uint8), 16)]),  # of codes 0 to 15, 8 stands for 0
}
"""Weights of a block by type, and what is in it: bytes to draw from, how many; None for the scale."""
