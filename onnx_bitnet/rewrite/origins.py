"""Which values of a model are the same in every run, and why another one is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

import onnx_ir as ir

from onnx_bitnet.graphs import roots, subgraphs
from onnx_bitnet.report import Reason

OpId = tuple[str, str, str]

# Their outputs differ between runs although their inputs do not.
_RANDOM = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
# What may stand between a weight and its layer; followed to say why an operand is not constant.
_TRANSPARENT = frozenset(
    {"Cast", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass(frozen=True)
class Facts:
    """What holds for a whole model, found in one walk before any layer is looked at.

    Args:
        known: values that are the same in every run: initializers that no caller can override, Constant nodes
            and everything computed from these alone.
        arguments: inputs of model functions for which some call passes a known value, and what is computed
            from these alone.
        functions: the model's functions that may be part of a constant subgraph.
        opset: version of the default domain that the model imports.
    """

    known: Set[ir.Value]
    arguments: Set[ir.Value]
    functions: Mapping[OpId, ir.Function]
    opset: int


@dataclass(frozen=True)
class NotConstant:
    """Why an operand cannot be packed."""

    reason: Reason
    detail: str


def survey(model: ir.Model) -> Facts:
    """Find the constant values of a model, in its main graph, subgraphs and functions."""
    pure = _pure_functions(model)
    known: set[ir.Value] = set()
    for container in roots(model):
        _collect(container, known, pure, overridable=model.ir_version >= 4)
    return Facts(frozenset(known), _constant_arguments(model, known, pure), pure, opset_version(model.graph))


def opset_version(graph: ir.Graph) -> int:
    """Return the version of the default domain that a main graph or a function body imports, 0 if none."""
    return graph.opset_imports.get("") or graph.opset_imports.get("ai.onnx") or 0


def why_not(value: ir.Value, facts: Facts) -> NotConstant:
    """Say why a value that is not in `facts.known` is not constant."""
    seen: set[ir.Value] = set()  # a malformed graph may have a cycle
    while True:
        if value.is_initializer() and value.is_graph_input():
            return NotConstant(
                Reason.WEIGHT_OVERRIDABLE,
                f"initializer {value.name!r} is also a graph input; remove it from the inputs",
            )
        if value in facts.arguments:
            what = "is an argument" if value.producer() is None else "is made of arguments"
            return NotConstant(Reason.WEIGHT_IS_ARGUMENT, f"{value.name!r} {what} of the function")
        node = value.producer()
        if node is None or value in seen:
            return NotConstant(Reason.WEIGHT_NOT_CONSTANT, f"{value.name!r} is an input")
        seen.add(value)
        if reference := next((a for a in node.attributes.values() if a.is_ref()), None):
            return NotConstant(
                Reason.WEIGHT_IS_ARGUMENT,
                f"{value.name!r} depends on attribute {reference.ref_attr_name!r} of the function",
            )
        if node.inputs and _all_known(node, facts.known) and not _is_random(node):
            what = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            return NotConstant(Reason.WEIGHT_NOT_EVALUATED, f"{value.name!r} is computed by {what}")
        if node.domain or node.op_type not in _TRANSPARENT or not node.inputs or node.inputs[0] is None:
            return NotConstant(
                Reason.WEIGHT_NOT_CONSTANT,
                f"{value.name!r} is computed by {node.op_type} from changing values",
            )
        value = node.inputs[0] if node.inputs[0] not in facts.known else _first_unknown(node, facts.known)


def _collect(
    graph: ir.Graph, known: set[ir.Value], pure: Mapping[OpId, ir.Function], *, overridable: bool
) -> None:
    for value in graph.initializers.values():
        if not (overridable and value.is_graph_input()):
            known.add(value)
    for node in graph:
        if _is_deterministic(node, pure) and _all_known(node, known):
            known.update(node.outputs)
        for _, body in subgraphs(node):
            _collect(body, known, pure, overridable=True)


def _is_deterministic(node: ir.Node, pure: Mapping[OpId, ir.Function]) -> bool:
    if any(
        a.is_ref() or a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for a in node.attributes.values()
    ):
        return False
    if not node.inputs:
        return node.domain == "" and node.op_type == "Constant"
    return node.op_identifier() in pure or (node.domain == "" and not _is_random(node))


def _is_random(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in _RANDOM


def _all_known(node: ir.Node, known: Set[ir.Value]) -> bool:
    return all(value is None or value in known for value in node.inputs)


def _first_unknown(node: ir.Node, known: Set[ir.Value]) -> ir.Value:
    return next(value for value in node.inputs if value is not None and value not in known)


def _pure_functions(model: ir.Model) -> dict[OpId, ir.Function]:
    """Return the functions that only call deterministic standard ops and one another."""
    pure = dict(model.functions)
    while True:
        impure = [key for key, function in pure.items() if not _is_pure(function.all_nodes(), pure)]
        if not impure:
            return pure
        for key in impure:
            del pure[key]


def _is_pure(nodes: Iterable[ir.Node], pure: Mapping[OpId, ir.Function]) -> bool:
    return all(node.op_identifier() in pure or (node.domain == "" and not _is_random(node)) for node in nodes)


def _constant_arguments(
    model: ir.Model, known: Set[ir.Value], pure: Mapping[OpId, ir.Function]
) -> frozenset[ir.Value]:
    """Return the function inputs that get a known value at some call, and what these alone make."""
    calls = [
        (function.inputs, node.inputs)
        for graph in roots(model)
        for node in graph.all_nodes()
        if (function := model.functions.get(node.op_identifier())) is not None
    ]
    constant = set(known)
    while calls:
        for function in model.functions.values():
            _collect(function.graph, constant, pure, overridable=True)
        passed = {
            formal
            for formals, actuals in calls
            for formal, actual in zip(formals, actuals, strict=False)
            if actual in constant
        }
        if passed <= constant:
            break
        constant |= passed
    return frozenset(constant - known)
