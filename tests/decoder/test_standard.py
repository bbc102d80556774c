"""Attention in standard ops: the same results as onnxruntime's own, and no other op than ONNX's and ours."""

from __future__ import annotations

import json

import decoders
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import onnx_bitnet as bn
from onnx_bitnet.decoder import GEOMETRIES, Generator, Options, build
from onnx_bitnet.errors import RecipeError

TINY = GEOMETRIES["tiny"]
IDS = np.random.default_rng(5).integers(0, 256, 24)
STANDARD = Options("float", attention="standard", all_logits=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("standard") / "tiny"
    build(TINY, path, STANDARD)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "silu", "sub_norms": False, "tied": False},
        {"heads": 3, "kv_heads": 3, "head_size": 48},
        {"heads": 4, "kv_heads": 1, "input_epsilon": 1e-3},
    ],
    ids=["bitnet", "llama", "heads of their own", "norms in layers"],
)
def test_logits_are_those_of_gqa(tmp_path, changes):
    results = []
    for attention in ("gqa", "standard"):
        options = Options("float", attention=attention, all_logits=True)
        built = build(TINY.replace(activation_bits=32, **changes), tmp_path / attention, options)
        results.append(decoders.run(bn.session(built.folder / "model.onnx", threads=1), IDS))
    np.testing.assert_allclose(*results, atol=1e-5)


def test_tokens_are_those_of_gqa(folder, tmp_path):
    build(TINY, tmp_path / "gqa", Options("float"))
    prompts = [3, 1, 4, 1, 5], IDS.tolist() * 6  # the second is read in two parts
    for prompt in prompts:
        expected, got = (
            list(Generator(path, threads=1).tokens(prompt, 24)) for path in (tmp_path / "gqa", folder)
        )
        assert got == expected


def test_only_standard_ops_and_ours(folder):
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    assert {opset.domain for opset in model.opset_import} == {"", "onnx_bitnet"}
    known = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    assert {node.op_type for node in model.graph.node if not node.domain} <= known


def test_the_reference_evaluator_runs_it_with_its_cache(folder):
    evaluator = ReferenceEvaluator(onnx.load(folder / "model.onnx"))
    session = bn.session(folder / "model.onnx", threads=1)
    past = {
        f"past_key_values.{i}.{part}": np.zeros((1, 2, 0, 16), np.float32)
        for i in (0, 1)
        for part in ("key", "value")
    }
    expected = decoders.run(session, IDS)
    for part in (slice(0, 9), slice(9, 10), slice(10, 24)):
        feeds = {"input_ids": IDS[None, part], "attention_mask": np.ones((1, part.stop), np.int64)}
        logits, *present = evaluator.run(None, feeds | past)
        past = dict(zip(past, present, strict=True))
        np.testing.assert_allclose(logits[0], expected[part], atol=1e-4)


def test_padding_is_seen_by_none(folder):
    session = bn.session(folder / "model.onnx", threads=1)
    past = {value.name: np.zeros((2, 2, 0, 16), np.float32) for value in session.get_inputs()[2:]}
    ids = np.stack([np.r_[0, 0, 0, IDS[:5]], IDS[:8]])
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": mask} | past)
    np.testing.assert_allclose(logits[0, 3:], decoders.run(session, IDS[:5]), atol=1e-5)
    np.testing.assert_allclose(logits[1], decoders.run(session, IDS[:8]), atol=1e-5)


def test_genai_gives_it_two_buffers(folder):
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is False


def test_what_it_does_not_go_with(tmp_path):
    for options, message in (
        (Options("int8", attention="standard"), "head 'int8' is an op of onnxruntime's own"),
        (Options("float", "int4", attention="standard"), "embedding 'int4' .* use float"),
        (Options(attention="flash"), "attention 'flash' does not exist; use gqa, standard"),
    ):
        with pytest.raises(RecipeError, match=message):
            build(TINY, tmp_path / "model", options)
