"""Turns all-MiniLM-L6-v2 purely ternary by distillation: one scale for 128 weights, 8-bit activations.

    python models/distill_minilm.py ternary.onnx [--steps 400] [--text FILE ...]

A copy of the model, its 36 linear layers ternary, learns to give the sentence embeddings and the hidden
states of the original. Its only data are sentences without labels: those of Python's reference text, of the
doc strings of its standard library, and of `--text` files; never minilm.py's 200 evaluation sentences. What
it writes is minilm.py's graph with the new weights: plain float ONNX, exactly ternary, which
`onnx-bitnet convert ternary.onnx --activation-bits 8` packs without loss. Needs the extra [torch].
"""

from __future__ import annotations

import argparse
import ast
import copy
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import minilm
import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from onnx_bitnet.torch import Settings, Step, distill, freeze, to_bitlinear

SIZE, HIDDEN, HEADS = 384, 1536, 12
MAX_TOKENS = 64
BATCH_TOKENS = 1024


class Attention(nn.Module):
    """Self-attention of BERT without padding; modules are named as in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.self = nn.ModuleDict({part: nn.Linear(SIZE, SIZE) for part in ("query", "key", "value")})
        self.output = Output(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.self[name](x) for name in ("query", "key", "value"))
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        # Spelled out: the fused attention of torch 2.13 takes 8 times as long backward in bfloat16.
        weights = (query @ key.transpose(-1, -2) * (SIZE // HEADS) ** -0.5).softmax(dim=-1)
        return self.output((weights.to(value) @ value).transpose(1, 2).flatten(2), x)


class Output(nn.Module):
    """A linear layer, added to what it came from and normalized."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, SIZE)
        self.LayerNorm = nn.LayerNorm(SIZE, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class Layer(nn.Module):
    """One of the six layers: (batch, tokens, 384) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(SIZE, HIDDEN)})
        self.output = Output(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.output(functional.gelu(self.intermediate["dense"](x)), x)


class MiniLM(nn.Module):
    """The network of minilm.py without padding: tokens int64 (batch, length) to embeddings (batch, 384)."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(6))})
        self.load_state_dict({n: torch.from_numpy(t) for n, t in tensors.items() if n.startswith("encoder.")})
        words, positions, types, gain, shift = (
            torch.from_numpy(tensors[f"embeddings.{name}"])
            for name in (
                "word_embeddings.weight",
                "position_embeddings.weight",
                "token_type_embeddings.weight",
                "LayerNorm.weight",
                "LayerNorm.bias",
            )
        )
        self.words, self.positions = words, positions + types[0]
        self.normalize = lambda x: functional.layer_norm(x, (SIZE,), gain, shift, 1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.normalize(self.words[tokens] + self.positions[: tokens.shape[1]])
        for layer in self.encoder["layer"]:
            x = layer(x)
        return functional.normalize(x.float().mean(dim=1), dim=-1)


def texts(files: list[Path]) -> list[str]:
    """Return sentences to learn from, none of them an evaluation sentence; in the same order every time."""
    sources = list(topics.values())
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        sources += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    sources += [file.read_text(errors="replace") for file in files]
    found = set()
    for source in sources:
        for paragraph in re.split(r"\n\s*[\n%]", source):
            found |= set(re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())))
    sentences = {text for text in found if 20 <= len(text) <= 400 and re.search(r"[a-z]{3}", text)}
    held_out = minilm.sentences()[1]
    return sorted(text for text in sentences if not any(test in text for test in held_out))


def tokens_of(sentences: list[str]) -> list[np.ndarray]:
    """Return the token numbers of each sentence, cut to MAX_TOKENS."""
    feeds = minilm.tokenize(sentences, length=MAX_TOKENS)
    return [row[: mask.sum()] for row, mask in zip(feeds["input_ids"], feeds["attention_mask"], strict=True)]


class Batches:
    """Sentences in batches of equal length of about BATCH_TOKENS tokens, each pass in another order."""

    def __init__(self, sentences: list[str]) -> None:
        self.rows = tokens_of(sentences)
        self.rng = np.random.default_rng(0)

    def __iter__(self) -> Iterator[Tensor]:
        order = self.rng.permutation(len(self.rows))
        by_length: dict[int, list[int]] = {}
        for index in order:
            by_length.setdefault(len(self.rows[index]), []).append(index)
        batches = []
        for length, members in by_length.items():
            size = max(1, BATCH_TOKENS // length)
            batches += [members[start : start + size] for start in range(0, len(members), size)]
        for index in self.rng.permutation([i for i, batch in enumerate(batches) if len(batch) >= 4]):
            yield torch.from_numpy(np.stack([self.rows[i] for i in batches[index]]))


@torch.no_grad()
def embed(model: MiniLM, rows: list[np.ndarray]) -> Tensor:
    """Return the embeddings (sentences, 384)."""
    return torch.cat([model(torch.from_numpy(row[None])) for row in rows])


def frozen(student: MiniLM) -> MiniLM:
    """Return a copy of the student as it will be exported."""
    return freeze(copy.deepcopy(student))


def build(student: MiniLM) -> onnx.ModelProto:
    """Return the graph of minilm.py with the ternary weights of the student, and its biases and norms."""
    state = frozen(student).encoder.state_dict()
    return minilm.build(changed={f"encoder.{name}": tensor.numpy() for name, tensor in state.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="ONNX file to write")
    parser.add_argument("--steps", type=int, default=400, help="batches of 1024 tokens to learn from")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="more text to learn from")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    teacher = MiniLM(minilm.tensors())
    student = copy.deepcopy(teacher)
    to_bitlinear(student, granularity="block:128", scale="learned")
    batches = Batches(texts(arguments.text))
    print(f"{len(batches.rows)} sentences of {sum(map(len, batches.rows))} tokens to learn from")
    test = tokens_of(minilm.sentences()[1])
    expected = embed(teacher, test)
    started = time.monotonic()

    def show(step: Step) -> None:
        if step.number % 50 == 0 or step.number in (1, arguments.steps):
            cosine = (embed(frozen(student), test) * expected).sum(dim=-1).mean()
            print(
                f"step {step.number}: cosine {cosine:.4f} on 200 other sentences, "
                f"loss {step.output_loss:.4f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )

    settings = Settings(arguments.steps, match=("encoder.layer.?",), bfloat16=True)
    distill(student, teacher, batches, settings, show)
    onnx.save(build(student), arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
