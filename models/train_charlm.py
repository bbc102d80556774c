"""Trains the ternary language model of charlm.py on Python's reference text in minutes on a CPU.

    python models/train_charlm.py [--steps 1000] [--out models/charlm]

It writes the checkpoint that charlm.py reads, packed as Hugging Face packs BitNet. Needs the extra [torch].
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import charlm
import numpy as np
import torch
from charlm import Geometry
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional

from onnx_bitnet.torch import BitLinear

GEOMETRY = Geometry(
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
LENGTH = charlm.CONTEXT
BATCH = 24
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05


class Norm(nn.RMSNorm):
    """RMSNorm in float32, also within autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and a norm before the last projection."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.g = g
        self.q_proj = BitLinear(g.hidden_size, g.hidden_size, bias=False)
        self.k_proj = BitLinear(g.hidden_size, g.num_key_value_heads * g.head_size, bias=False)
        self.v_proj = BitLinear(g.hidden_size, g.num_key_value_heads * g.head_size, bias=False)
        self.o_proj = BitLinear(g.hidden_size, g.hidden_size, bias=False)
        self.attn_sub_norm = Norm(g.hidden_size, eps=g.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.g.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        q = q.unflatten(1, (self.g.num_key_value_heads, -1))  # heads that share their keys and values
        scores = q @ k.unsqueeze(2).transpose(-1, -2) * self.g.head_size**-0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        context = (weights.to(v) @ v.unsqueeze(2)).flatten(1, 2)
        return self.o_proj(self.attn_sub_norm(context.transpose(1, 2).flatten(2)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Mlp(nn.Module):
    """Gated squared ReLU with a norm before the last projection."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.gate_proj = BitLinear(g.hidden_size, g.intermediate_size, bias=False)
        self.up_proj = BitLinear(g.hidden_size, g.intermediate_size, bias=False)
        self.down_proj = BitLinear(g.intermediate_size, g.hidden_size, bias=False)
        self.ffn_sub_norm = Norm(g.intermediate_size, eps=g.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(
            self.ffn_sub_norm(functional.relu(self.gate_proj(x)).square() * self.up_proj(x))
        )


class Layer(nn.Module):
    """One layer, (batch, tokens, hidden) to the same."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.input_layernorm = Norm(g.hidden_size, eps=g.rms_norm_eps)
        self.self_attn = Attention(g)
        self.post_attention_layernorm = Norm(g.hidden_size, eps=g.rms_norm_eps)
        self.mlp = Mlp(g)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class CharLM(nn.Module):
    """Tokens int64 (batch, length) to logits float32 (batch, length, 128); modules are named as in BitNet."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.geometry = g
        self.embed_tokens = nn.Embedding(g.vocab_size, g.hidden_size)
        self.layers = nn.ModuleList(Layer(g) for _ in range(g.num_hidden_layers))
        self.norm = Norm(g.hidden_size, eps=g.rms_norm_eps)
        for name, table in zip(("cos", "sin"), g.rotation(), strict=True):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)
        nn.init.normal_(self.embed_tokens.weight, std=g.hidden_size**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.norm(x), self.embed_tokens.weight)


def loss_of(model: CharLM, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats, of each token given those before it."""
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def bits_per_character(model: CharLM, tokens: Tensor) -> float:
    """Return the cross entropy in bits over a text, read in pieces of LENGTH."""
    pieces = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    return torch.stack([loss_of(model, part) for part in pieces.split(32)]).mean().item() / math.log(2)


def train(steps: int, seed: int = 0) -> CharLM:
    """Train on random pieces of the text; the rate of AdamW rises for 50 steps, then falls as a cosine."""
    torch.manual_seed(seed)
    model = CharLM(GEOMETRY)
    training, test = (torch.from_numpy(charlm.tokens(part)) for part in charlm.text())
    decay = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / 50, 0.02 + 0.49 * (1 + math.cos(math.pi * s / steps)))
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        starts = torch.randint(len(training) - LENGTH, (BATCH,))
        batch = training[starts[:, None] + torch.arange(LENGTH + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            held_out = bits_per_character(model, test)
            print(
                f"step {step}: {held_out:.3f} bits per character, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return model


def save(model: CharLM, folder: Path) -> None:
    """Write model.safetensors, config.json and tokenizer.json."""
    from safetensors.numpy import save_file

    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            weight = module.ternary().detach().numpy()
            scale = np.abs(weight).max()
            rows = np.rint(weight / scale + 1).astype(np.uint8).reshape(4, -1, weight.shape[1])
            tensors[f"model.{name}.weight"] = rows[0] | rows[1] << 2 | rows[2] << 4 | rows[3] << 6
            tensors[f"model.{name}.weight_scale"] = scale.reshape(1)
        elif isinstance(module, (nn.RMSNorm, nn.Embedding)):
            tensors[f"model.{name}.weight"] = module.weight.detach().numpy()
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    config = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        **asdict(model.geometry),
        "hidden_act": "relu2",
        "max_position_embeddings": charlm.CONTEXT,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "quantization_config": quantization,
    }
    folder.mkdir(exist_ok=True)
    tokenizer(model.geometry.vocab_size).save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tokenizer(size: int) -> Tokenizer:
    """Return one whose tokens are the first `size` characters."""
    made = Tokenizer(models.WordLevel({chr(code): code for code in range(size)}, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=charlm.CHECKPOINT, help="folder of the checkpoint to write"
    )
    parser.add_argument("--steps", type=int, default=1000, help="batches to learn from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    save(train(arguments.steps), arguments.out)
    print(f"{arguments.out}: {(arguments.out / 'model.safetensors').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
