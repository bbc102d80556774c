"""What the planner may choose for a layer, and what each choice costs in bytes and in weight error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_bitnet.activations import LayerStatistics
from onnx_bitnet.compensate import Problem
from onnx_bitnet.decide import Keep, decide
from onnx_bitnet.moments import moments_of
from onnx_bitnet.quantize import LayerSpec, Quantized, fitted_to, quantize_layer
from onnx_bitnet.recipe import MEASURED_ROUNDINGS, Recipe, Rule
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.rotation import Rotation, rotation
from onnx_bitnet.targets import store

# Outputs looked at when errors are weighted with the second moment of the inputs.
_ROWS = 128
# Outputs to which candidates are fitted.
_FITTED_ROWS = 32


@dataclass(frozen=True)
class Candidate:
    """A way to store a layer, as a rule says it.

    Args:
        name: for people.
        rule: fields of the rule, but for what it matches.
    """

    name: str
    rule: Mapping[str, Any]


KEEP = Candidate("float", {"action": "keep"})


# What the planner rotates by if the recipe says nothing.
_ROTATION = "hadamard:128"


def candidates(recipe: Recipe, *, measured: bool = False) -> tuple[Candidate, ...]:
    """Return what a recipe's target and format allow, without `KEEP`.

    Ternary codes are stored as t5 where the format is `auto`: the smallest, at the same speed.

    Args:
        recipe: what was asked for.
        measured: there are moments of the layer's inputs to round by. Then more grids can be fitted, and all
            between ternary, which suits weights as they are, and int8, which needs no help, are rotated.
    """
    smallest = recipe.format == "auto" and recipe.target == "custom" and recipe.layout == "canonical"
    form = "t5" if smallest else recipe.format
    ternary = {"mode": "ternary", "format": form, "levels": 3, "offset": False}
    four = {"mode": "ternary", "format": "i2s", "levels": 4, "planes": 1, "granularity": "block:64"}
    turned = measured and recipe.target == "custom" and recipe.rotation == "none"
    more = {"rotation": _ROTATION} if turned else {}
    found = [Candidate("ternary", ternary | {"planes": 1})]
    found += [Candidate("four levels", four | more | {"offset": recipe.offset and measured})]
    if recipe.target != "ort":
        if measured:
            found += [Candidate("nine levels", ternary | more | {"levels": 9, "planes": 2})]
        found += [Candidate(f"{count} planes", ternary | more | {"planes": count}) for count in (2, 3)]
    for size in (128, 32) if recipe.target == "ort" else (192, 64, 32):
        int4 = {"action": "int4", "granularity": f"block:{size}", "offset": False}
        found += [Candidate(f"int4 {size}", int4 | more)]
    return (*found, Candidate("int8", {"action": "int8", "offset": False}))


def spec_of(
    candidate: Candidate,
    linear: Linear,
    weight: np.ndarray,
    recipe: Recipe,
    *,
    measured: bool = False,
) -> LayerSpec | Keep:
    """Decide the layer as if the recipe had the candidate's rule only."""
    rules = (Rule(**split(candidate.rule)),)
    alone = recipe.without_goals().replace(rules=rules)
    if not measured:
        plain = Rule(**split({**candidate.rule, "rotation": "none", "offset": False}))
        alone = alone.replace(rules=(plain,), rounding="auto", rotation="none", offset=False)
    return decide(linear, weight, alone, measured=measured)


def split(rule: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Rule` for the flat fields of a rule."""
    overrides = {key: value for key, value in rule.items() if key not in ("match", "action")}
    return {key: rule[key] for key in ("match", "action") if key in rule} | {"overrides": overrides}


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate tried on a layer.

    Args:
        candidate: which.
        nbytes: bytes of the tensors that it stores.
        error: noise over signal of the layer's output, by the proxy that was asked for.
    """

    candidate: Candidate
    nbytes: int
    error: float


class Trials:
    """Tries candidates on layers; neighbours that read the same value share what it takes."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._statistics: LayerStatistics | None = None
        self._problems: dict[int, tuple[Rotation | None, Problem]] = {}

    def of(self, linear: Linear, weight: np.ndarray, statistics: LayerStatistics | None) -> list[Trial]:
        """Quantize a layer in every way that it can take, and measure; `KEEP` is the last.

        With second moments codes and scales are fitted to them, as the conversion will do, but for a sample
        of the outputs.

        Args:
            linear: the layer.
            weight: its weight (N, K).
            statistics: what calibration knows of its inputs; None counts all inputs alike.
        """
        open_rounding = self._recipe.rounding in ("auto", *MEASURED_ROUNDINGS)
        measured = open_rounding and statistics is not None and statistics.second_moment is not None
        if self._statistics is not statistics:
            self._statistics, self._problems = statistics, {}
        trials = []
        for candidate in candidates(self._recipe, measured=measured):
            spec = spec_of(candidate, linear, weight, self._recipe, measured=measured)
            if not isinstance(spec, LayerSpec):
                continue
            if spec.measured and spec.integer_bits != 8:
                trials.append(self._fitted(candidate, linear, weight, spec))
                continue
            # eight bits are so exact that the way of rounding does not matter
            spec = replace(spec, rounding="mse", rotation=0) if spec.measured else spec
            quantized = quantize_layer(weight, spec)
            error = output_error(weight, quantized.dequantize, statistics)
            trials.append(Trial(candidate, store(quantized, linear, spec, self._recipe.target).nbytes, error))
        return [*trials, Trial(KEEP, linear.weight.nbytes, 0.0)]

    def _fitted(self, candidate: Candidate, linear: Linear, weight: np.ndarray, spec: LayerSpec) -> Trial:
        """Fit some rows, and count the bytes of all."""
        assert self._statistics is not None
        n, k = weight.shape
        sample = np.ascontiguousarray(weight[:: max(1, n // _FITTED_ROWS)], np.float32)
        second = np.asarray(self._statistics.second_moment)
        signal = float(np.vdot(sample @ second, sample))
        turned, problem = self._problem(linear.name, k, spec)
        rows = turned.rows(sample) if turned else sample
        problem = replace(problem, target=rows)
        quantized = fitted_to(problem, rows, spec, spec.granularity_of(k), turns=1)
        noise = float(problem.errors(quantized.dequantize()).sum())
        whole = _repeated(quantized, n)
        nbytes = store(whole, linear, spec, self._recipe.target).nbytes
        bias = 0 if linear.bias is not None else 4 * n  # which restores the means
        return Trial(candidate, nbytes + bias, max(noise, 0.0) / signal if signal > 0 else 0.0)

    def _problem(self, name: str, k: int, spec: LayerSpec) -> tuple[Rotation | None, Problem]:
        if spec.rotation not in self._problems:
            assert self._statistics is not None
            turned = rotation(k, spec.rotation) if spec.rotation else None
            moments = moments_of(name, self._statistics)
            moments = moments.rotated(turned) if turned else moments
            diagonal = spec.rounding == "weighted"
            found = Problem.of(np.zeros((1, k), np.float32), moments, diagonal=diagonal)
            self._problems[spec.rotation] = turned, found
        return self._problems[spec.rotation]


def _repeated(quantized: Quantized, n: int) -> Quantized:
    """Return a matrix of N rows as large as one quantized alike would be."""
    rows = np.arange(n) % quantized.n
    parts = {
        name: array if array.shape[1] == 1 else array[:, rows]
        for name in ("weight", "scale", "zero_point")
        if (array := getattr(quantized, name)) is not None
    }
    return replace(quantized, n=n, **parts)


def output_error(weight: np.ndarray, decode: Any, statistics: LayerStatistics | None) -> float:
    """Return noise over signal of x W^T: of a sample of outputs with the inputs' second moment, else of W.

    >>> output_error(np.eye(4, dtype=np.float32), lambda rows: 0.5 * np.eye(4, dtype=np.float32)[rows], None)
    0.25
    """
    if statistics is None or statistics.second_moment is None:
        noise = signal = 0.0
        for first in range(0, len(weight), _ROWS):
            rows = slice(first, first + _ROWS)
            exact = weight[rows].astype(np.float32)
            if statistics is not None:
                exact = exact * statistics.channel_absmean
            found = decode(rows) if statistics is None else decode(rows) * statistics.channel_absmean
            noise += float(np.square(found - exact, dtype=np.float64).sum())
            signal += float(np.square(exact, dtype=np.float64).sum())
        return noise / signal if signal else 0.0
    sample = slice(0, None, max(1, len(weight) // _ROWS))
    exact = weight[sample].astype(np.float32)
    difference = decode(slice(None))[sample] - exact
    moment = np.asarray(statistics.second_moment)
    signal = float(np.vdot(exact @ moment, exact))
    return max(float(np.vdot(difference @ moment, difference)), 0.0) / signal if signal > 0 else 0.0
