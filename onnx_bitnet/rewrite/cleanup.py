"""Remove what the rewrite left without a reader: float weights and the nodes that made them.

What was dead before the rewrite stays: a value is removed only if a replaced layer read it, or if it only fed
such a value.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnx_bitnet.graphs import roots, subgraphs, values

_RELEASED = "onnx_bitnet.released"


def release(read: Iterable[ir.Value]) -> None:
    """Note that a layer which read these values is gone."""
    for value in read:
        value.meta[_RELEASED] = True


def cleanup(model: ir.Model) -> None:
    """Remove the released values that nothing reads any more, and then what only they were made from.

    A float weight that something still reads, such as the Gather of a tied embedding, stays; so do inputs and
    outputs of the model.
    """
    pending = [value for root in roots(model) for value in values(root) if value.meta.pop(_RELEASED, False)]
    while pending:
        value = pending.pop()
        if _is_read(value):
            continue
        node = value.producer()
        if node is None:
            _remove_initializer(value)
        elif node.graph is not None and not any(map(_is_read, node.outputs)) and not any(subgraphs(node)):
            pending.extend(source for source in node.inputs if source is not None)
            node.graph.remove(node, safe=True)


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _remove_initializer(value: ir.Value) -> None:
    graph = value.graph
    if graph is not None and value.is_initializer() and not value.is_graph_input() and value.name is not None:
        del graph.initializers[value.name]
