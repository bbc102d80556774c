"""Decoders from checkpoints compute what a plain NumPy forward pass computes."""

from __future__ import annotations

import json
import tracemalloc

import checkpoints
import decoders
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import onnx_bitnet as bn
from onnx_bitnet.decoder import GEOMETRIES, Architecture, Options, build
from onnx_bitnet.errors import ModelError, OutputError, RecipeError

IDS = np.random.default_rng(5).integers(0, 96, 24)
EXACT = Options(head="float", embedding="float", all_logits=True)


def built(folder, source, options=EXACT, **others):
    build(source, folder, options, **others)
    return bn.session(folder / "model.onnx", threads=1)


def assert_equal_to_numpy(session, config, weights):
    architecture = Architecture.of(config, "tiny")
    ids = decoders.steady(architecture, weights)
    expected = decoders.forward(architecture, weights, ids)
    np.testing.assert_allclose(decoders.run(session, ids), expected, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("base", [checkpoints.CONFIG, checkpoints.LLAMA], ids=["bitnet", "llama"])
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear", "online"])
def test_logits_of_a_checkpoint(tmp_path, base, linear_class, tied):
    master = checkpoints.tensors(config := base | {"tie_word_embeddings": tied})
    if linear_class == "online":
        config |= {"quantization_config": checkpoints.bitnet("autobitlinear", "online")}
        arrays = master
    else:
        config |= {"quantization_config": checkpoints.bitnet(linear_class)}
        arrays = checkpoints.packed(master, linear_class)
    source = checkpoints.write(tmp_path / "checkpoint", config, arrays, shards=2)
    assert_equal_to_numpy(built(tmp_path / "model", source), config, checkpoints.effective(master))


def test_norms_inside_bitlinear(tmp_path):
    quantization = checkpoints.bitnet("autobitlinear", "online", use_rms_norm=True, rms_norm_eps=1e-3)
    config = checkpoints.LLAMA | {"quantization_config": quantization}
    master = checkpoints.tensors(config)
    source = checkpoints.write(tmp_path / "checkpoint", config, master)
    assert_equal_to_numpy(built(tmp_path / "model", source), config, checkpoints.effective(master))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["linear", "llama3"],
)
def test_scaled_rotary_embedding_and_odd_heads(tmp_path, scaling):
    config = checkpoints.LLAMA | {"rope_scaling": scaling, "head_dim": 48}
    ternary = checkpoints.effective(checkpoints.tensors(config))
    source = checkpoints.write(tmp_path / "checkpoint", config, ternary)
    architecture = Architecture.of(config, "tiny")
    assert architecture.activation_bits == 16  # its layers are plain ones, which round no activations
    got = decoders.run(built(tmp_path / "model", source), IDS)
    # float noise moves some activations to the next of their 65535 steps
    np.testing.assert_allclose(got, decoders.forward(architecture, ternary, IDS), atol=1e-3)


@pytest.mark.parametrize("form", ["i2s", "tl1", "tl2", "t5"])
def test_formats_give_the_same_bits(tmp_path, form):
    expected = decoders.run(built(tmp_path / "i2s", GEOMETRIES["tiny"]), IDS)
    options = Options(head="float", embedding="float", all_logits=True, format=form)
    assert np.array_equal(decoders.run(built(tmp_path / "other", GEOMETRIES["tiny"], options), IDS), expected)


def test_panels_in_the_file_give_the_same_bits(tmp_path):
    expected = decoders.run(built(tmp_path / "i2s", GEOMETRIES["tiny"]), IDS)
    options = Options("float", all_logits=True, layout="panel")
    assert np.array_equal(decoders.run(built(tmp_path / "panel", GEOMETRIES["tiny"], options), IDS), expected)
    nodes = ir.load(tmp_path / "panel/model.onnx").graph
    assert {node.op_type for node in nodes if node.domain == "onnx_bitnet"} == {"MatMulPanel"}


@pytest.mark.parametrize(
    ("kind", "error"), [("int8", 0.05), ("int4", 0.25), ("packed8", 0.05), ("packed4", 0.25)]
)
def test_head_and_embedding_of_few_bits_are_near(tmp_path, kind, error):
    expected = decoders.run(built(tmp_path / "float", GEOMETRIES["tiny"]), IDS)
    for embedding in {"float", kind} - {"packed8", "packed4"}:
        options = Options(kind, embedding, all_logits=True)
        got = decoders.run(built(tmp_path / embedding / "few", GEOMETRIES["tiny"], options), IDS)
        assert np.linalg.norm(got - expected) < error * np.linalg.norm(expected)


def test_an_embedding_keeps_its_own_16_bits(tmp_path):
    arrays = checkpoints.effective(checkpoints.tensors(checkpoints.CONFIG))
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    config = checkpoints.CONFIG | {"tie_word_embeddings": True}
    source = checkpoints.write(tmp_path / "checkpoint", config, arrays)
    both = [
        decoders.run(built(tmp_path / str(tied), source, options), IDS)
        for tied, options in ((True, EXACT), (False, Options("int8", "float", all_logits=True)))
    ]
    model = ir.load(tmp_path / "False/model.onnx")
    assert model.graph.initializers["model.embed_tokens.float"].dtype == ir.DataType.BFLOAT16
    assert np.linalg.norm(both[1] - both[0]) < 0.02 * np.linalg.norm(both[0])


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_tied_head_is_stored_once(tmp_path, kind):
    tied, untied = (
        build(GEOMETRIES["tiny"].replace(tied=tied), tmp_path / f"{kind}{tied}", Options(kind, kind))
        for tied in (True, False)
    )
    assert untied.nbytes - tied.nbytes > 256 * 64


def test_only_the_last_logits_unless_asked(tmp_path):
    everything = decoders.run(built(tmp_path / "all", GEOMETRIES["tiny"]), IDS)
    last = decoders.run(built(tmp_path / "last", GEOMETRIES["tiny"], Options("float", "float")), IDS)
    np.testing.assert_allclose(last, everything[-1:], atol=1e-6)


def test_random_models_have_a_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(GEOMETRIES["tiny"], tmp_path / name, seed=seed)
    data = [(tmp_path / name / "model.onnx.data").read_bytes() for name in "abc"]
    assert data[0] == data[1] != data[2]


def test_random_weights_of_any_width(tmp_path):
    architecture = GEOMETRIES["tiny"].replace(hidden=42, ffn=51)
    assert np.isfinite(decoders.run(built(tmp_path / "odd", architecture), IDS)).all()


def test_inspect_sees_the_layers(tmp_path):
    from onnx_bitnet.inspection import inspect

    build(GEOMETRIES["tiny"], tmp_path / "tiny")
    *layers, head = inspect(tmp_path / "tiny/model.onnx").packed
    assert len(layers) == 2 * 5
    assert (head.name, head.n, head.k, head.planes, head.activation_bits) == ("lm_head", 256, 64, 4, 16)
    assert layers[0].name == "model.layers.0.self_attn.qkv_proj"
    assert layers[0].granularity == "channel"
    assert {layer.activation_bits for layer in layers} == {8}


def test_it_runs_without_the_library(tmp_path):
    import onnxruntime

    session = built(tmp_path / "tiny", GEOMETRIES["tiny"])
    options = onnxruntime.SessionOptions()
    stock = onnxruntime.InferenceSession(tmp_path / "tiny/model.onnx", options, ["CPUExecutionProvider"])
    np.testing.assert_allclose(decoders.run(stock, IDS), decoders.run(session, IDS), atol=1e-4)


def test_large_tensors_start_on_pages(tmp_path):
    build(GEOMETRIES["tiny"], tmp_path / "tiny")
    model = ir.load(tmp_path / "tiny/model.onnx")
    external = [
        value.const_value
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    assert external
    assert all(tensor.offset % 4096 == 0 for tensor in external)


def test_memory_holds_a_layer_not_the_model(tmp_path):
    architecture = GEOMETRIES["tiny"].replace(layers=24, hidden=512, ffn=2048)
    tracemalloc.start()
    try:
        built = build(architecture, tmp_path / "model")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < built.nbytes / 3


def test_errors_of_a_folder(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        build(GEOMETRIES["tiny"], tmp_path / "there")
    with pytest.raises(
        RecipeError, match="head 'int2' does not exist; use float, int8, int4, packed8, packed4"
    ):
        build(GEOMETRIES["tiny"], tmp_path / "new", Options(head="int2"))
    with pytest.raises(RecipeError, match="seed = -1: give a whole number from 0 on"):
        build(GEOMETRIES["tiny"], tmp_path / "new", seed=-1)
    with pytest.raises(ModelError, match="no multiple of 32"):
        build(GEOMETRIES["tiny"].replace(hidden=48), tmp_path / "new", Options("int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    for checkpoint in ("there", "there/inner"):
        (tmp_path / checkpoint).mkdir(exist_ok=True)
        with pytest.raises(OutputError, match=f"there: holds the input '.*{checkpoint}'; choose another"):
            build(tmp_path / checkpoint, tmp_path / "there", force=True)
    build(GEOMETRIES["tiny"], tmp_path / "there", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not built"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not built"),
        ({"attention_bias": True}, "biases are not built"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary embedding 'yarn' is not built"),
        ({"num_key_value_heads": 3}, "2 heads cannot share 3"),
        ({"num_attention_heads": 4}, "heads of size 8 are not built"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": 64}, "'model.embed_tokens.weight' has shape"),
        ({"num_hidden_layers": 3}, "nothing of layer 2 is there"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_checkpoints_that_are_not_built(tmp_path, changes, message):
    config = checkpoints.CONFIG | changes
    arrays = checkpoints.effective(checkpoints.tensors(checkpoints.CONFIG))
    source = checkpoints.write(tmp_path / "checkpoint", config, arrays)
    with pytest.raises(ModelError, match=message):
        build(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("kind", "epsilon", "theta"), [("bitnet", 1e-5, 500000), ("llama", 1e-6, 10000)])
def test_what_a_config_leaves_out_is_as_in_transformers(kind, epsilon, theta):
    said = checkpoints.CONFIG | {"model_type": kind}
    architecture = Architecture.of(
        {name: value for name, value in said.items() if name not in ("rms_norm_eps", "rope_theta")}, "tiny"
    )
    assert (architecture.epsilon, architecture.rope.theta) == (epsilon, theta)


def test_half_a_checkpoint(tmp_path):
    arrays = checkpoints.tensors(checkpoints.CONFIG)
    for lost in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        rest = {name: array for name, array in arrays.items() if name != lost}
        source = checkpoints.write(tmp_path / lost, checkpoints.CONFIG, rest)
        with pytest.raises(ModelError, match=f"half a checkpoint: '{lost}' is missing"):
            build(source, tmp_path / "model")


def test_an_ordinary_model_is_not_made_ternary_in_silence(tmp_path):
    source = checkpoints.write(tmp_path / "llama", checkpoints.LLAMA, checkpoints.tensors(checkpoints.LLAMA))
    with pytest.raises(ModelError, match=r"q_proj.weight' is not ternary"):
        build(source, tmp_path / "model")


def test_no_config(tmp_path):
    source = checkpoints.write(
        tmp_path / "source", checkpoints.CONFIG, checkpoints.tensors(checkpoints.CONFIG)
    )
    (source / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        build(source, tmp_path / "model")


def test_the_folder_is_ready_for_genai(tmp_path):
    arrays = checkpoints.tensors(checkpoints.CONFIG)
    source = checkpoints.write(tmp_path / "source", checkpoints.CONFIG, arrays)
    (source / "tokenizer.json").write_text("{}")
    assert build(source, tmp_path / "model").tokenizer
    config = json.loads((tmp_path / "model/genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    for name in (decoder["filename"], decoder["session_options"]["custom_ops_library"], "tokenizer.json"):
        assert (tmp_path / "model" / name).is_file()
    assert config["model"]["eos_token_id"] == 2
