"""Real exports of BitLinear layers by torch.onnx, where torch is installed (and transformers for its own)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_bitnet as bn

torch = pytest.importorskip("torch", reason="install torch to export real models")
pytest.importorskip("onnxscript", reason="install onnxscript for torch's exporter")

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, many and changing

K, N = 96, 32
TYPES = ("float32", "float16", "bfloat16")


def quantize_rows(x):
    s = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
    return (x * s).round().clamp(-128, 127) / s


class StraightThrough(torch.nn.Linear):
    """The layer of BitNet's authors, as most training code has it."""

    def forward(self, x):
        s = 1.0 / self.weight.abs().mean().clamp(min=1e-5)
        weight = (self.weight * s).round().clamp(-1, 1) / s
        weight = self.weight + (weight - self.weight).detach()
        return torch.nn.functional.linear(x + (quantize_rows(x) - x).detach(), weight, self.bias)


class Signs(torch.nn.Linear):
    """A layer of -1 and 1 without a zero, after a norm."""

    def forward(self, x):
        x = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6)
        weight = (self.weight - self.weight.mean()).sign() * self.weight.abs().mean()
        weight = self.weight + (weight - self.weight).detach()
        return torch.nn.functional.linear(x + (quantize_rows(x) - x).detach(), weight)


def transformers_layer(kind: str, dtype):
    bitnet = pytest.importorskip("transformers.integrations.bitnet", reason="install transformers")
    trits = torch.randint(-1, 2, (N, K)).float()
    if kind == "bitlinear":
        layer = bitnet.BitLinear(K, N, True, dtype=dtype)
        layer.weight = bitnet.pack_weights(trits)
        layer.weight_scale = torch.tensor([37.3], dtype=dtype)
        layer.bias = torch.randn(N).to(dtype)
        return layer
    layer = bitnet.AutoBitLinear(K, N, True, dtype=dtype, online_quant=kind == "online")
    if kind == "offline":
        layer.weight.data = trits.to(dtype)
        layer.weight_scale = torch.tensor([0.0268], dtype=dtype)
    return layer.requires_grad_(False)


def check(layer, dtype: str, exporter: str, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "disable", True, raising=False)  # transformers compiles parts
    x = torch.randn(2, 3, K).to(getattr(torch, dtype))
    path = folder / "in.onnx"
    options = {"dynamo": True, "verbose": False, "external_data": False, "dynamic_shapes": ({0: "b"},)}
    if exporter == "script":
        options = {"dynamo": False, "opset_version": 17, "dynamic_axes": {"x": {0: "b"}}}
    torch.onnx.export(layer.eval(), (x,), path, input_names=["x"], output_names=["y"], **options)
    report = bn.convert(path, folder / "out.onnx")
    (found,) = report.layers
    assert found.activations.startswith("folded")
    assert found.activation_bits == 8
    assert "Round" not in {node.op_type for node in onnx.load(folder / "out.onnx").graph.node}
    wanted = layer(x).float().detach().numpy()
    fed = x.float().numpy().astype(np.float16 if dtype == "float16" else np.float32)
    (got,) = bn.session(folder / "out.onnx", threads=1).run(None, {"x": fed})
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}[dtype]
    assert np.abs(got - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("exporter", ["dynamo", "script"])
@pytest.mark.parametrize("kind", [StraightThrough, Signs])
def test_training_code(kind, exporter: str, tmp_path: Path, monkeypatch):
    torch.manual_seed(1)
    check(kind(K, N), "float32", exporter, tmp_path, monkeypatch)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["bitlinear", "offline", "online"])
def test_transformers(kind: str, dtype: str, tmp_path: Path, monkeypatch):
    """The older exporter cannot trace these, of which transformers compiles parts."""
    torch.manual_seed(2)
    layer = transformers_layer(kind, getattr(torch, dtype))
    check(layer, dtype, "dynamo", tmp_path, monkeypatch)


class Encoder(torch.nn.Module):
    """One layer of BERT, all of whose linear layers are BitLinear, with a mask of padding."""

    def __init__(self, heads=4):
        super().__init__()
        self.parts = torch.nn.ModuleDict({part: StraightThrough(K, K) for part in "qkvo"})
        self.up, self.down = StraightThrough(K, 2 * K), StraightThrough(2 * K, K)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(K) for _ in range(2))
        self.heads = heads

    def forward(self, x, mask):
        q, k, v = (self.parts[part](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in "qkv")
        seen = mask[:, None, None, :].bool()
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = self.norms[0](x + self.parts["o"](y.transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.down(torch.nn.functional.gelu(self.up(x))))


@pytest.mark.parametrize("exporter", ["dynamo", "script"])
def test_an_encoder_with_a_mask(exporter: str, tmp_path: Path):
    torch.manual_seed(3)
    encoder = Encoder().eval()
    x, mask = torch.randn(3, 7, K), (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()
    sizes = {0: "batch", 1: "length"}
    options = {"dynamo": True, "verbose": False, "external_data": False, "dynamic_shapes": (sizes, sizes)}
    if exporter == "script":
        options = {"dynamo": False, "opset_version": 17, "dynamic_axes": {"x": sizes, "mask": sizes}}
    names = {"input_names": ["x", "mask"], "output_names": ["y"]}
    torch.onnx.export(encoder, (x, mask), tmp_path / "in.onnx", **names, **options)
    report = bn.convert(tmp_path / "in.onnx", tmp_path / "out.onnx")
    packed = [layer for layer in report.layers if layer.reason is None]
    assert len(packed) == 6
    assert {layer.activation_bits for layer in packed} == {8}
    session = bn.session(tmp_path / "out.onnx", threads=1)
    for rows in (slice(0, 3), slice(1, 2)):  # other batches and lengths than it was exported with
        length = int(mask[rows].sum(dim=1).max())
        part = x[rows, :length], mask[rows, :length]
        wanted = encoder(*part).detach().numpy()
        (got,) = session.run(None, {"x": part[0].numpy(), "mask": part[1].numpy()})
        there = part[1].numpy().astype(bool)
        np.testing.assert_allclose(got[there], wanted[there], atol=2e-2)  # of single steps of 255


class TwoHeads(torch.nn.Module):
    """Attention of two heads and its layers."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleDict({part: torch.nn.Linear(K, K) for part in "qkvo"})

    def forward(self, x, seen):
        q, k, v = (self.parts[part](x).view(x.shape[0], -1, 2, K // 2).transpose(1, 2) for part in "qkv")
        y = self.attend(q, k, v, seen[:, None, None, :])
        return self.parts["o"](y.transpose(1, 2).contiguous().view(x.shape[0], -1, K))

    def attend(self, q, k, v, seen):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class Hiding(TwoHeads):
    """As DistilBERT was for years."""

    def attend(self, q, k, v, seen):
        scores = torch.matmul(q / (K // 2) ** 0.5, k.transpose(2, 3))
        unseen = (~seen).expand_as(scores)
        scores = scores.masked_fill(unseen, torch.tensor(torch.finfo(torch.float32).min))
        return torch.matmul(torch.softmax(scores, -1), v)


class Causal(TwoHeads):
    """As GPT-2 was for years."""

    def __init__(self):
        super().__init__()
        self.register_buffer("past", torch.ones(64, 64, dtype=torch.bool).tril()[None, None])

    def attend(self, q, k, v, seen):
        least = torch.finfo(torch.float32).min
        scores = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], v.size(-1) ** 0.5)
        past = self.past[:, :, k.size(-2) - q.size(-2) : k.size(-2), : k.size(-2)]
        scores = torch.where(past, scores, torch.full([], least)) + (1.0 - seen.float()) * least
        return torch.matmul(torch.softmax(scores, -1), v)


class Torchs(torch.nn.Module):
    """Attention as torch itself has it."""

    def __init__(self):
        super().__init__()
        self.heads = torch.nn.MultiheadAttention(K, 2, batch_first=True)

    def forward(self, x, seen):
        return self.heads(x, x, x, key_padding_mask=~seen, need_weights=False)[0]


@pytest.mark.parametrize("exporter", ["dynamo", "script"])
@pytest.mark.parametrize("kind", [TwoHeads, Hiding, Causal, Torchs])
def test_attention_is_one_op(kind: type, exporter: str, tmp_path: Path):
    torch.manual_seed(4)
    seen = torch.arange(7) < torch.tensor([[7], [4], [1]])
    sizes = {0: "batch", 1: "length"}
    options = {"dynamo": True, "verbose": False, "external_data": False, "dynamic_shapes": (sizes, sizes)}
    if exporter == "script":
        options = {"dynamo": False, "opset_version": 17, "dynamic_axes": {"x": sizes, "seen": sizes}}
    inputs = (torch.randn(3, 7, K), seen)
    names = {"input_names": ["x", "seen"], "output_names": ["y"]}
    torch.onnx.export(kind().eval(), inputs, tmp_path / "in.onnx", **names, **options)
    for attention, count in (("auto", 1), ("keep", 0)):
        recipe = bn.Recipe(mode="ternary", activation_bits=32, attention=attention)
        bn.convert(tmp_path / "in.onnx", tmp_path / f"{attention}.onnx", recipe)
        ops = [node.op_type for node in onnx.load(tmp_path / f"{attention}.onnx").graph.node]
        fused = ops.count("Attention") + ops.count("AttentionByHead")
        assert (fused, ops.count("Softmax")) == (count, 1 - count)
    one, other = (bn.session(tmp_path / f"{name}.onnx", threads=1) for name in ("auto", "keep"))
    is_fixed = kind is Torchs and exporter == "script"  # writes down the length that it sees
    for batch, length in ((3, 7), (1, 7 if is_fixed else 1), (2, 7 if is_fixed else 20)):
        rng = np.random.default_rng(length)
        feeds = {
            "x": rng.standard_normal((batch, length, K), np.float32),
            "seen": np.ones((batch, length), bool),
        }
        feeds["seen"][0, length // 2 + 1 :] = False
        (got,), (want,) = one.run(None, feeds), other.run(None, feeds)
        assert got.shape == (batch, length, K)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
