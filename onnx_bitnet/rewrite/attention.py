"""Attention of many heads as one op, instead of two products with all scores in memory between them.

Recognized is, with numbers and the two sides of the sum in any order,

    scores = MatMul(heads of q, heads of k) * number + mask
    y = Transpose(MatMul(Softmax(scores), heads of v))

where the heads of a value (batch, token, head, width) are what Transposes make of it, and numbers may
multiply those of q and k, too. All is float32, for which alone there is a kernel. Anything else stays as it
is, and so does an attention of which something else reads scores or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_bitnet.graphs import roots
from onnx_bitnet.rewrite.bias import only_reader
from onnx_bitnet.rewrite.cleanup import release
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.functions import DOMAIN, OPSETS
from onnx_bitnet.rewrite.origins import opset_version, survey
from onnx_bitnet.rewrite.records import Site, made_by, operand, unique
from onnx_bitnet.rewrite.replace import Shared, declare_op
from onnx_bitnet.rewrite.types import element_type

ATTENTION = "Attention"

_HEADS = (0, 2, 1, 3)
_TURNED_HEADS = (0, 2, 3, 1)  # of k, ready to be multiplied with
_RANK = len(_HEADS)
_ONES = tuple((1,) * rank for rank in range(_RANK + 1))  # shapes of a number
_LAST_AXIS_SINCE = 13  # opset from which Softmax is along the last axis if it says nothing


@dataclass(frozen=True, eq=False)
class Scaled:
    """A value, which number multiplies it, and the nodes that do, the first one first."""

    value: ir.Value
    factor: float = 1.0
    nodes: tuple[ir.Node, ...] = ()


@dataclass(frozen=True, eq=False)
class Attention:
    """softmax(scale * q k + mask) v as found in a graph.

    Args:
        q: (batch, row, head, width).
        k: (batch, token, head, width).
        v: (batch, token, head, width of y).
        mask: broadcasts to (batch, head, row, token); None for zeros.
        scale: a number.
        nodes: from the product of q and k to what makes y (batch, row, head, width), in order.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    scale: float
    nodes: tuple[ir.Node, ...]


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


def match(site: Site) -> Attention | None:
    """Return the attention that a node is the Softmax of, or None."""
    softmax = site.node
    if softmax.domain or softmax.op_type != "Softmax" or not _is_along_last_axis(site):
        return None
    weights = softmax.outputs[0]
    product = only_reader(weights)
    if product is None or product.op_type != "MatMul" or product.inputs[0] is not weights:
        return None
    turn = _only_transpose(product.outputs[0])
    v = _tokens(operand(product, 1), _HEADS, site)
    scores = _scores(operand(softmax, 0), site)
    if turn is None or v is None or scores is None or v.factor != 1.0:
        return None
    found = replace(scores, v=v.value, nodes=(*scores.nodes, softmax, product, turn))
    return found if _is_whole(found.nodes) and _has_a_kernel(found) else None


def _is_along_last_axis(site: Site) -> bool:
    default = -1 if opset_version(site.root) >= _LAST_AXIS_SINCE else 1
    attribute = site.node.attributes.get("axis")
    if attribute is not None and attribute.is_ref():
        return False
    return site.node.attributes.get_int("axis", default) in (-1, _RANK - 1)


def _only_transpose(heads: ir.Value) -> ir.Node | None:
    """Return the Transpose that makes (batch, row, head, width) of heads and alone reads them."""
    uses = [] if heads.is_graph_output() else heads.uses()
    nodes = [use.node for use in uses if _permutation(use.node) == _HEADS]
    return nodes[0] if len(uses) == len(nodes) == 1 else None


def _permutation(node: ir.Node) -> tuple[int, ...] | None:
    if node.domain or node.op_type != "Transpose":
        return None
    attribute = node.attributes.get("perm")
    return None if attribute is None or attribute.is_ref() else tuple(attribute.as_ints())


def _scores(value: ir.Value, site: Site) -> Attention | None:
    """Return what the scores are made of; v is still to come."""
    add = made_by(value, "Add", inputs=2)
    if add is None:
        return _product(value, site)
    for index in (0, 1):
        found = _product(operand(add, index), site)
        if found is not None:
            return replace(found, mask=operand(add, 1 - index), nodes=(*found.nodes, add))
    return None


def _product(value: ir.Value, site: Site) -> Attention | None:
    scaled = _unscaled(value, site)
    node = made_by(scaled.value, "MatMul", inputs=2)
    if node is None:
        return None
    q, k = _tokens(operand(node, 0), _HEADS, site), _tokens(operand(node, 1), _TURNED_HEADS, site)
    if q is None or k is None:
        return None
    scale = scaled.factor * q.factor * k.factor
    return Attention(q.value, k.value, k.value, None, scale, (node, *scaled.nodes))


def _unscaled(value: ir.Value, site: Site) -> Scaled:
    """Look through Mul and Div by one number."""
    scaled = Scaled(value)
    while (node := made_by(scaled.value, "Mul", "Div", inputs=2)) is not None:
        other, number = operand(node, 0), _number(operand(node, 1), site)
        if number is None and node.op_type == "Mul":
            other, number = operand(node, 1), _number(operand(node, 0), site)
        if number is None or (number == 0.0 and node.op_type == "Div"):
            break
        factor = number if node.op_type == "Mul" else 1.0 / number
        scaled = Scaled(other, scaled.factor * factor, (node, *scaled.nodes))
    return scaled


def _number(value: ir.Value, site: Site) -> float | None:
    """Return a constant that is one number, of whatever rank that changes no other's."""
    constant = site.constant(value) if value in site.facts.known else None
    if not isinstance(constant, Constant) or constant.shape not in _ONES:
        return None
    return float(constant.array().astype(np.float64).reshape(()))


def _tokens(value: ir.Value, axes: tuple[int, ...], site: Site) -> Scaled | None:
    """Return the value (batch, token, head, width) whose axes Transposes have brought into this order."""
    factor = 1.0
    done: tuple[int, ...] = tuple(range(_RANK))
    while done != axes:
        scaled = _unscaled(value, site)
        turn = made_by(scaled.value, "Transpose")
        permutation = None if turn is None else _permutation(turn)
        if turn is None or permutation is None or len(permutation) != _RANK:
            return None
        factor *= scaled.factor
        done = tuple(permutation[axis] for axis in done)
        value = operand(turn, 0)
    return Scaled(value, factor)


def _is_whole(nodes: Sequence[ir.Node]) -> bool:
    """Whether each node stands in the same graph and feeds the next one alone."""
    between = [node.outputs[0] for node in nodes[:-1]]
    return all(node.graph is nodes[0].graph for node in nodes) and not any(
        len(value.uses()) != 1 or value.is_graph_output() for value in between
    )


def _has_a_kernel(found: Attention) -> bool:
    """Whether types, the number and what is known of shapes are such as the op takes."""
    values = [found.q, found.k, found.v, *([found.mask] if found.mask is not None else [])]
    if any(element_type(value) != ir.DataType.FLOAT for value in values):
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float32(found.scale))) and _is_inside(found)


def _is_inside(found: Attention) -> bool:
    """Whether nothing says that the mask has more rows or tokens than the scores have."""
    mask = None if found.mask is None else found.mask.shape
    q, k = found.q.shape, found.k.shape
    if mask is None or q is None or k is None:
        return True
    pairs = zip(reversed(mask), (k[1], q[1]), strict=False)
    return len(mask) <= _RANK and all(
        own in (1, other) for own, other in pairs if isinstance(own, int) and isinstance(other, int)
    )


def _replace(model: ir.Model, root: ir.Graph, found: Attention, shared: Shared) -> None:
    declare_op(model, root, ATTENTION)
    *_, product, last = found.nodes
    old, graph = last.outputs[0], last.graph
    assert isinstance(graph, ir.Graph)
    zeros = f"{DOMAIN}.no_mask"
    mask = found.mask or shared.constant(graph, zeros, zeros, np.zeros((1,) * _RANK, np.float32))
    node = ir.Node(
        DOMAIN,
        ATTENTION,
        [found.q, found.k, found.v, mask],
        [ir.AttrFloat32("scale", found.scale)],
        name=unique(f"{product.name or old.name}.{ATTENTION}", shared.node_names),
    )
    y = node.outputs[0]
    y.name, y.shape, y.doc_string = old.name, old.shape, old.doc_string
    y.type = ir.TensorType(ir.DataType.FLOAT)
    y.metadata_props.update(old.metadata_props)
    graph.insert_before(last, node)
    old.replace_all_uses_with(y, replace_graph_outputs=True)
    inputs = [value for each in found.nodes for value in each.inputs if value is not None]
    graph.remove(found.nodes, safe=True)
    release(inputs)
