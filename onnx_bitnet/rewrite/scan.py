"""Find every linear layer of a model, and say of every node that looks like one why it is none of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import onnx_ir as ir
from onnx_ir.passes import PreconditionError
from onnx_ir.passes.common import InlinePass

from onnx_bitnet.errors import ModelError, one_line
from onnx_bitnet.graphs import roots, subgraphs
from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite import conv, einsum, gemm, matmul
from onnx_bitnet.rewrite.activation import quantization
from onnx_bitnet.rewrite.bfloat16 import widen
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.epilogue import absorb
from onnx_bitnet.rewrite.functions import DOMAIN, FLOAT16_OPSET, OPSETS
from onnx_bitnet.rewrite.origins import Facts, OpId, opset_version, survey
from onnx_bitnet.rewrite.ranks import state_shapes
from onnx_bitnet.rewrite.records import Linear, Refusal, Site, unique
from onnx_bitnet.rewrite.types import FLOATS

_MICROSOFT = "com.microsoft"

MATCHERS: Mapping[tuple[str, str], Callable[[Site], Linear | Refusal]] = MappingProxyType(
    {
        ("", "MatMul"): matmul.match,
        (_MICROSOFT, "FusedMatMul"): matmul.match,
        ("", "Gemm"): gemm.match,
        ("", "Conv"): conv.match,
        ("", "Einsum"): einsum.match,
    }
)
"""Domain and operator -> what recognizes it as a linear layer."""

_QUANTIZED = frozenset(
    {
        ("", "ConvInteger"),
        ("", "MatMulInteger"),
        ("", "QLinearConv"),
        ("", "QLinearMatMul"),
        (_MICROSOFT, "DynamicQuantizeMatMul"),
        (_MICROSOFT, "MatMulBnb4"),
        (_MICROSOFT, "MatMulIntegerToFloat"),
        (_MICROSOFT, "MatMulNBits"),
        (_MICROSOFT, "QGemm"),
    }
)


def scan(model: ir.Model) -> tuple[Linear | Refusal, ...]:
    """Find every candidate, in graph order: main graph, bodies of If, Loop and Scan, then model functions.

    Nothing is loaded except shapes and axes, and constant subgraphs whose shape the model does not tell.
    Products of constants are part of constant subgraphs and no candidates.

    Raises:
        ModelError: a node lacks inputs that its operator requires.
    """
    return tuple(_examine(site) for site in _sites(model, survey(model)))


def prepare(model: ir.Model) -> bool:
    """Bring a model into the form that is scanned, in place; return whether it was computed in bfloat16."""
    inline_weight_arguments(model)
    state_ranks(model)
    return widen(model)


def state_ranks(model: ir.Model) -> None:
    """Infer the shapes of operands where a layer needs a rank that the model does not state."""
    refused = (found for found in scan(model) if isinstance(found, Refusal))
    nodes = (found.node for found in refused if found.reason is Reason.RANK_UNKNOWN)
    unknown = {value for node in nodes for value in node.inputs if value is not None and value.shape is None}
    if unknown:
        state_shapes(model, unknown)


def inline_weight_arguments(model: ir.Model) -> None:
    """Inline the functions whose weights come in as arguments, so that each call has a layer of its own.

    Only these functions are touched. One that imports another opset than the model, or that takes a graph as
    an attribute, cannot be inlined and stays; its layers are refused.
    """
    while targets := _functions_to_inline(model):
        _inline(model, targets)


def _functions_to_inline(model: ir.Model) -> frozenset[OpId]:
    bodies = {
        site.root
        for site in _sites(model, survey(model))
        if isinstance(found := _examine(site), Refusal) and found.reason is Reason.WEIGHT_IS_ARGUMENT
    }
    targets = (key for key, function in model.functions.items() if function.graph in bodies)
    return frozenset(target for target in targets if _can_inline(model, target))


def _inline(model: ir.Model, targets: frozenset[OpId]) -> None:
    try:
        InlinePass(criteria=lambda function: function.identifier() in targets)(model)
    except (RuntimeError, ValueError, PreconditionError) as error:
        raise ModelError(f"functions of the model cannot be inlined: {one_line(error)}") from None
    # what was inlined into another function may need domains which that does not import yet
    for function in model.functions.values():
        for node in function.graph.all_nodes():
            if node.domain not in function.opset_imports and node.domain in model.opset_imports:
                function.opset_imports[node.domain] = model.opset_imports[node.domain]


def _can_inline(model: ir.Model, target: OpId) -> bool:
    function = model.functions[target]
    imports = model.opset_imports
    if any(imports.get(domain, version) != version for domain, version in function.opset_imports.items()):
        return False
    calls = [node for graph in roots(model) for node in graph.all_nodes() if node.op_identifier() == target]
    return bool(calls) and all(
        len(node.inputs) <= len(function.inputs)
        and len(node.outputs) == len(function.outputs)
        and not any(subgraphs(node))
        for node in calls
    )


def _sites(model: ir.Model, facts: Facts) -> Iterator[Site]:
    """Yield the candidates with unique names."""
    places = [(model.graph, "")]
    for function in model.functions.values():
        if function.domain != DOMAIN:
            places.append((function.graph, f"function {function.domain}::{function.name}"))
    candidates = [
        (node, where, root)
        for root, place in places
        for node, where in _nodes(root, place)
        if node.outputs and node.outputs[0] not in facts.known
    ]
    natural = [_label(node) for node, _, _ in candidates]
    taken = set(natural)
    given: set[str] = set()
    for name, (node, where, root) in zip(natural, candidates, strict=True):
        if name in given:
            name = unique(name, taken)
        given.add(name)
        yield Site(node, name, where, root, facts)


def _nodes(graph: ir.Graph, where: str) -> Iterator[tuple[ir.Node, str]]:
    for node in graph:
        kind = (node.domain, node.op_type)
        if kind in MATCHERS or kind in _QUANTIZED:
            yield node, where
        for name, body in subgraphs(node):
            inside = f"node {_label(node)} / {name}"
            yield from _nodes(body, f"{where} / {inside}" if where else inside)


def _label(node: ir.Node) -> str:
    return node.name or (node.outputs and node.outputs[0].name) or node.op_type


def _examine(site: Site) -> Linear | Refusal:
    node = site.node
    kind = (node.domain, node.op_type)
    if kind in _QUANTIZED:
        return site.refuse(Reason.ALREADY_QUANTIZED, node.op_type)
    if len(node.inputs) < 1 + (node.op_type != "Einsum") or None in node.inputs[:2]:
        raise ModelError(f"{site.name!r}: {node.op_type} lacks an input; the model is not valid")
    found = _argument_attribute(site) or MATCHERS[kind](site)
    if isinstance(found, Refusal):
        return found
    return _unsuitable(found, site) or _absorbed(quantization(found, site), site)


def _absorbed(linear: Linear, site: Site) -> Linear:
    """Take up what follows the layer, in both of its ways to treat activations."""
    folded = linear.folded and absorb(linear.folded, site)
    return replace(absorb(linear, site), folded=folded)


def _argument_attribute(site: Site) -> Refusal | None:
    """Refuse a node whose attributes are known only where its function is called."""
    reference = next((attribute for attribute in site.node.attributes.values() if attribute.is_ref()), None)
    if reference is None:
        return None
    for value in site.node.inputs[:2]:
        constant = site.constant(value)
        if isinstance(constant, Constant) or constant.reason is Reason.WEIGHT_IS_ARGUMENT:
            detail = f"attribute {reference.name!r} is an argument of the function"
            return site.refuse(Reason.WEIGHT_IS_ARGUMENT, detail)
    return site.refuse(Reason.WEIGHT_NOT_CONSTANT, "no operand is constant")


def _unsuitable(linear: Linear, site: Site) -> Refusal | None:
    """Refuse types and opsets for which there is no op."""
    weight = linear.weight
    if weight.dtype not in FLOATS:
        return site.refuse(Reason.WEIGHT_TYPE, f"weight {weight.name!r} is {weight.dtype.name}", weight)
    if linear.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return site.refuse(Reason.ACTIVATION_TYPE, f"{linear.x.name!r} is {linear.dtype.name}", weight)
    lowest = FLOAT16_OPSET if linear.dtype == ir.DataType.FLOAT16 else OPSETS[0]
    for opset in (site.facts.opset, opset_version(linear.root)):
        if opset < lowest:
            return site.refuse(
                Reason.OPSET_TOO_OLD, f"opset {opset}; {linear.dtype.name} needs {lowest} or newer", weight
            )
        if opset > OPSETS[-1]:
            return site.refuse(
                Reason.OPSET_TOO_NEW, f"opset {opset}; {OPSETS[-1]} is the newest known", weight
            )
    return None
