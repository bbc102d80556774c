"""Ranks that the exporter did not state: without them some layers cannot be turned into one product."""

from __future__ import annotations

from collections.abc import Set

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass


def state_shapes(model: ir.Model, values: Set[ir.Value]) -> None:
    """State shapes and types of some values of a model, as far as they can be inferred.

    All else stays as it is: shapes are inferred in a copy, which shares the weights.
    """
    copy = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    inferred = ir.convenience.create_value_mapping(copy.graph)
    for name, value in ir.convenience.create_value_mapping(model.graph).items():
        if value in values and inferred[name].shape is not None:
            value.shape = inferred[name].shape
            value.type = value.type or inferred[name].type
