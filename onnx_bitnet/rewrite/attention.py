"""Attention of many heads as one op, instead of two products with all scores in memory between them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_bitnet.graphs import roots
from onnx_bitnet.rewrite.attention_pattern import RANK, TOKENS_AND_HEADS, Attention, match
from onnx_bitnet.rewrite.cleanup import release
from onnx_bitnet.rewrite.functions import ATTENTION, DOMAIN, OPSETS
from onnx_bitnet.rewrite.origins import opset_version, survey
from onnx_bitnet.rewrite.records import Site, unique
from onnx_bitnet.rewrite.replace import Shared, declare_op


def fuse_attention(model: ir.Model, shared: Shared) -> int:
    """Put one op in the place of each attention in a model; return how many there were.

    Args:
        model: changed in place; `cleanup` removes what nothing reads any more.
        shared: the same object as for all replacements in the model.
    """
    facts = survey(model)
    own = {function.graph for function in model.functions.values() if function.domain == DOMAIN}
    count = 0
    for root in roots(model):
        if root in own or opset_version(root) not in OPSETS or facts.opset not in OPSETS:
            continue
        for node in list(root.all_nodes()):  # one after the other: what one makes may be what another reads
            found = match(Site(node, str(node.name), "", root, facts))
            if found is not None:
                _replace(model, root, found, shared)
                count += 1
    return count


def _replace(model: ir.Model, root: ir.Graph, found: Attention, shared: Shared) -> None:
    declare_op(model, root, found.op_type)
    last = found.nodes[-1]
    old, graph = last.outputs[0], last.graph
    assert isinstance(graph, ir.Graph)
    name = f"{last.name or old.name}.{ATTENTION}"
    sums, mask = _sum_of(found.masks, name, graph, shared)
    node = ir.Node(
        DOMAIN,
        found.op_type,
        [found.q, found.k, found.v, mask],
        [ir.AttrFloat32("scale", found.scale), ir.AttrInt64("nan_to_zero", found.nan_to_zero)],
        name=unique(name, shared.node_names),
    )
    nodes = [*sums, node]
    if found.is_turned:
        nodes.append(_turn(node.outputs[0], f"{name}.heads", shared))
    y = nodes[-1].outputs[0]
    y.name, y.shape, y.doc_string = old.name, old.shape, old.doc_string
    y.type = ir.TensorType(ir.DataType.FLOAT)
    y.metadata_props.update(old.metadata_props)
    graph.insert_before(last, nodes)
    old.replace_all_uses_with(y, replace_graph_outputs=True)
    inputs = [value for each in found.nodes for value in each.inputs if value is not None]
    graph.remove(found.nodes, safe=True)
    release(inputs)


def _turn(y: ir.Value, name: str, shared: Shared) -> ir.Node:
    """Return the Transpose that makes heads of y, which gets a name."""
    y.name, y.type = unique(name, shared.names), ir.TensorType(ir.DataType.FLOAT)
    permutation = ir.AttrInt64s("perm", TOKENS_AND_HEADS)
    return ir.Node("", "Transpose", [y], [permutation], name=unique(name, shared.node_names))


def _sum_of(
    masks: tuple[ir.Value, ...], name: str, graph: ir.Graph, shared: Shared
) -> tuple[list[ir.Node], ir.Value]:
    """Return the masks as one, and the nodes that add them up."""
    if not masks:
        zeros = f"{DOMAIN}.no_mask"
        return [], shared.constant(graph, zeros, zeros, np.zeros((1,) * RANK, np.float32))
    total, *rest = masks
    nodes = []
    for mask in rest:
        node = ir.Node("", "Add", [total, mask], name=unique(f"{name}.mask", shared.node_names))
        total = node.outputs[0]
        total.name, total.type = unique(str(node.name), shared.names), ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
    return nodes, total
