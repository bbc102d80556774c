"""Report: what a conversion did to each linear layer, and why not to the others."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from onnx_bitnet.errors import DataError, one_line

SCHEMA = "onnx_bitnet.report/1"
KEPT = "onnx_bitnet.kept"  # key of the note in a converted model: why each layer left is float

# Names of layers in one sentence.
_NAMES = 5

# Called as progress(done, total, what): what long calls take to tell how far they are.
Progress = Callable[[int, int, str], None]


class Reason(Enum):
    """Why a layer was left as it is. This list is closed: every refusal is one of these."""

    NOT_TERNARY = "not-ternary"
    KEPT_BY_RULE = "kept-by-rule"
    KEPT_BY_SEARCH = "kept-by-search"
    KEPT_FIRST = "kept-first"
    KEPT_LAST = "kept-last"
    WEIGHT_NOT_CONSTANT = "weight-not-constant"
    WEIGHT_OVERRIDABLE = "weight-overridable"
    WEIGHT_IS_ARGUMENT = "weight-is-argument"
    WEIGHT_TYPE = "weight-type"
    WEIGHT_RANK = "weight-rank"
    WEIGHT_BATCHED = "weight-batched"
    WEIGHT_NOT_EVALUATED = "weight-not-evaluated"
    WEIGHT_TOO_WIDE = "weight-too-wide"
    ACTIVATION_TYPE = "activation-type"
    RANK_UNKNOWN = "rank-unknown"
    CONV_NOT_POINTWISE = "conv-not-pointwise"
    EINSUM_NOT_LINEAR = "einsum-not-linear"
    TRANSPOSED_BATCH = "transposed-batch"
    OPSET_TOO_OLD = "opset-too-old"
    OPSET_TOO_NEW = "opset-too-new"
    ALREADY_QUANTIZED = "already-quantized"
    NO_STOCK_OP = "no-stock-op"

    @property
    def explanation(self) -> str:
        """One sentence for people: what the reason means and what to do about it."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Reason.NOT_TERNARY: "the weight is not ternary; mode='ternary' would convert it at a loss",
    Reason.KEPT_BY_RULE: "a rule of the recipe keeps it",
    Reason.KEPT_BY_SEARCH: "the search for the goals keeps it",
    Reason.KEPT_FIRST: "keep_first is set",
    Reason.KEPT_LAST: "keep_last is set",
    Reason.WEIGHT_NOT_CONSTANT: "no operand is constant, as in attention; nothing to pack",
    Reason.WEIGHT_OVERRIDABLE: "the weight is also a graph input, which a caller may override",
    Reason.WEIGHT_IS_ARGUMENT: "the weight is an argument of a function; inline the function first",
    Reason.WEIGHT_TYPE: "the weight is not float32, float16 or bfloat16",
    Reason.WEIGHT_RANK: "the weight is not a matrix",
    Reason.WEIGHT_BATCHED: "the weight is a batch of different matrices",
    Reason.WEIGHT_NOT_EVALUATED: "the constant subgraph behind the weight could not be evaluated",
    Reason.WEIGHT_TOO_WIDE: "too many inputs share a scale for 32-bit sums; use blocks or 32 activation bits",
    Reason.ACTIVATION_TYPE: "the activations are neither float32 nor float16",
    Reason.RANK_UNKNOWN: "the rank of the activations is not known, and shape inference does not find it",
    Reason.CONV_NOT_POINTWISE: "only 1x1 convolutions of stride 1 without padding or groups are linear",
    Reason.EINSUM_NOT_LINEAR: "the equation is not a product with one constant matrix",
    Reason.TRANSPOSED_BATCH: "the batch dimensions are transposed",
    Reason.OPSET_TOO_OLD: "the model's opset is too old; upgrade it with onnx.version_converter",
    Reason.OPSET_TOO_NEW: "the model's opset is newer than this onnx_bitnet; export with an older one",
    Reason.ALREADY_QUANTIZED: "it is an integer product already",
    Reason.NO_STOCK_OP: "onnxruntime itself has no op for this form; use one plane, int4 or int8",
}


@dataclass(frozen=True)
class Layer:
    """What became of one linear layer.

    Args:
        name: unique name of the layer; the node's own name where it has one.
        op_type: ONNX operator it was.
        where: the graph it is in: empty for the main graph, else for example `node If_3 / then_branch`.
        n: outputs, 0 if unknown.
        k: inputs, 0 if unknown.
        reason: why it was left, None if it was converted.
        detail: the reason's particulars in words; of a converted layer, what was settled for it, and why.
        format: canonical format of the packed weight; for other targets `nbits2`, `nbits4` and `nbits8`
            (MatMulNBits), `int8` (DynamicQuantizeMatMul), `fp8e4m3`, `fp8e5m2`, `float32` or `float16`.
        granularity: `tensor`, `channel`, `block:B` or `block:RxB`.
        scale_type: type in which its scales are stored, `float32` or `float16`; empty if it has none.
        planes: planes of codes.
        activation_bits: 8, 16 or 32.
        activation_scale: the step of statically quantized activations, 0 if each row has its own.
        activations: what became of the quantization of activations that the graph itself does: folded into
            the op, and whether results are equal bit for bit; or left in the graph, and why.
        rotation: block size of the Hadamard transform that the weight is stored in, 0 for none.
        lossless: decode(packed) equals the original weight, value for value.
        sqnr_db: signal to noise of the weight in dB; None when lossless.
        zeros: share of codes that mean zero.
        float_bytes: bytes of the original weight.
        packed_bytes: bytes of packed codes, scales and zero points.
        shared_with: name of an earlier layer whose packed weight this one uses, if any.
        fused: name of the op that this layer is part of, if it is fused with others; None in a plan.
    """

    name: str
    op_type: str
    where: str = ""
    n: int = 0
    k: int = 0
    reason: Reason | None = None
    detail: str = ""
    format: str | None = None
    granularity: str | None = None
    scale_type: str = ""
    planes: int = 0
    activation_bits: int = 0
    activation_scale: float = 0.0
    activations: str = ""
    rotation: int = 0
    lossless: bool = False
    sqnr_db: float | None = None
    zeros: float | None = None
    float_bytes: int = 0
    packed_bytes: int = 0
    shared_with: str | None = None
    fused: str | None = None

    @property
    def converted(self) -> bool:
        """Whether the layer is packed now."""
        return self.reason is None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values."""
        fields = dataclasses.asdict(self)
        fields["reason"] = self.reason.value if self.reason else None
        return fields


@dataclass(frozen=True)
class FrontierPoint:
    """One way to convert the whole model, of those that trade size against error best.

    Args:
        nbytes: size of the files: exact for the chosen one of a plan or conversion, else predicted.
        loss: predicted error of the outputs: 1 - cosine, or noise over signal if the goal is `min_sqnr`.
        time: predicted time of the layers to be decided, where it is 1 in float; see speed.py.
        measured: the same as it was measured with float activations; None if it was not.
        chosen: whether it is what the recipe says.
    """

    nbytes: int
    loss: float
    time: float = 1.0
    measured: float | None = None
    chosen: bool = False


def read_frontier(path: Path) -> tuple[FrontierPoint, ...]:
    """Read the frontier in what `convert`, `plan` or `sensitivity` printed with --json.

    Raises:
        DataError: the file cannot be read, or has no frontier.
    """
    try:
        points = json.loads(path.read_text(encoding="utf-8"))["frontier"]
        return tuple(FrontierPoint(**point) for point in points)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read as a report: {one_line(error)}; write it with convert --json"
        ) from None


@dataclass(frozen=True)
class Report:
    """What `convert` or `plan` did, or would do, with a model.

    Args:
        source: path of the model read.
        output: path of the model written, None for a plan.
        recipe: the effective recipe as plain values.
        layers: every linear layer, converted or not, in graph order.
        notes: sentences the user should read, such as what `auto` left alone.
        source_bytes: size of the model and its external data.
        output_bytes: the same of the result; a prediction in a plan.
        frontier: what the planner had to choose from, from the smallest on; empty without goals.
        data_unused: calibration data was given, and no step needed any; a note says so.
    """

    source: str
    output: str | None
    recipe: dict[str, Any]
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()
    source_bytes: int = 0
    output_bytes: int = 0
    frontier: tuple[FrontierPoint, ...] = ()
    data_unused: bool = False

    @property
    def converted(self) -> tuple[Layer, ...]:
        """The layers that are packed."""
        return tuple(layer for layer in self.layers if layer.converted)

    @property
    def kept(self) -> tuple[Layer, ...]:
        """The layers that were left, each with its reason."""
        return tuple(layer for layer in self.layers if not layer.converted)

    @property
    def lossless(self) -> bool:
        """Whether something was converted and every converted layer decodes to its original weight."""
        return bool(self.converted) and all(layer.lossless for layer in self.converted)

    def reasons(self) -> dict[Reason, int]:
        """Count the layers left, by reason, most frequent first."""
        return dict(Counter(layer.reason for layer in self.kept if layer.reason).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as one JSON-able document."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "output": self.output,
            "recipe": self.recipe,
            "lossless": self.lossless,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "converted": len(self.converted),
            "kept": len(self.kept),
            "reasons": {reason.value: count for reason, count in self.reasons().items()},
            "notes": list(self.notes),
            "frontier": [dataclasses.asdict(point) for point in self.frontier],
            "layers": [layer.to_dict() for layer in self.layers],
        }


def named(layers: Sequence[str]) -> str:
    """Write names of layers for people, the first few if there are many.

    >>> named(["a", "b"])
    "layers 'a', 'b'"
    """
    shown = ", ".join(map(repr, layers[:_NAMES]))
    more = f" and {len(layers) - _NAMES} more" if len(layers) > _NAMES else ""
    return f"layer{'s' * (len(layers) > 1)} {shown}{more}"


def size(nbytes: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
