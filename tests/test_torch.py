"""BitLinear against the oracle, and from training over export to a lossless conversion. Needs torch."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import onnx_bitnet as bn
from onnx_bitnet import reference
from onnx_bitnet.errors import DataError, RecipeError

torch = pytest.importorskip("torch", reason="install the extra [torch]")
from onnx_bitnet import torch as bt  # noqa: E402

GRANULARITIES = ["tensor", "channel", "block:32"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def layer(granularity: str = "tensor", k: int = 80, n: int = 24, **options: object) -> bt.BitLinear:
    torch.manual_seed(0)
    return bt.BitLinear(k, n, granularity=granularity, **options)


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))


def packed(layer: bt.BitLinear) -> bn.Quantized:
    recipe = bn.Recipe(mode="lossless", granularity=layer.granularity)
    return bn.quantize(layer.ternary().detach().numpy(), recipe)


@pytest.mark.parametrize("bits", [8, 16])
def test_activations_are_rounded_as_the_oracle_does(bits):
    x = random(7, 80) * 10.0 ** torch.arange(-4, 3)[:, None]
    x[3] = 0
    q, inv_s = reference.quantize_rows(x.numpy(), bits)
    rounded = bt.round_activations(x, bits).numpy()
    np.testing.assert_allclose(rounded, q * inv_s[:, None], rtol=4e-7)
    np.testing.assert_array_equal(np.rint(rounded / inv_s[:, None]), q)


def test_float_activations_stay_as_they_are():
    x = random(2, 8)
    assert bt.round_activations(x, 32) is x


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_are_rounded_as_the_oracle_does(granularity):
    bit = layer(granularity)
    stored = np.float16 if granularity == "block:32" else np.float32
    codes, scale = reference.quantize_weight(
        bit.weight.detach().numpy(), granularity, "absmean", scale_type=stored
    )
    wide = np.repeat(scale[0], 32 if granularity == "block:32" else 80, axis=1)[:, :80]
    expected = (codes[0].astype(np.float32) - 1) * wide
    np.testing.assert_allclose(bit.ternary().detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_learned_scales_start_at_the_least_squares_optimum(granularity):
    bit = layer(granularity, scale="learned")
    weight = bit.weight.detach().numpy()
    meant = bn.quantize(
        weight, bn.Recipe(mode="ternary", granularity=granularity, rounding="mse")
    ).dequantize()
    np.testing.assert_allclose(bit.ternary().detach().numpy(), meant, rtol=1e-6)


def test_a_matrix_of_zeros_stays_zero():
    for scale in ("absmean", "learned"):
        linear = torch.nn.Linear(16, 4)
        torch.nn.init.zeros_(linear.weight)
        assert not bt.BitLinear.of(linear, scale=scale).ternary().any()


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layer_computes_what_the_packed_op_does(granularity, bits):
    bit, x = layer(granularity, activation_bits=bits), random(3, 5, 80)
    q = packed(bit)
    assert q.lossless
    expected = reference.matmul(
        x.numpy(),
        q.weight,
        q.scale,
        q.zero_point,
        bit.bias.detach().numpy(),
        k=80,
        block_size=q.block_size,
        activation_bits=bits,
    )
    np.testing.assert_allclose(bit(x).detach().numpy(), expected, atol=2e-6)
    frozen = bt.freeze(bit)
    np.testing.assert_allclose(frozen(x).detach().numpy(), expected, atol=2e-6)


def test_gradients_go_straight_through_both_roundings():
    bit, x, g = layer(), random(5, 80).requires_grad_(), random(5, 24, seed=1)
    bit(x).backward(g)
    torch.testing.assert_close(x.grad, g @ bit.ternary())
    torch.testing.assert_close(bit.weight.grad, g.T @ bt.round_activations(x))
    torch.testing.assert_close(bit.bias.grad, g.sum(dim=0))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_learn_as_step_sizes_do(granularity):
    bit, g = layer(granularity, scale="learned"), random(24, 80, seed=1)
    (bit.ternary() * g).sum().backward()
    size = {"tensor": 24 * 80, "channel": 80, "block:32": 32}[granularity]
    groups, gradients = (torch.nn.functional.pad(t, (0, 16)) for t in (bit.weight.detach(), g))
    if granularity != "block:32":
        groups, gradients = bit.weight.detach(), g
    ratio = groups.reshape(-1, size) / bit.log_scale.detach().exp().reshape(-1, 1)
    t = ratio.round().clamp(-1, 1)
    error = torch.where(ratio.abs() > 1.5, t, t - ratio)
    by_scale = (gradients.reshape(-1, size) * error).sum(dim=1)
    expected = by_scale * bit.log_scale.detach().exp().flatten()
    torch.testing.assert_close(bit.log_scale.grad.flatten(), expected, rtol=1e-4, atol=1e-5)


def test_progress_leads_from_float_to_ternary():
    linear, x = torch.nn.Linear(80, 24), random(4, 80)
    bit = bt.BitLinear.of(linear)
    full = bit(x)
    bit.progress = 0.0
    torch.testing.assert_close(bit(x), linear(x))
    bit.progress = 0.5
    half = torch.nn.functional.linear(
        (x + bt.round_activations(x)) / 2, (bit.weight + bit.ternary()) / 2, bit.bias
    )
    torch.testing.assert_close(bit(x), half)
    bt.set_progress(torch.nn.ModuleList([bit]), 1.0)
    torch.testing.assert_close(bit(x), full)


def test_noise_leaves_some_weights_float_while_it_trains():
    bit, x = layer(noise=0.25), torch.eye(80)
    bit.activation_bits = 32
    torch.nn.init.zeros_(bit.bias)
    used = bit(x).T
    share = torch.isclose(used, bit.weight).float().mean()
    assert 0.2 < share < 0.3
    assert not torch.equal(bit(x).T, used)
    torch.testing.assert_close(bit.eval()(x).T, bit.ternary())


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "auto"},
        {"granularity": "block:7"},
        {"activation_bits": 4},
        {"activation_bits": "auto"},
        {"scale": "lsq"},
        {"noise": 2},
    ],
)
def test_options_that_do_not_exist_are_refused(options):
    with pytest.raises(RecipeError):
        bt.BitLinear(16, 4, **options)


def test_chosen_layers_are_replaced_with_the_same_weights():
    model = net()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert bt.to_bitlinear(model, "0", granularity="channel") == ["0"]
    assert isinstance(model[0], bt.BitLinear)
    assert type(model[2]) is torch.nn.Linear
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert bt.to_bitlinear(model) == ["2"]


def test_a_layer_used_twice_stays_one():
    shared = torch.nn.Linear(8, 8)
    model = torch.nn.Sequential(shared, shared)
    assert bt.to_bitlinear(model) == ["0", "1"]
    assert model[0] is model[1]
    bt.freeze(model)
    assert model[0] is model[1]


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(RecipeError, match="'head' matches no linear layer; there are 0, 2"):
        bt.to_bitlinear(net(), "head")


@pytest.mark.parametrize("granularity", ["tensor", "block:32"])
def test_exported_model_converts_losslessly(granularity, tmp_path):
    pytest.importorskip("onnxscript", reason="install the extra [torch]")
    model, x = net(), random(5, 64)
    bt.to_bitlinear(model, granularity=granularity, scale="learned")
    expected = model(x).detach().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(bt.freeze(model), (x,), input_names=["x"], dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    report = bn.convert(tmp_path / "model.onnx", tmp_path / "packed.onnx")
    assert report.lossless
    assert [layer.activation_bits for layer in report.converted] == [8, 8]
    assert {layer.granularity for layer in report.converted} == {granularity}
    stored = "float16" if granularity == "block:32" else "float32"
    assert {layer.scale_type for layer in report.converted} == {stored}
    (y,) = bn.session(tmp_path / "packed.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, expected, atol=2e-5)
    if granularity == "tensor":
        stock = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(y, stock.run(None, {"x": x.numpy()})[0])


def batches() -> list[torch.Tensor]:
    return [random(64, 64, seed=seed) for seed in range(8)]


def test_distilled_student_comes_close_to_its_teacher():
    teacher = net()
    student = copy.deepcopy(teacher)
    bt.to_bitlinear(student, granularity="channel", scale="learned")
    seen = []
    kept = copy.deepcopy(teacher.state_dict())
    history = bt.distill(student, teacher, batches(), bt.Settings(60, 3e-3, match=("1",)), seen.append)
    assert seen == history
    assert [step.number for step in history] == list(range(1, 61))
    assert history[-1].output_loss < 0.75 * history[0].output_loss
    assert all(0 < step.match_loss < 1 for step in history)
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_hardening_starts_at_the_teacher_and_ends_ternary():
    teacher = net()
    student = copy.deepcopy(teacher)
    bt.to_bitlinear(student, granularity="channel")
    progress = []
    settings = bt.Settings(10, harden=0.5)
    first, *_ = bt.distill(
        student, teacher, batches(), settings, lambda _: progress.append(student[0].progress)
    )
    assert first.output_loss < 0.05
    assert progress == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 6])


@pytest.mark.parametrize("form", [tuple, dict])
def test_models_may_take_and_give_many_tensors(form):
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(64, 4)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, object]:
            return {"sum": self.linear(a + b), "rest": (a.argmax(), self.linear(b))}

    teacher = Pair()
    student = copy.deepcopy(teacher)
    bt.to_bitlinear(student)
    pairs = [{"a": batch, "b": batch} if form is dict else (batch, batch) for batch in batches()]
    (step,) = bt.distill(student, teacher, pairs, bt.Settings(1))
    assert 0 < step.output_loss < 2


def test_distillation_refuses_what_cannot_be():
    student = net()
    with pytest.raises(RecipeError, match=r"'layer\.\*' matches no module of Sequential"):
        bt.distill(student, net(), batches(), bt.Settings(1, match=("layer.*",)))
    with pytest.raises(DataError, match="no batch"):
        bt.distill(student, net(), [], bt.Settings(1))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("steps", (0, -1, 1.5, "9")),
        ("learning_rate", (-1, math.nan, math.inf, "9")),
        ("warm_up", (-0.1, 1, math.nan)),
        ("harden", (-0.1, 1.1)),
        ("match_weight", (-1, math.inf)),
    ],
)
def test_settings_out_of_range_are_refused(field, values):
    for value in values:
        with pytest.raises(RecipeError, match=rf"^{field} = {value!r} is no .*(number|share) "):
            bt.Settings(**{"steps": 1, field: value})


def test_the_package_itself_does_not_import_torch():
    script = "import sys, onnx_bitnet; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)
