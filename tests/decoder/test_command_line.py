"""`onnx-bitnet build` and `onnx-bitnet generate`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import checkpoints
import pytest
from commands import run

from onnx_bitnet.decoder import GEOMETRIES, Generator, build


def test_build_a_random_model_and_generate(tmp_path):
    done = run("build", "--random", "tiny", tmp_path / "tiny")
    assert done.returncode == 0, done.stderr
    assert "2 layers, hidden 64, ffn 160, heads 4/2, vocabulary 256" in done.stdout
    assert run("build", "--random", "tiny", tmp_path / "tiny").returncode == 1
    done = run("build", "--random", "tiny", "tiny", "--force", cwd=tmp_path)  # no input, but a name
    assert done.returncode == 0, done.stderr
    done = run("generate", tmp_path / "tiny", "--tokens", "1,2 3", "--count", 6, "--threads", 1)
    assert done.returncode == 0, done.stderr
    tokens = list(Generator(tmp_path / "tiny", threads=1).tokens([1, 2, 3], 6))
    assert [int(token) for token in done.stdout.split()] == tokens
    assert re.search(r"prompt: 3 tokens, [\d.]+ tokens/s; generated: 6 tokens, [\d.]+ tokens/s", done.stderr)


def test_json_documents(tmp_path):
    options = "--head", "packed4", "--attention", "standard"
    built = json.loads(run("build", "--random", "tiny", tmp_path / "tiny", *options, "--json").stdout)
    assert built["schema"] == "onnx_bitnet.built/1"
    assert (built["options"]["head"], built["options"]["attention"]) == ("packed4", "standard")
    assert built["architecture"]["hidden"] == 64
    written = run("generate", tmp_path / "tiny", "--tokens", "5", "--count", "3", "--json").stdout
    document = json.loads(written)
    assert document["schema"] == "onnx_bitnet.generated/1"
    assert len(document["text"].split()) == 3
    assert document["prompt_tokens"] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_text_so_far(tmp_path, number, code):
    build(GEOMETRIES["tiny"].replace(positions=50000), tmp_path / "tiny")
    command = [sys.executable, "-m", "onnx_bitnet", "generate", tmp_path / "tiny", "--tokens", "1 2 3"]
    options = ["--count", "49000", "--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    program = subprocess.Popen([*command, *options], bufsize=0, **pipes)
    begun = program.stdout.read(8)
    program.send_signal(number)
    rest, said = program.communicate(timeout=60)
    assert program.returncode == code
    tokens = (begun + rest).decode().split()
    assert all(token.isdecimal() for token in tokens)
    assert said.startswith(b"interrupted; what was generated is above\n")
    counted = re.search(rb"generated: (\d+) tokens", said)
    assert abs(int(counted[1]) - len(tokens)) <= 1  # the signal may come between counting and writing


def test_build_a_checkpoint(tmp_path):
    arrays = checkpoints.packed(checkpoints.tensors(checkpoints.CONFIG), "bitlinear")
    source = checkpoints.write(tmp_path / "source", checkpoints.CONFIG, arrays)
    done = run("build", source, tmp_path / "model")
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*give linear_class.*\n", done.stderr)
    assert not (tmp_path / "model").exists()
    assert run("build", source, tmp_path / "model", "--linear-class", "bitlinear").returncode == 0
    random = run("build", "--random", source / "config.json", tmp_path / "random", "--all-logits")
    assert random.returncode == 0, random.stderr


def test_usage_errors(tmp_path):
    for arguments, code, message in (
        (("build", "--random", "huge", tmp_path / "x"), 1, "huge: neither one of bitnet-2b4t"),
        (("build", "--random", "tiny", tmp_path / "x", "--head", "int3"), 2, "head 'int3' does not exist"),
        (("generate", tmp_path, "--prompt", "a", "--tokens", "1"), 2, "give either --prompt or --tokens"),
        (("generate", tmp_path, "--tokens", "1", "--chat"), 2, "--chat answers a text"),
        (("generate", tmp_path, "--tokens", "1"), 1, "genai_config.json: is missing"),
    ):
        done = run(*arguments)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
    run("build", "--random", "tiny", tmp_path / "tiny")
    done = run("generate", tmp_path / "tiny", "--tokens", "one")
    assert done.returncode == 2
    assert "write whole numbers" in done.stderr
