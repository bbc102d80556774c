"""A folder that `build` has written loads in onnxruntime-genai, and gives the same tokens there."""

from __future__ import annotations

import json
import sys

import pytest

from onnx_bitnet.decoder import GEOMETRIES, Generator, Options, build

PROMPT = [3, 1, 4, 1, 5]


@pytest.mark.parametrize("attention", ["gqa", "standard"])
@pytest.mark.parametrize("all_logits", [False, True])
@pytest.mark.parametrize("eos", [(7,), (7, 8)])
def test_tokens_in_genai(tmp_path, eos, all_logits, attention):
    pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
    import subprocess

    options = Options("float", "float", all_logits=all_logits, attention=attention)
    build(GEOMETRIES["tiny"].replace(eos=eos), tmp_path / "model", options)
    expected = list(Generator(tmp_path / "model", threads=1).tokens(PROMPT, 24))
    program = f"""
import onnxruntime_genai as og
model = og.Model({str(tmp_path / "model")!r})
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length={len(PROMPT) + 24}, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens({PROMPT})
while not generator.is_done():
    generator.generate_next_token()
print(generator.get_sequence(0).tolist()[{len(PROMPT)}:])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    got = json.loads(run.stdout.strip().splitlines()[-1])
    assert [token for token in got if token not in eos] == expected
