"""Layers that read the same activations become one: they are quantized once, and one op multiplies.

So q, k and v of attention, and gate and up of a gated feed-forward layer, are one packed op with the outputs
of all, and a Split behind it. A scale belongs to an output, so results stay the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.rewrite.cleanup import release
from onnx_bitnet.rewrite.functions import DOMAIN
from onnx_bitnet.rewrite.origins import opset_version
from onnx_bitnet.rewrite.records import operand, unique
from onnx_bitnet.rewrite.replace import LAYER, LAYERS, SEPARATOR, Shared, X, Y

_SPLIT_INPUT_SINCE = 13  # opset


@dataclass(frozen=True, eq=False)
class Placed:
    """A packed op in a model.

    Args:
        name: the layer's name; of a fused op, the names of its layers with `+` between them.
        node: the op.
        quantized: its weight.
        root: the main graph, or the body of the function that the node is in.
        layers: names of its layers.
    """

    name: str
    node: ir.Node
    quantized: Quantized
    root: ir.Graph
    layers: tuple[str, ...]


def fuse(placed: Sequence[Placed], shared: Shared) -> list[Placed]:
    """Fuse the packed ops that read the same value in the same way; return what the model holds then.

    Args:
        placed: the packed ops, in the order of each graph.
        shared: what `replace` was called with.
    """
    groups: dict[Hashable, list[Placed]] = defaultdict(list)
    for op in placed:
        groups[_key(op)].append(op)
    return [group[0] if len(group) == 1 else _join(group, shared) for group in groups.values()]


def _key(op: Placed) -> Hashable:
    """Equal for ops that differ in nothing but outputs."""
    attributes = op.node.attributes
    quantized = op.quantized
    return (
        op.node.graph,
        op.node.inputs[0],
        op.node.op_type,
        *(attributes[name].as_int() for name in ("K", "block_size", "activation_bits")),
        attributes["activation_scale"].as_float(),
        quantized.planes,
        quantized.scale.dtype,
        quantized.zero_point.tobytes(),
        op.name if quantized.zero_point.shape[1] > 1 else None,  # each output has zero points of its own
    )


def concatenate(parts: Sequence[Quantized]) -> Quantized:
    """Return the matrix of all parts' outputs, one part after the other; K, format and planes are the same.

    Nothing is lost: each output keeps its own scales, spread over the smallest blocks that a part has.
    """
    k, planes = parts[0].k, parts[0].planes
    block_size = min((part.block_size for part in parts if part.block_size), default=0)
    first = np.arange(-(-k // (block_size or k))) * block_size
    scales = [
        np.broadcast_to(part.scale[..., first // (part.block_size or k)], (planes, part.n, len(first)))
        for part in parts
    ]
    n = sum(part.n for part in parts)
    lossless = all(part.lossless for part in parts)
    return replace(
        parts[0],
        n=n,
        block_size=block_size,
        weight=np.concatenate([part.weight for part in parts], axis=1),
        scale=np.concatenate(scales, axis=1),
        lossless=lossless,
        sqnr_db=None if lossless else min(part.sqnr_db for part in parts if part.sqnr_db is not None),
        zeros=sum(part.zeros * part.n for part in parts) / n,
    )


def _join(group: Sequence[Placed], shared: Shared) -> Placed:
    """Put one op and a Split in the place of the first of the ops, and remove all of them."""
    first = group[0]
    graph = first.node.graph
    assert isinstance(graph, ir.Graph)
    quantized = concatenate([op.quantized for op in group])
    name = "+".join(op.name for op in group)
    node = _fused(group, quantized, name, shared)
    split = _split(group, node, name, shared)
    graph.insert_before(first.node, [node, split])
    for op, output in zip(group, split.outputs, strict=True):
        (old,) = op.node.outputs
        output.name, output.type, output.shape = old.name, old.type, old.shape
        output.metadata_props.update(old.metadata_props)
        old.replace_all_uses_with(output, replace_graph_outputs=True)
    inputs = [value for op in group for value in op.node.inputs if value is not None]
    graph.remove([op.node for op in group], safe=True)
    release(inputs)
    return Placed(name, node, quantized, first.root, tuple(layer for op in group for layer in op.layers))


def _fused(group: Sequence[Placed], quantized: Quantized, name: str, shared: Shared) -> ir.Node:
    old = group[0].node
    graph = old.graph
    assert isinstance(graph, ir.Graph)
    x, weight, scale, *zero_point, _ = old.inputs
    biases = [ir.convenience.get_const_tensor(operand(op.node, -1)) for op in group]
    arrays = {
        str(weight and weight.name): quantized.weight,
        str(scale and scale.name): quantized.scale,
        f"{name}.bias": np.concatenate([tensor.numpy() for tensor in biases if tensor is not None]),
    }
    packed, scales, bias = (
        shared.constant(graph, (name, base), f"{base}.fused", array) for base, array in arrays.items()
    )
    metadata = old.metadata_props | {
        LAYER: name,
        X: str(x and x.name),
        LAYERS: SEPARATOR.join(layer for op in group for layer in op.layers),
        Y: SEPARATOR.join(op.node.metadata_props[Y] for op in group),
    }
    attributes = [value for key, value in old.attributes.items() if key != "N"]
    return ir.Node(
        DOMAIN,
        old.op_type,
        [x, packed, scales, *zero_point, bias],
        [*attributes, ir.AttrInt64("N", quantized.n)],
        name=unique(name, shared.node_names),
        doc_string=old.doc_string,
        metadata_props=metadata,
    )


def _split(group: Sequence[Placed], node: ir.Node, name: str, shared: Shared) -> ir.Node:
    old = group[0].node.outputs[0]
    joined = node.outputs[0]
    joined.name, joined.type = unique(f"{name}.outputs", shared.names), old.type
    sizes = [op.quantized.n for op in group]
    inputs: list[ir.Value | None] = [joined]
    attributes: dict[str, object] = {"axis": -1}
    if opset_version(group[0].root) < _SPLIT_INPUT_SINCE:
        attributes["split"] = sizes
    else:
        label = f"{DOMAIN}.sizes.{'_'.join(map(str, sizes))}"
        graph = group[0].node.graph
        assert isinstance(graph, ir.Graph)
        inputs.append(shared.constant(graph, label, label, np.array(sizes, np.int64)))
    return ir.Node(
        "",
        "Split",
        inputs,
        ir.convenience.convert_attributes(attributes),  # type: ignore[arg-type]
        num_outputs=len(group),
        name=unique(f"{name}.Split", shared.node_names),
        metadata_props={LAYER: name},
    )
