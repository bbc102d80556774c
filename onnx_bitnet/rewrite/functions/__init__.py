"""Each of our ops spelled in standard ONNX ops, so that files run without the library.

An op's FunctionProto must import the same version of the default domain as the model that carries it,
so a body is written for a given opset. Bodies are ONNX text: what differs between opsets is substituted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import onnx_ir as ir

from onnx_bitnet.formats import FORMATS, PANEL_OP
from onnx_bitnet.rewrite.functions import attention, hadamard, matmul
from onnx_bitnet.rewrite.functions.attention import ATTENTION, ATTENTION_BY_HEAD
from onnx_bitnet.rewrite.functions.common import DOMAIN, FLOAT16_OPSET, OPSETS, VERSION
from onnx_bitnet.rewrite.functions.hadamard import HADAMARD

__all__ = [
    "ATTENTION",
    "ATTENTION_BY_HEAD",
    "DOMAIN",
    "FLOAT16_OPSET",
    "FUNCTIONS",
    "HADAMARD",
    "OPSETS",
    "VERSION",
]

FUNCTIONS: Mapping[str, Callable[[int], ir.Function]] = MappingProxyType(
    {form.op_type: partial(matmul.body, form) for form in FORMATS.values()}
    | {
        PANEL_OP: partial(matmul.body, FORMATS["i2s"], op_type=PANEL_OP),
        HADAMARD: hadamard.body,
        ATTENTION: attention.body,
        ATTENTION_BY_HEAD: partial(attention.body, by_head=True),
    }
)
"""Op type -> what makes its body for an opset."""
