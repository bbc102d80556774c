"""Recognize the attention of many heads in the nodes that exporters write for it.

That is, with numbers and the sides of sums in any order,

    scores = MatMul(heads of q, heads of k turned) * numbers + masks
    heads of y = MatMul(Softmax(scores), heads of v)

where numbers may multiply q and k, too, casts change nothing, zeros may replace weights that are NaN, and a
Where may hide scores behind a number so low that no score is left beside it.
Where heads are what Transposes make of (batch, token, head, width), and so for y, the Transposes go as well.
All is float32, for which alone there is a kernel. Anything else stays as it is, and so does an attention of
which something else reads scores or weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_bitnet.rewrite.dimensions import Shapes, permutation
from onnx_bitnet.rewrite.functions import ATTENTION, ATTENTION_BY_HEAD
from onnx_bitnet.rewrite.origins import opset_version
from onnx_bitnet.rewrite.records import Site, made_by, operand
from onnx_bitnet.rewrite.types import element_type

RANK = 4
_AS_IS = (0, 1, 2, 3)
TOKENS_AND_HEADS = (0, 2, 1, 3)  # change places
_TURNED = (0, 1, 3, 2)  # heads of k, ready to be multiplied with
_TURNED_HEADS = (0, 2, 3, 1)  # the same of (batch, token, head, width)
_LAST_AXIS_SINCE = 13  # opset from which Softmax is along the last axis if it says nothing
_MOST_MASKS = 4
_HIDING = -1e30  # plus a score it is itself: a unit in its last place is 1e23


@dataclass(frozen=True, eq=False)
class Scaled:
    """A value, the number that multiplies it, and the nodes that do, the first one first."""

    value: ir.Value
    factor: float = 1.0
    nodes: tuple[ir.Node, ...] = ()


@dataclass(frozen=True, eq=False)
class Mask:
    """What a node does to scores: adds a value, or puts a number in their place.

    Args:
        value: that is added; or the condition.
        number: None, or what stands where the condition is `hides`.
        hides: see number.
        is_cast: whether the condition is not a truth before it is made one.
    """

    value: ir.Value
    number: ir.Value | None = None
    hides: bool = True
    is_cast: bool = False


@dataclass(frozen=True, eq=False)
class Scores:
    """scale * left right, masked: what Softmax reads.

    Args:
        left: heads of q.
        right: heads of k, turned.
        scale: a number.
        masks: what is done to the products, in order.
        nodes: that compute it, in order.
    """

    left: ir.Value
    right: ir.Value
    scale: float
    masks: tuple[Mask, ...]
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True, eq=False)
class Weighing:
    """What follows Softmax: heads of y as the product with those of v.

    Args:
        heads: of v.
        nan_to_zero: whether weights that are NaN are replaced by zeros.
        nodes: that compute it, in order; the last one is the product.
    """

    heads: ir.Value
    nan_to_zero: bool
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True, eq=False)
class Attention:
    """softmax(scale * q k, masked) v as found in a graph.

    Args:
        op_type: Attention or AttentionByHead.
        q: (batch, row, head, width), or the last two but one exchanged; so k, v and y.
        k: (batch, token, head, width).
        v: (batch, token, head, width of y).
        masks: what is done to scores, in order; values broadcast to (batch, head, row, token).
        scale: a number.
        nan_to_zero: see Weighing.
        nodes: from the product of q and k to what makes y, or its heads, in order.
        is_turned: whether that is heads although y is not, so that a Transpose must follow.
    """

    op_type: str
    q: ir.Value
    k: ir.Value
    v: ir.Value
    masks: tuple[Mask, ...]
    scale: float
    nan_to_zero: bool
    nodes: tuple[ir.Node, ...]
    is_turned: bool = False


def match(site: Site) -> Attention | None:
    """Return the attention that a Softmax is part of, or None."""
    softmax = site.node
    if not _is_along_last_axis(site):
        return None
    shapes = Shapes(site)
    scores, weighing = _scores(operand(softmax, 0), shapes), _weighing(softmax.outputs[0], shapes)
    if scores is None or weighing is None:
        return None
    nodes = (*scores.nodes, softmax, *weighing.nodes)
    if not _is_whole(nodes):
        return None
    found = _by_token(scores, weighing, nodes, shapes) or _by_head(scores, weighing, nodes, shapes)
    return found if found is not None and _has_a_kernel(found) else None


def unranked(site: Site) -> set[ir.Value]:
    """Return heads whose ranks `match` would have to know, where a Softmax is part of an attention."""
    shapes = Shapes(site)
    scores, weighing = _scores(operand(site.node, 0), shapes), _weighing(site.node.outputs[0], shapes)
    if scores is None or weighing is None or _before(scores.right, _TURNED, shapes) is None:
        return set()
    heads = (_unscaled(scores.left, shapes).value, weighing.heads)
    return {value for value in heads if shapes.rank(value) is None}


def _is_along_last_axis(site: Site) -> bool:
    default = -1 if opset_version(site.root) >= _LAST_AXIS_SINCE else 1
    attribute = site.node.attributes.get("axis")
    if attribute is not None and attribute.is_ref():
        return False
    return site.node.attributes.get_int("axis", default) in (-1, RANK - 1)


# ---- Before and behind Softmax


def _scores(value: ir.Value, shapes: Shapes) -> Scores | None:
    scaled = _unscaled(value, shapes)
    product = made_by(scaled.value, "MatMul", inputs=2)
    if product is not None:
        nodes = (product, *scaled.nodes)
        return Scores(operand(product, 0), operand(product, 1), scaled.factor, (), nodes)
    node = made_by(value, "Add", inputs=2) or made_by(value, "Where", inputs=3)
    if node is None:
        return None
    for index in range(len(node.inputs))[-2:]:
        found = _scores(operand(node, index), shapes)
        if found is not None and len(found.masks) < _MOST_MASKS and _is_of_turned_heads(found, shapes):
            return _masked(found, node, index, shapes)
    return None


def _is_of_turned_heads(scores: Scores, shapes: Shapes) -> bool:
    """Whether it may be q and k that are multiplied; a mask may be a product, too."""
    return any(_before(scores.right, axes, shapes) is not None for axes in (_TURNED, _TURNED_HEADS))


def _masked(scores: Scores, node: ir.Node, index: int, shapes: Shapes) -> Scores | None:
    """Return scores after an Add or a Where that reads them as its input of this index."""
    inner: list[ir.Node] = []
    if node.op_type == "Add":
        mask = Mask(operand(node, 1 - index))
    else:
        number = operand(node, 3 - index)
        low = shapes.number(number, RANK)
        if low is None or low > _HIDING:
            return None
        condition, is_cast, inner = _condition(operand(node, 0), operand(node, index))
        mask = Mask(condition, number, hides=index == 2, is_cast=is_cast)
    return replace(scores, masks=(*scores.masks, mask), nodes=(*scores.nodes, *inner, node))


def _condition(value: ir.Value, scores: ir.Value) -> tuple[ir.Value, bool, list[ir.Node]]:
    """Return a condition as it was before it got the shape of scores, and the nodes that read that shape."""
    cast = made_by(value, "Cast")
    expand = made_by(value if cast is None else operand(cast, 0), "Expand", inputs=2)
    if expand is None:
        return value, False, []
    shape = made_by(operand(expand, 1), "Shape")
    if shape is not None and operand(shape, 0) is scores and not shape.attributes:
        return operand(expand, 0), cast is not None, [shape, expand, *([] if cast is None else [cast])]
    if _are_alike(expand.outputs[0].shape, scores.shape):
        return operand(expand, 0), cast is not None, []
    return value, False, []


def _are_alike(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Whether two shapes are stated and the same, in numbers and names."""
    if one is None or other is None or one != other:
        return False
    return all(isinstance(size, int) or size.value is not None for size in one)


def _unscaled(value: ir.Value, shapes: Shapes) -> Scaled:
    """Look through Mul and Div by one number."""
    scaled = Scaled(value)
    while (node := made_by(scaled.value, "Mul", "Div", inputs=2)) is not None:
        other, number = operand(node, 0), shapes.number(operand(node, 1), RANK)
        if number is None and node.op_type == "Mul":
            other, number = operand(node, 1), shapes.number(operand(node, 0), RANK)
        if number is None or (number == 0.0 and node.op_type == "Div"):
            break
        factor = number if node.op_type == "Mul" else 1.0 / number
        scaled = Scaled(other, scaled.factor * factor, (node, *scaled.nodes))
    return scaled


def _weighing(weights: ir.Value, shapes: Shapes) -> Weighing | None:
    nodes: list[ir.Node] = []
    nan_to_zero = False
    while True:
        readers = [use.node for use in weights.uses()]
        guard = _nan_guard(weights, readers, shapes)
        if guard:
            nodes += guard
            nan_to_zero = True
        elif len(readers) == 1 and _is_a_cast_to_the_same(readers[0]):
            nodes.append(readers[0])
        else:
            break
        weights = nodes[-1].outputs[0]
    if len(readers) != 1 or readers[0].domain or readers[0].op_type != "MatMul":
        return None
    product = readers[0]
    if product.inputs[0] is not weights or product.inputs[1] in (weights, None):
        return None
    return Weighing(operand(product, 1), nan_to_zero, (*nodes, product))


def _nan_guard(weights: ir.Value, readers: list[ir.Node], shapes: Shapes) -> list[ir.Node]:
    """Return IsNaN and Where(nan, 0, weights) where they read the weights."""
    nan = next((node for node in readers if not node.domain and node.op_type == "IsNaN"), None)
    where = next((node for node in readers if not node.domain and node.op_type == "Where"), None)
    if nan is None or where is None or len(readers) != 2:
        return []
    condition, zero, otherwise = where.inputs
    is_guard = condition is nan.outputs[0] and otherwise is weights and zero is not None
    return [nan, where] if is_guard and zero is not None and shapes.number(zero, RANK) == 0.0 else []


def _is_a_cast_to_the_same(node: ir.Node) -> bool:
    if node.domain or node.op_type not in ("Cast", "Identity"):
        return False
    to = node.attributes.get_int("to", int(ir.DataType.FLOAT))
    return to == ir.DataType.FLOAT and element_type(operand(node, 0)) == ir.DataType.FLOAT


def _is_whole(nodes: tuple[ir.Node, ...]) -> bool:
    """Whether all nodes stand in the same graph, and only the last one makes what others read."""
    inside = set(nodes)
    return all(node.graph is nodes[0].graph for node in nodes) and not any(
        value.is_graph_output() or any(use.node not in inside for use in value.uses())
        for node in nodes[:-1]
        for value in node.outputs
    )


# ---- Where the heads come from


def _by_token(
    scores: Scores, weighing: Weighing, nodes: tuple[ir.Node, ...], shapes: Shapes
) -> Attention | None:
    """Take q, k, v and, if it can be, y from before the Transposes that make their heads."""
    q, k = _before(scores.left, TOKENS_AND_HEADS, shapes), _before(scores.right, _TURNED_HEADS, shapes)
    v, turn = _before(weighing.heads, TOKENS_AND_HEADS, shapes), _only_transpose(nodes[-1])
    if q is None or k is None or v is None or v.factor != 1.0:
        return None
    scale = scores.scale * q.factor * k.factor
    values, masks, guard = (q.value, k.value, v.value), scores.masks, weighing.nan_to_zero
    whole = nodes if turn is None else (*nodes, turn)
    return Attention(ATTENTION, *values, masks, scale, guard, whole, is_turned=turn is None)


def _by_head(
    scores: Scores, weighing: Weighing, nodes: tuple[ir.Node, ...], shapes: Shapes
) -> Attention | None:
    """Take the heads themselves, where their ranks are known, and those of k as they were before turned."""
    q, k, v = _unscaled(scores.left, shapes), _before(scores.right, _TURNED, shapes), weighing.heads
    if k is None or any(shapes.rank(value) != RANK for value in (q.value, v)):
        return None
    scale = scores.scale * q.factor * k.factor
    return Attention(ATTENTION_BY_HEAD, q.value, k.value, v, scores.masks, scale, weighing.nan_to_zero, nodes)


def _before(value: ir.Value, axes: tuple[int, ...], shapes: Shapes) -> Scaled | None:
    """Return the value whose axes Transposes have brought into this order, and what multiplies it since."""
    factor = 1.0
    done: tuple[int, ...] = _AS_IS
    while done != axes:
        scaled = _unscaled(value, shapes)
        turned = _turned(scaled.value, shapes)
        if turned is None:
            return None
        source, turn = turned
        factor *= scaled.factor
        done = tuple(turn[axis] for axis in done)
        value = source
    return Scaled(value, factor)


def _turned(value: ir.Value, shapes: Shapes) -> tuple[ir.Value, tuple[int, ...]] | None:
    """Return of what a value of rank 4 is a Transpose, and its permutation."""
    node = value.producer()
    axes = None if node is None else permutation(node)
    if node is not None and axes is not None:
        return (operand(node, 0), axes) if len(axes) == RANK else None
    back = made_by(value, "Reshape", inputs=2)
    turn = None if back is None else made_by(operand(back, 0), "Transpose")
    flat = None if turn is None else made_by(operand(turn, 0), "Reshape", inputs=2)
    if back is None or turn is None or flat is None or permutation(turn) != (0, 2, 1):
        return None
    x = operand(flat, 0)
    return (x, _TURNED) if _is_turned_by_way_of_three_axes(x, flat, back, shapes) else None


def _is_turned_by_way_of_three_axes(x: ir.Value, flat: ir.Node, back: ir.Node, shapes: Shapes) -> bool:
    """Whether the last two axes of x change places while batch and heads are one, as torch exports it."""
    if shapes.rank(x) != RANK:
        return False
    batch, head, row, width = (shapes.dimension(x, axis) for axis in range(RANK))
    three, four = shapes.entries(operand(flat, 1)), shapes.entries(operand(back, 1))
    return (
        three is not None
        and len(three) == RANK - 1
        and three[1:] == [row, width]
        and four == [batch, head, width, row]
    )


def _only_transpose(product: ir.Node) -> ir.Node | None:
    """Return the Transpose that brings heads of y behind rows and alone reads them, in the same graph."""
    heads = product.outputs[0]
    uses = [] if heads.is_graph_output() else heads.uses()
    nodes = [use.node for use in uses if permutation(use.node) == TOKENS_AND_HEADS]
    return nodes[0] if len(uses) == len(nodes) == 1 and nodes[0].graph is product.graph else None


# ---- Whether the op can do it, and the op


def _has_a_kernel(found: Attention) -> bool:
    """Whether types, the number and what is known of shapes are such as the op takes."""
    added = [mask.value for mask in found.masks if mask.number is None]
    values = (found.q, found.k, found.v, *(mask.value for mask in found.masks))
    if any(value.producer() in found.nodes for value in values):
        return False
    if any(element_type(value) != ir.DataType.FLOAT for value in (found.q, found.k, found.v, *added)):
        return False
    with np.errstate(over="ignore"):
        is_finite = bool(np.isfinite(np.float32(found.scale)))
    return is_finite and all(_is_inside(mask.value, found) for mask in found.masks)


def _is_inside(mask: ir.Value, found: Attention) -> bool:
    """Whether nothing says that a mask has more rows or tokens than the scores have."""
    q, k = found.q.shape, found.k.shape
    if mask.shape is None or q is None or k is None:
        return True
    row = 1 if found.op_type == ATTENTION else 2
    pairs = zip(reversed(mask.shape), (k[row], q[row]), strict=False)
    return len(mask.shape) <= RANK and all(
        own in (1, other) for own, other in pairs if isinstance(own, int) and isinstance(other, int)
    )
