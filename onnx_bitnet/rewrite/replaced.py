"""Find what stands in the place of linear layers in a model, whatever the target was."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import onnx_ir as ir

from onnx_bitnet.rewrite.packed import PackedNode, packed_nodes
from onnx_bitnet.rewrite.plain import PlainNode, plain_nodes
from onnx_bitnet.rewrite.stock import StockNode, stock_nodes

Replaced = PackedNode | StockNode | PlainNode


def replaced(model: ir.Model) -> Iterator[Replaced]:
    """Yield every node that replaced a layer.

    Raises:
        ModelError: a packed op is malformed.
    """
    return chain(packed_nodes(model), stock_nodes(model), plain_nodes(model))
