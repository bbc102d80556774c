"""Attention of many heads as one op, instead of two products with all scores in memory between them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_bitnet.graphs import roots
from onnx_bitnet.rewrite.attention_pattern import RANK, TOKENS_AND_HEADS, Attention, Mask, match, unranked
from onnx_bitnet.rewrite.cleanup import release
from onnx_bitnet.rewrite.functions import ATTENTION, DOMAIN, OPSETS
from onnx_bitnet.rewrite.origins import opset_version, survey
from onnx_bitnet.rewrite.ranks import state_shapes
from onnx_bitnet.rewrite.records import Site, unique
from onnx_bitnet.rewrite.replace import Shared, declare_op


def fuse_attention(model: ir.Model, shared: Shared) -> int:
    """Put one op in the place of each attention in a model; return how many there were.

    Args:
        model: changed in place; `cleanup` removes what nothing reads any more.
        shared: the same object as for all replacements in the model.
    """
    facts = survey(model)
    sites = [
        Site(node, str(node.name), "", root, facts)
        for root in roots(model, without=DOMAIN)
        if opset_version(root) in OPSETS and facts.opset in OPSETS
        for node in root.all_nodes()
        if not node.domain and node.op_type == "Softmax"
    ]
    unknown = {value for site in sites for value in unranked(site)}
    if unknown:
        state_shapes(model, unknown)
    count = 0
    for site in sites:  # one after the other: what one makes may be what another reads
        found = match(site)
        if found is not None:
            _replace(model, site.root, found, shared)
            count += 1
    return count


def _replace(model: ir.Model, root: ir.Graph, found: Attention, shared: Shared) -> None:
    declare_op(model, root, found.op_type)
    last = found.nodes[-1]
    old, graph = last.outputs[0], last.graph
    assert isinstance(graph, ir.Graph)
    name = f"{last.name or old.name}.{ATTENTION}"
    nodes, mask = _mask_of(found.masks, name, graph, shared)
    node = ir.Node(
        DOMAIN,
        found.op_type,
        [found.q, found.k, found.v, mask],
        [ir.AttrFloat32("scale", found.scale), ir.AttrInt64("nan_to_zero", found.nan_to_zero)],
        name=unique(name, shared.node_names),
    )
    nodes.append(node)
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


def _mask_of(
    masks: tuple[Mask, ...], name: str, graph: ir.Graph, shared: Shared
) -> tuple[list[ir.Node], ir.Value]:
    """Return what is to be added to scores, and the nodes that make it of zeros, as masks would of scores."""
    nodes: list[ir.Node] = []

    def zeros() -> ir.Value:
        name = f"{DOMAIN}.no_mask"
        return shared.constant(graph, name, name, np.zeros((1,) * RANK, np.float32))

    def compute(op_type: str, inputs: list[ir.Value], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        attributes = [ir.AttrInt64("to", dtype)] if op_type == "Cast" else []
        node = ir.Node("", op_type, inputs, attributes, name=unique(f"{name}.mask", shared.node_names))
        value = node.outputs[0]
        value.name, value.type = unique(str(node.name), shared.names), ir.TensorType(dtype)
        nodes.append(node)
        return value

    total = None
    for mask in masks:
        if mask.number is None:
            total = mask.value if total is None else compute("Add", [total, mask.value])
            continue
        is_true = compute("Cast", [mask.value], ir.DataType.BOOL) if mask.is_cast else mask.value
        shown = zeros() if total is None else total
        total = compute("Where", [is_true, *((mask.number, shown) if mask.hides else (shown, mask.number))])
    return nodes, zeros() if total is None else total
