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
    """Write a model of the architecture `bitnet` whose layers are of a type: TQ2_0 or Q4_0."""
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
    """Return random ternary weights (n, k) as bytes of TQ2_0 or Q4_0."""
    scale = np.frombuffer(np.float16((1.5 / k) ** 0.5).tobytes(), np.uint8)
    if kind == "TQ2_0":
        digits = np.indices((3,) * 4, np.uint8).reshape(4, -1)
        block, codes, fields = 256, slice(0, 64), digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6
    else:
        digits = np.indices((3,) * 2, np.uint8).reshape(2, -1) + 7  # of codes 0 to 15, 8 stands for 0
        block, codes, fields = 32, slice(2, 18), digits[0] | digits[1] << 4
    size = codes.stop - codes.start + 2
    data = np.empty((n, k // block, size), np.uint8)
    data[..., codes] = fields[rng.integers(0, len(fields), (n, k // block, size - 2), np.uint8)]
    data[..., slice(64, 66) if kind == "TQ2_0" else slice(0, 2)] = scale
    return data.reshape(n, -1)
