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
