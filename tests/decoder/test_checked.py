"""What `build` wrote is read back, and what differs from what was meant is not handed out."""

from __future__ import annotations

import dataclasses
import os
import sys

import numpy as np
import onnx_ir as ir
import pytest

from onnx_bitnet.decoder import GEOMETRIES, Options, build
from onnx_bitnet.decoder.checked import check
from onnx_bitnet.errors import OutputError
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.quantization.quantized import Quantized

TINY = GEOMETRIES["tiny"]


@pytest.mark.parametrize(
    "options", [Options(), Options(layout="panel"), Options(format="tl2"), Options("packed4")]
)
def test_a_wrong_code(tmp_path, monkeypatch, options):
    """A packer that confuses two codes is found by the reference, in every form."""
    right = Quantized.to

    def wrong(self, form):
        codes = self.codes()
        codes[0, 1, 2] = (codes[0, 1, 2] + 1) % 3
        return right(dataclasses.replace(self, format=form, weight=FORMATS[form].pack(codes)), form)

    monkeypatch.setattr(Quantized, "to", wrong)
    with pytest.raises(OutputError, match=r"layer '.*qkv_proj' decodes to other values than were meant"):
        build(TINY, tmp_path / "model", options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.embed_tokens.float", "tensor 'model.embed_tokens.float' holds other bytes"),
        ("rope.cosines", "tensor 'rope.cosines' holds other bytes"),
        ("lm_head.i2s", "layer 'lm_head' decodes to other values"),
    ],
)
def test_bytes_that_change_on_the_disk(tmp_path, monkeypatch, tensor, message):
    def spoilt_check(written, *others):
        offset = ir.load(written).graph.initializers[tensor].const_value.offset
        data = np.memmap(f"{written}.data", np.uint8, "r+")
        data[offset + 9] ^= 1
        data.flush()
        check(written, *others)

    monkeypatch.setattr(sys.modules["onnx_bitnet.decoder.build"], "check", spoilt_check)
    with pytest.raises(OutputError, match=message):
        build(TINY, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_where_a_map_is_filled(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="cannot write the model: No space left on device"):
        build(TINY, tmp_path / "model")
    assert not list(tmp_path.iterdir())
