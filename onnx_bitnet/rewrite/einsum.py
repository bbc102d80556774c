"""Einsum that is a linear layer: `bsd,dhk->bshk` and its kin."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.matmul import refuse_both
from onnx_bitnet.rewrite.origins import NotConstant
from onnx_bitnet.rewrite.records import Linear, Refusal, Reshaping, Site, operand, rank

_ELLIPSIS = "."


@dataclass(frozen=True)
class _Equation:
    """A product of x and the weight, one letter per axis; `.` stands for the axes of an ellipsis."""

    x: str
    weight: str
    y: str

    @property
    def contracted(self) -> str:
        """Letters summed over, in the weight's order."""
        return "".join(c for c in self.weight if c in self.x and c not in self.y)

    @property
    def free(self) -> str:
        """Letters of the outputs, in the weight's order."""
        return "".join(c for c in self.weight if c in self.y and c not in self.x)

    @property
    def lead(self) -> str:
        """Letters of x that go through unchanged."""
        return "".join(c for c in self.x if c not in self.weight)


def match(site: Site) -> Linear | Refusal:
    """Match one node: x to (lead, contracted), through the layer to (lead, free), to y's order of axes.

    Several contracted letters are merged to one K and several free letters split from one N by Reshapes.
    """
    terms = _terms(site.node.attributes.get_string("equation", ""))
    if len(terms) != 3 or len(site.node.inputs) != 2:
        return site.refuse(Reason.EINSUM_NOT_LINEAR, f"it has {len(site.node.inputs)} operands")
    right = site.constant(operand(site.node, 1))
    left = site.constant(operand(site.node, 0)) if isinstance(right, NotConstant) else right
    if isinstance(right, NotConstant) and isinstance(left, NotConstant):
        return refuse_both(site, left, right)
    x_index, constant = (0, right) if isinstance(right, Constant) else (1, left)
    assert isinstance(constant, Constant)
    equation = _Equation(terms[x_index], terms[1 - x_index].replace(_ELLIPSIS, ""), terms[2])
    x_shape = operand(site.node, x_index).shape
    why = _not_linear(equation, terms[1 - x_index], constant) or _broadcast(equation, constant, x_shape)
    if why:
        return site.refuse(*why)
    return _linear(site, equation, x_index, constant)


def _terms(equation: str) -> list[str]:
    """Return the terms with `.` for an ellipsis, the output last, which may be implicit."""
    inputs, arrow, output = equation.replace(" ", "").replace("...", _ELLIPSIS).partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = "".join(terms)
        once = sorted(c for c in set(letters) - {_ELLIPSIS} if letters.count(c) == 1)
        output = (_ELLIPSIS if _ELLIPSIS in letters else "") + "".join(once)
    return [*terms, output]


def _not_linear(equation: _Equation, weight_term: str, constant: Constant) -> tuple[Reason, str] | None:
    x, weight, y = equation.x, equation.weight, equation.y
    if any(len(set(term)) != len(term) for term in (x, weight, y)):
        return Reason.EINSUM_NOT_LINEAR, "a letter occurs twice in one operand"
    if len(constant.shape) != len(weight) or (_ELLIPSIS in weight_term and _ELLIPSIS not in y):
        return Reason.EINSUM_NOT_LINEAR, f"the weight of shape {list(constant.shape)} is {weight_term!r}"
    if any(c in x and c in y for c in weight):
        return Reason.WEIGHT_BATCHED, "the operands share a letter that is not summed over"
    if not equation.contracted or set(equation.lead + equation.free) != set(y):
        return Reason.EINSUM_NOT_LINEAR, "it is no product summed over letters that both operands have"
    if len(equation.contracted + equation.free) != len(weight):
        return Reason.EINSUM_NOT_LINEAR, "it sums over a letter of one operand"
    return None


def _broadcast(equation: _Equation, constant: Constant, shape: ir.Shape | None) -> tuple[Reason, str] | None:
    """Refuse what sums over an axis of length 1 in one operand only, as far as the model tells lengths."""
    weight = dict(zip(equation.weight, constant.shape, strict=True))
    front, _, back = equation.x.partition(_ELLIPSIS)
    dims = tuple(shape or ())
    x = dict(zip(front, dims, strict=False)) | dict(zip(back[::-1], dims[::-1], strict=False))
    for c in equation.contracted:
        if isinstance(dim := x.get(c), int) and dim != weight[c]:
            return (
                Reason.EINSUM_NOT_LINEAR,
                f"{c!r} is {dim} long in one operand and {weight[c]} in the other",
            )
    return None


def _linear(site: Site, equation: _Equation, x_index: int, constant: Constant) -> Linear | Refusal:
    sizes = dict(zip(equation.weight, constant.shape, strict=True))
    contracted, free = equation.contracted, equation.free
    k = math.prod(sizes[c] for c in contracted)
    n = math.prod(sizes[c] for c in free)
    order = [equation.weight.index(c) for c in free + contracted]
    linear = site.linear(x_index, constant.transpose(*order).reshape(n, k))
    x_rank = rank(linear.x)
    if x_rank is None and _ELLIPSIS in equation.x:
        return site.refuse(Reason.RANK_UNKNOWN, f"the rank of {linear.x.name!r} is not stated", linear.weight)
    # the axes of an ellipsis get names of their own, which no equation has
    hidden = "".join(chr(0x100 + i) for i in range((x_rank or 0) - len(equation.x) + 1))
    x, y, lead = (term.replace(_ELLIPSIS, hidden) for term in (equation.x, equation.y, equation.lead))
    before = _transpose(x, lead + contracted)
    if len(contracted) > 1:
        before += (Reshaping("Reshape", (*[0] * len(lead), k)),)
    after: tuple[Reshaping, ...] = ()
    if len(free) != 1:
        after = (Reshaping("Reshape", (*[0] * len(lead), *(sizes[c] for c in free))),)
    return replace(linear, before=before, after=after + _transpose(lead + free, y))


def _transpose(axes: str, wanted: str) -> tuple[Reshaping, ...]:
    """Put axes into the wanted order."""
    if axes == wanted:
        return ()
    return (Reshaping("Transpose", tuple(axes.index(c) for c in wanted)),)
