"""What the planner may choose for a layer, and what each choice costs in bytes and in weight error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnx_bitnet.calibration.activations import LayerStatistics
from onnx_bitnet.conversion.decide import Keep, decide
from onnx_bitnet.conversion.moments import moments_of
from onnx_bitnet.conversion.targets import store
from onnx_bitnet.planning.probe import noise_to_signal
from onnx_bitnet.planning.speed import relative_time
from onnx_bitnet.quantization.compensate import Problem
from onnx_bitnet.quantization.quantize import fitted_to, quantize_layer
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.quantization.rotation import ROTATION, Rotation, rotation
from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.recipe import MEASURED_ROUNDINGS, Recipe, Rule
from onnx_bitnet.rewrite.records import Linear

# Outputs looked at when errors are weighted with the second moment of the inputs.
_ROWS = 128
# Outputs to which candidates are fitted.
_FITTED_ROWS = 32
# What shares a scale of int4, by whether only onnxruntime's ops are at hand and whether moments are.
_INT4_SCALES = {
    (False, False): ("block:128", "block:32"),
    (False, True): ("channel", "block:128"),
    (True, False): ("block:128", "block:32"),
    (True, True): ("block:128", "block:32"),
}


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


def candidates(recipe: Recipe, *, measured: bool = False) -> tuple[Candidate, ...]:
    """Return what a recipe's target and format allow, without `KEEP`.

    Ternary codes are stored as t5 where the format is `auto`: the smallest, at the same speed.

    Args:
        recipe: what was asked for.
        measured: there are moments of the layer's inputs to round by. Then more grids can be fitted, fewer
            scales are needed, and all but ternary, which suits weights as they are, are rotated; integers,
            which can best do without, and the op that it takes, are there unrotated as well.
    """
    smallest = recipe.format == "auto" and recipe.target == "custom" and recipe.layout == "canonical"
    form = "t5" if smallest else recipe.format
    ternary = {"mode": "ternary", "format": form, "levels": 3, "offset": False}
    four = {"mode": "ternary", "format": "i2s", "levels": 4, "planes": 1, "granularity": "block:64"}
    turned = measured and recipe.target == "custom" and recipe.rotation == "none"
    more = {"rotation": f"hadamard:{ROTATION}"} if turned else {}
    scale_type = "float16" if recipe.scale_type == "auto" else recipe.scale_type
    found = [Candidate("ternary", ternary | {"planes": 1})]
    found += [Candidate("four levels", four | more | {"offset": recipe.offset and measured})]
    if recipe.target != "ort":
        if measured:
            by_output = {"granularity": "channel", "scale_type": scale_type}
            found += [Candidate("nine levels", ternary | more | by_output | {"levels": 9, "planes": 2})]
        found += [Candidate(f"{count} planes", ternary | more | {"planes": count}) for count in (2, 3)]
    for scales in _INT4_SCALES[recipe.target == "ort", measured]:
        int4 = {"action": "int4", "granularity": scales, "scale_type": scale_type, "offset": False}
        found += _turned_or_not(f"int4 {scales}", int4, more)
    return (*found, *_turned_or_not("int8", {"action": "int8", "offset": False}, more))


def _turned_or_not(name: str, rule: Mapping[str, Any], more: Mapping[str, Any]) -> list[Candidate]:
    if not more:
        return [Candidate(name, rule)]
    return [Candidate(name, {**rule, **more}), Candidate(f"{name} unrotated", rule)]


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
        time: what a product takes, where one in float takes 1.
    """

    candidate: Candidate
    nbytes: int
    error: float
    time: float


class Trials:
    """Tries candidates on layers; neighbours that read the same value share what it takes.

    Args:
        recipe: what was asked for.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._statistics: LayerStatistics | None = None
        self._problems: dict[int, tuple[Rotation | None, Problem]] = {}

    def of(
        self,
        linear: Linear,
        weight: np.ndarray,
        statistics: LayerStatistics | None,
        judge: LayerStatistics | None,
        outputs: int,
    ) -> list[Trial]:
        """Quantize a layer in every way that it can take, and measure; `KEEP` is the last.

        With second moments codes and scales are fitted to them, as the conversion will do, but for a sample
        of the outputs. If the recipe leaves activations open, each candidate is there twice.

        Args:
            linear: the layer.
            weight: its weight (N, K).
            statistics: what is known of the inputs to round by; None counts all inputs alike.
            judge: what is known of those to measure errors on.
            outputs: of all layers that read what this one does.
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
                nbytes, error = self._fitted(linear, weight, spec, judge)
            else:
                # eight bits are so exact that the way of rounding does not matter
                plain = replace(spec, rounding="mse", rotation=0) if spec.measured else spec
                quantized = quantize_layer(weight, plain)
                error = output_error(weight, quantized.dequantize, judge)
                nbytes = store(quantized, linear, spec, self._recipe.target).nbytes
            if spec.measured and linear.bias is None:
                nbytes += 4 * weight.shape[0]  # for the bias that restores the means
            time = relative_time(spec, weight.shape[1], outputs)
            trials += self._with_activations(
                Trial(candidate, nbytes, error, time), weight, spec, judge, outputs
            )
        return [*trials, Trial(KEEP, linear.weight.file_bytes, 0.0, 1.0)]

    def _with_activations(
        self,
        trial: Trial,
        weight: np.ndarray,
        spec: LayerSpec,
        judge: LayerStatistics | None,
        outputs: int,
    ) -> list[Trial]:
        """Add what the activations of the op cost; if they are open, try 8 bits as well."""
        is_open = self._recipe.activation_bits == "auto" and spec.activation_bits == 16
        if not is_open or judge is None or judge.second_moment is None:
            return [trial]
        few = replace(spec, activation_bits=8)
        candidate = Candidate(f"{trial.candidate.name} a8", {**trial.candidate.rule, "activation_bits": 8})
        error = trial.error + _activation_error(weight, judge, rotated=bool(spec.rotation))
        time = relative_time(few, weight.shape[1], outputs)
        return [Trial(candidate, trial.nbytes, error, time), trial]

    def _fitted(
        self, linear: Linear, weight: np.ndarray, spec: LayerSpec, judge: LayerStatistics | None
    ) -> tuple[int, float]:
        """Fit some rows; return the bytes of all, and noise over signal."""
        assert self._statistics is not None
        n, k = weight.shape
        sample = np.ascontiguousarray(weight[:: max(1, n // _FITTED_ROWS)], np.float32)
        turned, problem = self._problem(linear.name, k, spec)
        rows = turned.rows(sample) if turned else sample
        problem = replace(problem, target=rows)
        quantized = fitted_to(problem, rows, spec, spec.granularity_of(k), turns=1)
        off = quantized.dequantize() - rows
        seen = judge if judge is not None else self._statistics
        error = noise_to_signal(turned.back(off) if turned else off, sample, seen)
        nbytes = store(_repeated(quantized, n), linear, spec, self._recipe.target).nbytes
        return nbytes, error

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


def _activation_error(weight: np.ndarray, statistics: LayerStatistics, *, rotated: bool) -> float:
    """Return noise over signal of outputs when the inputs are rounded to 8 bits, row by row.

    A step is a row's peak over 127, and what rounding is off has a twelfth of its square as variance.
    """
    peak = statistics.rotated_row_peak if rotated else statistics.row_peak
    assert peak is not None  # there are second moments
    sample = weight[:: max(1, len(weight) // _ROWS)].astype(np.float32)
    signal = float(np.vdot(sample @ np.asarray(statistics.second_moment), sample)) / statistics.rows
    noise = (peak / 127) ** 2 / 12 * float(np.vdot(sample, sample))
    return noise / signal if signal > 0 else 0.0


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
