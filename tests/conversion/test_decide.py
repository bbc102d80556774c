"""Decisions that convert's tests do not reach."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from chains import chain

import onnx_bitnet as bn
from onnx_bitnet import recipe
from onnx_bitnet.conversion import decide
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.report import Reason


def test_recipes_and_formats_list_the_same_names():
    assert tuple(FORMATS) == recipe.FORMATS[1:]


def test_layers_too_wide_for_32_bit_sums_are_left(tmp_path):
    k = decide.MAX_GROUP + 1
    weight = np.full((k, 1), 0.5, np.float32)
    model = chain(tmp_path / "in.onnx", {"a": weight})
    (layer,) = bn.plan(model).layers
    assert layer.reason is Reason.WEIGHT_TOO_WIDE
    assert layer.detail == f"{k} inputs share a scale, {k - 1} may"
    assert bn.plan(model, {"activation_bits": 32}).layers[0].lossless


def test_the_widest_group_is_that_of_the_kernels():
    layout = (Path(__file__).parents[2] / "ext/layout.h").read_text()
    assert re.search(r"BN_MAX_GROUP = 1 << (\d+)", layout)[1] == str(decide.MAX_GROUP.bit_length() - 1)
