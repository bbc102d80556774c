"""GGUF files become exact few-bit weights, or one clear error."""

from __future__ import annotations

import gguf_files
import numpy as np
import pytest

import onnx_bitnet as bn
from onnx_bitnet.errors import ModelError

NAME = "blk.0.ffn_up.weight"
RNG = np.random.default_rng(3)
CODES = RNG.integers(0, 3, (6, 512)).astype(np.uint8)


def read(tmp_path, tensors, **others):
    return bn.load_weights(gguf_files.write(tmp_path / "model.gguf", tensors, **others))


def scales(block):
    return RNG.uniform(0.01, 2, (6, 512 // block)).astype(np.float16)


@pytest.mark.parametrize("version", [2, 3])
def test_i2_s(tmp_path, version):
    data = gguf_files.i2_s(CODES.astype(int) - 1, 0.3)
    quantized = read(tmp_path, {NAME: ("I2_S", (6, 512), data)}, version=version)[NAME]
    assert np.array_equal(quantized.codes()[0], CODES)
    assert quantized.scale.item() == np.float32(0.3)
    assert quantized.granularity == "tensor"
    assert quantized.lossless


@pytest.mark.parametrize(
    ("kind", "block", "pack", "most"),
    [
        ("TQ2_0", 256, gguf_files.tq2_0, 4),
        ("TQ1_0", 256, gguf_files.tq1_0, 3),
        ("Q2_0", 64, lambda *given: gguf_files.q2_0(*given, 64), 4),
        ("PQ2_0", 128, lambda *given: gguf_files.q2_0(*given, 128), 4),
    ],
)
def test_block_scaled_types(tmp_path, kind, block, pack, most):
    codes = RNG.integers(0, most, (6, 512)).astype(np.uint8)
    scale = scales(block)
    quantized = read(tmp_path, {NAME: (kind, (6, 512), pack(codes, scale))})[NAME]
    assert np.array_equal(quantized.codes()[0], codes)
    expected = (codes.astype(np.float32) - 1) * np.repeat(scale.astype(np.float32), block, axis=1)
    assert np.array_equal(quantized.dequantize(), expected)
    assert quantized.granularity == f"block:{block}"
    assert quantized.scale.dtype == np.float16


def test_golden_bytes(tmp_path):
    """The first bytes of each layout, worked out by hand."""
    codes = np.ones((1, 256), np.uint8)
    codes[0, [0, 1, 32, 255]] = 2, 0, 0, 2
    one = np.ones(1)
    i2_s = gguf_files.i2_s(codes.astype(int) - 1, 1.0)
    assert i2_s[:2] == bytes([0b10_00_01_01, 0b00_01_01_01])
    assert i2_s[63:68] == bytes([0b01_01_01_10, 0, 0, 0x80, 0x3F])
    tq2_0 = gguf_files.tq2_0(codes, one)
    assert tq2_0[:2] == bytes([0b01_01_00_10, 0b01_01_01_00])
    assert tq2_0[63:] == bytes([0b10_01_01_01, 0, 0x3C])
    tq1_0 = gguf_files.tq1_0(codes, one)
    assert tq1_0[0] == -(-(2 * 81 + 0 * 27 + 9 + 3 + 1) * 256 // 243)
    assert tq1_0[51:] == bytes([-(-(81 + 27 + 9 + 2 * 3) * 256 // 243), 0, 0x3C])
    assert gguf_files.q2_0(codes[:, :64], one, 64)[:3] == bytes([0, 0x3C, 0b01_01_00_10])
    tensors = {
        "a": ("I2_S", (1, 256), i2_s),
        "b": ("TQ2_0", (1, 256), tq2_0),
        "c": ("TQ1_0", (1, 256), tq1_0),
    }
    weights = read(tmp_path, tensors)
    for name in tensors:
        assert np.array_equal(weights[name].codes()[0], codes)


def test_equal_scales_become_one(tmp_path):
    """llama.cpp repeats the scale of a BitNet tensor in each block, and 0 in a block of zeros."""
    codes, scale = CODES.copy(), np.full((6, 2), 0.5)
    codes[2, 256:], scale[2, 1] = 1, 0
    codes[3], scale[3] = 2, 0  # decodes to zeros, too
    quantized = read(tmp_path, {NAME: ("TQ2_0", (6, 512), gguf_files.tq2_0(codes, scale))})[NAME]
    assert quantized.granularity == "tensor"
    expected = (codes.astype(np.float32) - 1) * np.repeat(scale, 256, axis=1)
    assert np.array_equal(quantized.dequantize(), expected)
    scale *= np.arange(1, 7)[:, None]
    quantized = read(tmp_path, {NAME: ("TQ2_0", (6, 512), gguf_files.tq2_0(codes, scale))})[NAME]
    assert quantized.granularity == "channel"
    assert np.array_equal(quantized.dequantize(), expected * np.arange(1, 7)[:, None])


def test_a_matrix_of_zeros(tmp_path):
    data = gguf_files.tq2_0(np.ones((6, 512), int), np.zeros(12))
    quantized = read(tmp_path, {NAME: ("TQ2_0", (6, 512), data)})[NAME]
    assert not quantized.dequantize().any()
    assert quantized.zeros == 1


def test_other_tensors_and_metadata(tmp_path):
    norm = np.arange(8, dtype=np.float32)
    weights = read(
        tmp_path,
        {
            "norm": ("F32", (8,), norm.tobytes()),
            NAME: ("I2_S", (6, 512), gguf_files.i2_s(CODES.astype(int) - 1, 0.3)),
            "half": ("F16", (2, 4), norm.astype(np.float16).tobytes()),
            "brain": (30, (8,), (norm.view(np.uint32) >> 16).astype(np.uint16).tobytes()),
        },
        metadata={"general.name": "tiny", "tokens": ["a", "b"], "bitnet.block_count": 1},
    )
    assert list(weights) == [NAME]
    assert set(weights.others) == {"norm", "half", "brain"}
    assert np.array_equal(weights.others["norm"], norm)
    assert np.array_equal(weights.others["half"], norm.reshape(2, 4))
    assert np.array_equal(weights.others["brain"].astype(np.float32), norm)
    assert weights.metadata["tokens"] == ["a", "b"]
    assert weights.metadata["bitnet.block_count"] == 1


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_files_of_the_gguf_package(tmp_path, kind):
    gguf = pytest.importorskip("gguf", reason="install the extra [text]")
    scale = np.repeat(scales(256).astype(np.float32), 256, axis=1)
    weight = (CODES.astype(np.float32) - 1) * scale
    stored = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bitnet")
    writer.add_string("general.name", "made by gguf")
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_tensor(NAME, stored, raw_dtype=gguf.GGMLQuantizationType[kind])
    table = RNG.normal(size=(4, 64)).astype(np.float32)
    q8 = gguf.quants.quantize(table, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    weights = bn.load_weights(tmp_path / "model.gguf")
    assert np.array_equal(weights[NAME].dequantize(), weight)
    assert np.array_equal(
        weights.others["token_embd.weight"], gguf.dequantize(q8, gguf.GGMLQuantizationType.Q8_0)
    )
    assert weights.metadata["numbers"] == [1.5, 2.5]
    mine = gguf_files.tq1_0 if kind == "TQ1_0" else gguf_files.tq2_0
    assert mine(CODES, scale[:, ::256]) == stored.tobytes()


def good(tmp_path):
    data = gguf_files.i2_s(CODES.astype(int) - 1, 0.3)
    return gguf_files.write(
        tmp_path / "good.gguf", {"a": ("I2_S", (6, 512), data), NAME: ("I2_S", (6, 512), data)}
    )


def test_every_truncation_is_one_error(tmp_path):
    whole = good(tmp_path).read_bytes()
    file = tmp_path / "cut.gguf"
    for size in [*range(4, 200), len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf: .*(truncated|damaged)") as caught:
            bn.load_weights(file)
        assert "\n" not in str(caught.value)


def test_damaged_headers_are_errors(tmp_path):
    whole = bytearray(good(tmp_path).read_bytes())
    file = tmp_path / "damaged.gguf"
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = whole.copy()
        data[rng.integers(4, 200)] = rng.integers(256)
        file.write_bytes(data)
        try:
            weights = bn.load_weights(file)
            for name in weights:
                weights[name]
        except ModelError:
            pass


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (999, (6, 512), "has type 999, which is not known"),
        ("TL1", (6, 512), "has type TL1, whose order of bytes"),
        ("TQ2_0", (6, 500), "K = 500 is no multiple of 256, as TQ2_0 wants"),
        ("I2_S", (8, 320), "K = 320 is no multiple of 128, as I2_S wants"),
        ("TQ2_0", (60, 512), "truncated or damaged: 7920 bytes of TQ2_0"),
        ("TQ2_0", (2, 6, 256), "no matrix"),
        ("TQ2_0", (), "no matrix"),
        ("TQ2_0", (0, 256), "no matrix"),
        ("I2_S", (1 << 40, 1 << 40), "truncated or damaged"),
    ],
)
def test_tensors_that_cannot_be(tmp_path, kind, shape, message):
    with pytest.raises(ModelError, match=message):
        read(tmp_path, {NAME: (kind, shape, bytes(800))})


def test_codes_and_scales_that_cannot_be(tmp_path):
    weights = read(tmp_path, {NAME: ("I2_S", (1, 128), b"\xff" * 32 + bytes(32))})
    with pytest.raises(ModelError, match="holds code 3"):
        weights[NAME]
    weights = read(
        tmp_path, {NAME: ("TQ2_0", (1, 256), gguf_files.tq2_0(CODES[:1, :256], np.array([np.inf])))}
    )
    with pytest.raises(ModelError, match="scale that is NaN or infinite"):
        weights[NAME]


def test_versions_and_byte_orders(tmp_path):
    for version, message in ((1, "has GGUF version 1"), (3 << 24, "is big-endian")):
        with pytest.raises(ModelError, match=message):
            read(tmp_path, {}, version=version)


def test_rotated_weights_are_refused(tmp_path):
    data = gguf_files.q2_0(CODES, scales(128), 128)
    with pytest.raises(ModelError, match=r"rotated basis \(prism.hadamard.block_size\)"):
        read(tmp_path, {NAME: ("PQ2_0", (6, 512), data)}, metadata={"prism.hadamard.block_size": 128})
