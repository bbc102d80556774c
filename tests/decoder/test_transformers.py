"""Decoders agree with transformers on the same checkpoint: logits within 1e-4, greedy tokens equal."""

from __future__ import annotations

import checkpoints
import decoders
import numpy as np
import pytest

import onnx_bitnet as bn
from onnx_bitnet.decoder import Architecture, Generator, Options, build

# Their imports warn of things that do not matter here.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="pip install torch to compare with transformers")
    module = pytest.importorskip("transformers", reason="pip install transformers to compare with it")
    if not hasattr(module, "BitNetForCausalLM"):
        pytest.skip("this transformers has no BitNet")
    return module


def checkpoint(transformers, folder, kind, tied):
    """Save a random model whose layers are AutoBitLinear on line, and return it."""
    import torch
    from transformers.integrations.bitnet import replace_with_bitnet_linear

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    quantization = transformers.BitNetQuantConfig(
        linear_class="autobitlinear", quantization_mode="online", modules_to_not_convert=["lm_head"]
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.mul_(5)
    values = model.state_dict()
    model = replace_with_bitnet_linear(model, ["lm_head"], quantization)
    model.load_state_dict(values, assign=True)
    model.config.quantization_config = quantization
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["BitNet", "Llama"])
def test_logits_and_greedy_tokens(transformers, tmp_path, kind, tied):
    import torch

    model = checkpoint(transformers, tmp_path / "checkpoint", kind, tied)
    options = Options(head="float", embedding="float", all_logits=True)
    build(tmp_path / "checkpoint", tmp_path / "model", options)
    masters = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    ids = decoders.steady(Architecture.of(model.config.to_dict(), "tiny"), checkpoints.effective(masters))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        prompt = torch.from_numpy(ids)[None]
        tokens = model.generate(prompt, do_sample=False, max_new_tokens=16, min_new_tokens=16)[0, 6:].tolist()
    session = bn.session(tmp_path / "model/model.onnx", threads=1)
    np.testing.assert_allclose(decoders.run(session, ids), expected, atol=1e-4)
    assert list(Generator(tmp_path / "model", threads=1).tokens(ids.tolist(), 16)) == tokens
