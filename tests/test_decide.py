"""Decisions that convert's tests do not reach."""

from __future__ import annotations

from onnx_bitnet import recipe
from onnx_bitnet.formats import FORMATS


def test_recipes_and_formats_list_the_same_names():
    assert tuple(FORMATS) == recipe.FORMATS[1:]
