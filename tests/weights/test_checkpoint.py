"""Hugging Face checkpoints become exact few-bit weights, or one clear error."""

from __future__ import annotations

import json

import checkpoints
import ml_dtypes
import numpy as np
import pytest

import onnx_bitnet as bn
from onnx_bitnet.errors import ModelError

UP = "model.layers.0.mlp.up_proj.weight"
PACKED = checkpoints.CONFIG | {"quantization_config": checkpoints.bitnet("autobitlinear")}


def write(tmp_path, arrays, config=PACKED, **others):
    return checkpoints.write(tmp_path / "checkpoint", config, arrays, **others)


def master():
    return checkpoints.tensors(checkpoints.CONFIG)


def packed():
    return checkpoints.packed(master(), "autobitlinear")


def test_golden_bytes_of_packed_rows(tmp_path):
    """Eight rows in two bytes per column: 4 rows, 2 apart, in each."""
    trits = np.array([[0, 1], [1, 1], [-1, 0], [1, -1], [0, 0], [-1, 1], [1, -1], [0, 1]], np.float32)
    stored = np.array([[0b10_01_00_01, 0b00_01_01_10], [0b01_00_10_10, 0b10_10_00_10]], np.uint8)
    assert np.array_equal(checkpoints.pack_rows(trits), stored)
    arrays = {UP: stored, UP + "_scale": np.array([0.25], np.float32)}
    folder = write(tmp_path, arrays, PACKED | {"num_hidden_layers": 1})
    quantized = bn.load_weights(folder)[UP]
    assert quantized.codes()[0].tolist() == (trits + 1).tolist()
    assert quantized.weight[0, :, 0].tolist() == [0x59, 0x5A, 0x54, 0x52, 0x55, 0x58, 0x52, 0x59]
    assert np.array_equal(quantized.dequantize(), trits * np.float32(0.25))
    assert quantized.lossless
    assert quantized.granularity == "tensor"


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_both_directions_of_weight_scale(tmp_path, linear_class, dtype):
    scale = np.array([0.3], dtype)
    folder = write(
        tmp_path,
        packed() | {UP + "_scale": scale},
        checkpoints.CONFIG | {"quantization_config": checkpoints.bitnet(linear_class)},
    )
    trits, _ = checkpoints.absmean(master()[UP])
    value = scale.astype(np.float32)
    factor = value if linear_class == "autobitlinear" else np.float32(1) / value
    assert np.array_equal(bn.load_weights(folder)[UP].dequantize(), trits * factor)


def test_old_configs_mean_bitlinear(tmp_path):
    folder = write(
        tmp_path, packed(), checkpoints.CONFIG | {"quantization_config": {"quant_method": "bitnet"}}
    )
    scale = packed()[UP + "_scale"]
    assert bn.load_weights(folder)[UP].scale.item() == np.float32(1) / scale[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_master_weights_are_rounded_as_bitlinear_does(tmp_path, dtype):
    config = checkpoints.CONFIG | {"quantization_config": checkpoints.bitnet("autobitlinear", "online")}
    arrays = {name: array.astype(dtype) for name, array in master().items()}
    quantized = bn.load_weights(write(tmp_path, arrays, config))[UP]
    trits, mean = checkpoints.absmean(arrays[UP].astype(np.float32))
    assert np.array_equal(quantized.codes()[0], trits + 1)
    np.testing.assert_allclose(quantized.scale.item(), mean, rtol=1e-7)
    assert not quantized.lossless
    assert quantized.sqnr_db > 0


def test_on_line_rounding_applies_to_ternary_masters_too(tmp_path):
    """AutoBitLinear takes the mean of |W|, zeros included, whatever W is."""
    config = checkpoints.CONFIG | {"quantization_config": checkpoints.bitnet("autobitlinear", "online")}
    arrays = checkpoints.effective(master())
    _, mean = checkpoints.absmean(arrays[UP])
    got = bn.load_weights(write(tmp_path, arrays, config))[UP].scale.item()
    np.testing.assert_allclose(got, mean, rtol=1e-6)
    assert got < 0.9 * np.abs(arrays[UP]).max()


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:32"])
def test_ternary_floats_keep_their_scales(tmp_path, granularity):
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (48, 64)).astype(np.float32)
    scale = {"tensor": np.float32(0.5), "channel": rng.uniform(1, 2, (48, 1)).astype(np.float32)}
    scale["block:32"] = np.repeat(rng.uniform(1, 2, (48, 2)).astype(np.float32), 32, axis=1)
    folder = write(tmp_path, {UP: trits * scale[granularity]}, {"num_hidden_layers": 1})
    quantized = bn.load_weights(folder)[UP]
    assert quantized.lossless
    assert quantized.granularity == granularity
    assert np.array_equal(quantized.dequantize(), trits * scale[granularity])


def test_unpacked_trits_with_a_scale(tmp_path):
    trits, mean = checkpoints.absmean(master()[UP])
    arrays = packed() | {UP: trits.astype(ml_dtypes.bfloat16), UP + "_scale": np.array([mean])}
    assert np.array_equal(bn.load_weights(write(tmp_path, arrays))[UP].dequantize(), trits * mean)


def test_a_folder_its_index_and_its_shards(tmp_path):
    folder = write(tmp_path, packed(), shards=3)
    whole = bn.load_weights(folder)
    index = bn.load_weights(folder / "model.safetensors.index.json")
    assert list(whole) == list(index)
    assert len(whole) == 14
    assert np.array_equal(whole[UP].weight, index[UP].weight)
    with pytest.raises(ModelError, match="one of 3 shards; give the folder"):
        bn.load_weights(folder / "model-00001-of-00003.safetensors")


def test_what_is_not_linear_is_listed(tmp_path):
    weights = bn.load_weights(write(tmp_path, packed()))
    assert {name.split(".")[-2] for name in weights.others} == {
        "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "attn_sub_norm",
        "ffn_sub_norm",
    }  # fmt: skip
    assert np.array_equal(weights.others["model.norm.weight"], master()["model.norm.weight"])
    assert weights.metadata["model_type"] == "bitnet"
    assert not set(weights) & set(weights.others)


def test_modules_that_are_not_converted(tmp_path):
    kept = checkpoints.bitnet("autobitlinear", "online", modules_to_not_convert=["lm_head", "up_proj"])
    weights = bn.load_weights(write(tmp_path, master(), checkpoints.CONFIG | {"quantization_config": kept}))
    assert UP in weights.others
    assert UP not in weights


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    arrays = packed()
    arrays[UP] = np.full_like(arrays[UP], 255)
    weights = bn.load_weights(write(tmp_path, arrays))
    assert weights["model.layers.1.mlp.up_proj.weight"].n == 48
    with pytest.raises(ModelError, match=r"up_proj.weight': holds code 3"):
        weights[UP]


def test_a_missing_shard(tmp_path):
    folder = write(tmp_path, packed(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"model-00002-of-00003.safetensors: this shard with 13 of 39 tensors"
    ):
        bn.load_weights(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00003.safetensors: this shard is missing"):
        bn.load_weights(folder)


def test_a_shard_without_its_tensors(tmp_path):
    folder = write(tmp_path, packed(), shards=2)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"]["model.more.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(names))
    with pytest.raises(
        ModelError, match=r"1 of 40 tensors are missing from their shards.*'model.more.weight'"
    ):
        bn.load_weights(folder)


def test_a_truncated_file(tmp_path):
    file = write(tmp_path, packed()) / "model.safetensors"
    for size in (file.stat().st_size - 1, 100, 0):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ModelError, match=r"model.safetensors: truncated, or not safetensors"):
            bn.load_weights(file.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({UP + "_scale": None}, "_scale' is missing"),
        ({UP + "_scale": np.array([0.0], np.float32)}, "weight_scale contradicts the weights"),
        ({UP + "_scale": np.array([np.nan], np.float32)}, "weight_scale contradicts the weights"),
        ({UP + "_scale": np.ones(7, np.float32)}, r"contradicts the weights: shape \[7\]"),
        ({UP: master()[UP]}, "weight_scale contradicts the weights, which are not -1, 0 and 1"),
        ({UP: checkpoints.effective(master())[UP]}, "contradicts the weights, which are not -1"),
        ({UP: np.full((48, 32), np.nan, np.float32)}, "NaN"),
    ],
    ids=["missing", "zero", "nan", "shape", "masters", "scaled", "nan weights"],
)
def test_what_contradicts_itself(tmp_path, change, message):
    arrays = {name: array for name, array in (packed() | change).items() if array is not None}
    folder = write(tmp_path, arrays)
    with pytest.raises(ModelError, match=message) as caught:
        bn.load_weights(folder)[UP]
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_the_direction_must_be_known(tmp_path):
    folder = write(tmp_path, packed(), checkpoints.CONFIG)
    with pytest.raises(ModelError, match=r"no config\.json says whether weight_scale multiplies or divides"):
        bn.load_weights(folder)[UP]
    (folder / "config.json").unlink()
    multiplied = bn.load_weights(folder, linear_class="autobitlinear")[UP]
    divided = bn.load_weights(folder / "model.safetensors", linear_class="bitlinear")[UP]
    assert multiplied.scale.item() == packed()[UP + "_scale"][0]
    assert divided.scale.item() == np.float32(1) / packed()[UP + "_scale"][0]
    with pytest.raises(ModelError, match="linear_class 'linear' does not exist"):
        bn.load_weights(folder, linear_class="linear")


def test_configs_that_cannot_be_read(tmp_path):
    folder = write(tmp_path, packed())
    with pytest.raises(
        ModelError, match=r"linear_class is 'autobitlinear' in config\.json; it must be bitlinear"
    ):
        bn.load_weights(folder, linear_class="bitlinear")
    for config, message in (
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
        ({"quantization_config": checkpoints.bitnet("linear")}, "linear_class is 'linear'"),
        ([], "not the config of a model"),
        ("{", "not JSON"),
    ):
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        with pytest.raises(ModelError, match=message):
            bn.load_weights(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(ModelError, match="there is no such file or folder"):
        bn.load_weights(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"holds no .safetensors file"):
        bn.load_weights(tmp_path)
