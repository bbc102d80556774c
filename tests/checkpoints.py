"""Writes little Hugging Face checkpoints of ternary decoders, in each way that weights are published."""

from __future__ import annotations

import json

import numpy as np

CONFIG = {
    "model_type": "bitnet",
    "hidden_act": "relu2",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = CONFIG | {"model_type": "llama", "hidden_act": "silu"}


def bitnet(linear_class, mode="offline", **others):
    """A `quantization_config`."""
    return {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode, **others}


def shapes(config):
    """Yield name and shape of every tensor."""
    hidden, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        linear = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden)}
        linear |= {"self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q)}
        linear |= {
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for name, shape in linear.items():
            yield f"{layer}.{name}.weight", shape
            if config.get("quantization_config", {}).get("use_rms_norm"):
                yield f"{layer}.{name}.rms_norm.weight", shape[1:]
        if config["model_type"] == "bitnet":
            yield f"{layer}.self_attn.attn_sub_norm.weight", (q,)
            yield f"{layer}.mlp.ffn_sub_norm.weight", (ffn,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def is_linear(name):
    return "_proj.weight" in name


def tensors(config, seed=0):
    """Return master weights: random floats by name, float32."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.normal(0, 0.3, shape)).astype(
            np.float32
        )
        for name, shape in shapes(config)
    }


def absmean(weight):
    """Return what BitLinear makes of a master weight: trits float32, and the mean magnitude."""
    mean = np.float32(max(np.abs(weight).mean(dtype=np.float64), 1e-5))
    return np.clip(np.rint(weight * (np.float32(1) / mean)), -1, 1), mean


def pack_rows(trits):
    """Pack trits (N, K) as transformers does: byte [r, k] holds rows r, R + r, 2 R + r, 3 R + r."""
    quarter = len(trits) // 4
    codes = (trits + 1).astype(np.uint8).reshape(4, quarter, -1)
    return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6


def packed(master, linear_class):
    """Return the tensors of a packed checkpoint."""
    result = {}
    for name, array in master.items():
        if not is_linear(name):
            result[name] = array
            continue
        trits, mean = absmean(array)
        result[name] = pack_rows(trits)
        result[f"{name}_scale"] = np.array(
            [mean if linear_class == "autobitlinear" else 1 / mean], np.float32
        )
    return result


def effective(master):
    """Return the float weights that the model computes with, linear layers rounded."""
    rounded = {name: absmean(array) for name, array in master.items() if is_linear(name)}
    return master | {name: trits * mean for name, (trits, mean) in rounded.items()}


def write(folder, config, arrays, shards=1):
    """Write config.json and the tensors, sharded with an index when there is more than one shard."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(arrays, folder / "model.safetensors")
        return folder
    names = sorted(arrays)
    files = {
        name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save_file({name: arrays[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder
