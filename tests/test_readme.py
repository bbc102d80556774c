"""What the README tells people to type works."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from chains import K, chain, ordinary, ternary
from commands import run

import onnx_bitnet as bn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_python_blocks_run(tmp_path, monkeypatch):
    chain(tmp_path / "model.onnx", {"embed": ternary(K), "body": ordinary(K), "head": ordinary(8)})
    np.savez(tmp_path / "feeds.npz", x=ordinary(K, 4))
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in BLOCKS if "torch" not in block]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_blocks_with_torch_run_and_their_model_converts(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="install the extra [torch]")
    chain(tmp_path / "model.onnx", {"body": ordinary(K), "head": ordinary(8)})
    np.savez(tmp_path / "feeds.npz", x=ordinary(K, 4))
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        if "torch" in block:
            exec(compile(block, "README.md", "exec"), {})
    for model in ("student", "ternary"):
        report = bn.convert(f"{model}.onnx", f"{model}.packed.onnx", bn.Recipe(mode="lossless"))
        assert report.lossless
        assert [layer.activation_bits for layer in report.converted] == [8, 8]


def test_commands_run(tmp_path):
    chain(tmp_path / "model.onnx", {"a": ternary(K), "b": ordinary(8)})
    np.savez(tmp_path / "feeds.npz", x=ordinary(K, 4))
    commands = re.findall(r"^onnx-bitnet ([^#\n]*?)\s*(?:#.*)?$", README, re.M)
    assert len(commands) >= 6
    for command in commands:
        done = run(*command.split(), cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)


def test_every_recipe_field_is_explained():
    from dataclasses import fields

    from onnx_bitnet import Recipe

    table = README.split("## Recipes")[1].split("## ")[0]
    for field in fields(Recipe):
        assert re.search(rf"^\| .*\b{field.name}\b", table, re.M), field.name


def test_paths_it_names_exist():
    tree = README.split("## Where things are")[1]
    for name in re.findall(r"^ {4,6}(\S+)", tree, re.M):
        assert (ROOT / name).exists() or (ROOT / "onnx_bitnet" / name).exists(), name
    for folder in (ROOT / "onnx_bitnet").glob("*/__init__.py"):
        assert re.search(rf"^ {{6}}{folder.parent.name}/", tree, re.M), folder
