"""Conv of 1 to 3 spatial dimensions with a 1x1 kernel: a linear layer on the channels of each pixel."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from onnx_bitnet.errors import ModelError
from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.origins import NotConstant
from onnx_bitnet.rewrite.records import Linear, Refusal, Reshaping, Site, operand


def match(site: Site) -> Linear | Refusal:
    """Match one node: channels go last, through the layer, and back."""
    constant = site.constant(operand(site.node, 1))
    if isinstance(constant, NotConstant):
        return site.refuse(constant.reason, constant.detail)
    rank = len(constant.shape)
    if not 3 <= rank <= 5:
        return site.refuse(Reason.WEIGHT_RANK, f"weight {constant.name!r} has shape {list(constant.shape)}")
    why = _not_pointwise(site.node, constant.shape)
    if why:
        return site.refuse(Reason.CONV_NOT_POINTWISE, why)
    linear = site.linear(0, constant.reshape(*constant.shape[:2]))
    last = rank - 1
    linear = replace(
        linear,
        before=(Reshaping("Transpose", (0, *range(2, rank), 1)),),
        after=(Reshaping("Transpose", (0, last, *range(1, last))),),
    )
    if len(site.node.inputs) < 3 or site.node.inputs[2] is None:
        return linear
    bias = site.constant(operand(site.node, 2))
    if isinstance(bias, NotConstant):
        return site.refuse(bias.reason, f"bias: {bias.detail}", linear.weight)
    if bias.shape != (linear.weight.n,):
        raise ModelError(f"{site.name!r}: a bias of shape {list(bias.shape)} for {linear.weight.n} outputs")
    return replace(linear, bias=bias)


def _not_pointwise(node: ir.Node, shape: tuple[int, ...]) -> str | None:
    """Return what makes it more than a product with one matrix at each pixel."""
    ints = node.attributes.get_ints
    found = {
        "kernel": shape[2:],
        "strides": ints("strides") or (),
        "group": (node.attributes.get_int("group", 1),),
        # SAME pads a 1x1 kernel of stride 1 by nothing
        "pads": [1 + pad for pad in ints("pads") or ()],
    }
    for name, values in found.items():
        if any(value != 1 for value in values):
            shown = ints("pads") if name == "pads" else values
            return f"{name} {'x'.join(str(value) for value in shown or ())}"
    return None
