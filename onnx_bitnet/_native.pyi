from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

def isas() -> list[tuple[str, bool]]: ...
def allowed_isas(isa: str | None = None) -> list[str]: ...
def wrong_isas() -> list[str]: ...
def kernels() -> list[tuple[str, str, str]]: ...
def find(op: str, format: str, isa: str | None = None) -> str | None: ...
def formats() -> list[tuple[str, str, bool]]: ...
def row_bytes(format: str, k: int) -> int: ...
def pack(format: str, codes: Array) -> Array: ...
def unpack(format: str, packed: Array, k: int) -> Array: ...
def panels(
    weight: Array, k: int, block_size: int = 0, format: str = "i2s", *, isa: str | None = None
) -> tuple[Array, Array]: ...
def merged_panels(
    weight: Array, ratio: Sequence[int], k: int, block_size: int = 0, *, bits: int, isa: str | None = None
) -> tuple[Array, Array]: ...
def panel(rows: Array, out: Array, *, isa: str) -> None: ...
def squeezed(panels: Array, n: int, k: int, block_size: int = 0) -> Array: ...
def shared_totals() -> tuple[int, int]: ...
def dot(
    panel: Array, q: Array, acc: Array, *, panels: int, group_steps: int, isa: str, format: str = "i2s"
) -> None: ...
def dotf(panel: Array, x: Array, acc: Array, *, panels: int, group_steps: int, isa: str) -> None: ...
def actq(
    x: Array, q: Array, sums: Array, *, block_size: int = 0, bits: int = 8, step: float = 0.0, isa: str
) -> float: ...
def scale(
    acc: Array,
    sums: Array,
    code_sum: Array,
    scale: Array,
    zero_point: Array | None,
    factor: Array,
    y: Array,
    *,
    panels: int,
    isa: str,
    zero: int = 1,
    before: Array | None = None,
    bias: Array | None = None,
    rescale: Array | None = None,
) -> None: ...
def widen(x: Array, y: Array, *, isa: str) -> None: ...
def narrow(x: Array, y: Array, *, isa: str) -> None: ...
def hadamard(x: Array, signs: Array, y: Array, *, block_size: int, isa: str) -> None: ...
def attention(
    q: Array,
    keys: Array,
    values: Array,
    mask: Array,
    scores: Array,
    y: Array,
    *,
    scale: float,
    nan_to_zero: bool = False,
    isa: str,
) -> None: ...
def transpose(x: Array, y: Array, *, isa: str) -> None: ...
def row_moments(w: Array, out: Array, *, block_size: int = 0, isa: str) -> None: ...
def row_optimum(w: Array, scale: Array, levels: int, *, block_size: int = 0, isa: str) -> None: ...
def row_assign(
    w: Array, steps: Array, packed: Array | None, rest: Array | None, *, block_size: int = 0, isa: str
) -> None: ...
def row_decode(
    packed: Array,
    scale: Array,
    zero_point: Array,
    out: Array,
    *,
    block_size: int = 0,
    add: bool = False,
    isa: str,
) -> None: ...
def row_compare(w: Array, decoded: Array, *, isa: str) -> tuple[float, float, int]: ...

class MatMul:
    n: int
    k: int
    def __init__(
        self,
        weight: Array,
        scale: Array,
        zero_point: Array | None,
        bias: Array | None,
        *,
        k: int,
        format: str = "i2s",
        block_size: int = 0,
        activation_bits: int = 8,
        activation_scale: float = 0.0,
        isa: str | None = None,
    ) -> None: ...
    def __call__(self, x: Array, *, threads: int = 1) -> Array: ...

def matmul(
    x: Array,
    weight: Array,
    scale: Array,
    zero_point: Array | None,
    bias: Array | None,
    *,
    threads: int = 1,
    k: int,
    format: str = "i2s",
    block_size: int = 0,
    activation_bits: int = 8,
    activation_scale: float = 0.0,
    isa: str | None = None,
) -> Array: ...

# ---- quantization: weight is float32, float16 or bfloat16 (N, K) of any strides, see quantize.py

def weight_nonfinite(weight: Array, first: int, last: int) -> tuple[int, tuple[int, int] | None]: ...
def weight_magnitudes(weight: Array, magnitude: Array, first: int, last: int) -> bool: ...
def moments(weight: Array, steps: Array, block_size: int, out: Array, first: int, last: int) -> None: ...
def products(weight: Array, steps: Array, block_size: int, out: Array, first: int, last: int) -> None: ...
def histogram(weight: Array, steps: Array, first: int, last: int) -> tuple[Array, Array]: ...
def histogram_low(weight: Array, steps: Array, slot: Array, first: int, last: int) -> Array: ...
def step_of_moments(moments: Array, count: int, *, rounding: str, levels: int, scale_type: type) -> Array: ...
def finish_twn(step: Array, products: Array, *, levels: int, scale_type: type) -> Array: ...
def nearest_step(scale: float, *, levels: int, scale_type: type) -> Array: ...
def fit(
    weight: Array,
    steps: Array,
    block_size: int,
    first: int,
    last: int,
    *,
    rounding: str,
    levels: int,
    scale_type: type,
) -> bool: ...
def quantize(
    weight: Array,
    block_size: int,
    packed: Array,
    scale: Array,
    zero_point: Array,
    first: int,
    last: int,
    *,
    rounding: str,
    levels: int,
    scale_type: type,
) -> tuple[tuple[float, float, bool, int], bool]: ...
def assign(
    weight: Array,
    steps: Array,
    block_size: int,
    packed: Array,
    scale: Array,
    zero_point: Array,
    first: int,
    last: int,
) -> tuple[float, float, bool, int]: ...
def assign_integer(
    weight: Array,
    factor: Array,
    block_size: int,
    bits: int,
    packed: Array,
    scale: Array,
    zero_point: Array,
    first: int,
    last: int,
) -> tuple[float, float, bool, int]: ...
def dequantize(
    packed: Array,
    scale: Array,
    zero_point: Array,
    k: int,
    block_size: int,
    out: Array,
    first: int,
    last: int,
) -> None: ...
def observe(
    x: Array, sum: Array, abs_sum: Array, bins_per_unit: float, histogram: Array
) -> tuple[float, float, float, float]: ...
def fit_grid(
    coefficient: Array,
    w: Array,
    importance: Array,
    template: Array,
    theta: Array,
    *,
    block_size: int,
    rounds: int,
) -> None: ...

class Tables:
    def __init__(self, coefficient: Array, theta: Array) -> None: ...
    def feedback(
        self, group: Array, feedback: Array, base: Array, state: Array, index: Array, error: Array
    ) -> None: ...
