"""MatMul and com.microsoft.FusedMatMul with a constant matrix on the right, or on the left."""

from __future__ import annotations

from dataclasses import replace

from onnx_bitnet.report import Reason
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.origins import NotConstant
from onnx_bitnet.rewrite.records import Linear, Refusal, Reshaping, Site, operand, rank


def match(site: Site) -> Linear | Refusal:
    """Match one node.

    1. x W: W (K, N), or (N, K) with transB; x of any rank, transposed first with transA.
    2. W x: y = (x^T W^T)^T, so x and y are transposed, which needs the rank of x. A vector x needs neither.

    A weight of higher rank with batch dimensions of one gives y that many dimensions more.
    """
    attributes = site.node.attributes
    if attributes.get_int("transBatchA", 0) or attributes.get_int("transBatchB", 0):
        return site.refuse(Reason.TRANSPOSED_BATCH)
    trans_left, trans_right = (bool(attributes.get_int(name, 0)) for name in ("transA", "transB"))
    right = site.constant(operand(site.node, 1))
    if isinstance(right, Constant):
        linear = _weight_right(site, right, trans_left, trans_right)
    else:
        left = site.constant(operand(site.node, 0))
        if isinstance(left, NotConstant):
            return refuse_both(site, left, right)
        linear = _weight_left(site, left, trans_left, trans_right)
    if isinstance(linear, Refusal):
        return linear
    return replace(linear, weight=linear.weight.scale(attributes.get_float("alpha", 1.0)))


def refuse_both(site: Site, left: NotConstant, right: NotConstant) -> Refusal:
    """Refuse because neither operand is constant, with the reason that one could do something about."""
    told = left if right.reason is Reason.WEIGHT_NOT_CONSTANT else right
    return site.refuse(told.reason, told.detail)


def swap_last(rank: int) -> Reshaping:
    """Transpose the last two axes."""
    return Reshaping("Transpose", (*range(rank - 2), rank - 1, rank - 2))


def _weight_right(site: Site, constant: Constant, trans_x: bool, trans_weight: bool) -> Linear | Refusal:
    weight = site.matrix(constant)
    if isinstance(weight, Refusal):
        return weight
    if not trans_weight:
        weight = weight.transpose(1, 0)
    linear = site.linear(0, weight)
    x_rank, weight_rank = rank(linear.x), len(constant.shape)
    if x_rank is None and (trans_x or weight_rank > 2):
        return _rank_unknown(linear, site)
    # onnxruntime ignores transA for a vector
    before = (swap_last(x_rank),) if trans_x and x_rank is not None and x_rank > 1 else ()
    return replace(linear, before=before, after=_more_dims(x_rank, weight_rank))


def _weight_left(site: Site, constant: Constant, trans_weight: bool, trans_x: bool) -> Linear | Refusal:
    weight = site.matrix(constant)
    if isinstance(weight, Refusal):
        return weight
    if trans_weight:
        weight = weight.transpose(1, 0)
    linear = site.linear(1, weight)
    x_rank = rank(linear.x)
    if x_rank is None:
        return _rank_unknown(linear, site)
    more_dims = _more_dims(x_rank, len(constant.shape))
    if x_rank == 1:
        return replace(linear, after=more_dims)
    before = () if trans_x else (swap_last(x_rank),)
    return replace(linear, before=before, after=(swap_last(x_rank), *more_dims))


def _more_dims(x_rank: int | None, weight_rank: int) -> tuple[Reshaping, ...]:
    """The unit dimensions that y has because the weight has more dimensions than x."""
    more = weight_rank - max(x_rank or 2, 2)
    return (Reshaping("Unsqueeze", tuple(range(more))),) if more > 0 else ()


def _rank_unknown(linear: Linear, site: Site) -> Refusal:
    return site.refuse(Reason.RANK_UNKNOWN, f"the rank of {linear.x.name!r} is not stated", linear.weight)
