"""What the bodies share: for which opsets they are written, and how a text becomes a function."""

from __future__ import annotations

from string import Template

import onnx.parser
import onnx_ir as ir

DOMAIN = "onnx_bitnet"
VERSION = 1
OPSETS = range(11, 27)
"""Opsets of the default domain for which bodies are written. Before 11 there is no BitShift and no Round."""

FLOAT16_OPSET = 15
"""First opset whose bodies give y the type of a float16 x (CastLike); before it x must be float32."""


def parsed(template: Template, opset: int, **parts: str) -> ir.Function:
    """Make the function of a text for models that import this version of the default domain.

    Raises:
        ValueError: the opset is not in OPSETS.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset {opset}: function bodies exist for {OPSETS[0]} to {OPSETS[-1]}")
    text = template.substitute(opset=opset, domain=DOMAIN, **parts)
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def of_type_of_x(opset: int) -> str:
    """Return what gives float_y the type of x."""
    return "CastLike (float_y, x)" if opset >= FLOAT16_OPSET else "Identity (float_y)"
