"""What the planner may choose for a layer, and what each choice costs in bytes and in weight error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_bitnet.activations import LayerStatistics
from onnx_bitnet.decide import Keep, decide
from onnx_bitnet.quantize import LayerSpec, quantize_layer
from onnx_bitnet.recipe import Recipe, Rule
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.targets import store

# Outputs looked at when errors are weighted with the second moment of the inputs.
_ROWS = 128


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


def candidates(recipe: Recipe) -> tuple[Candidate, ...]:
    """Return what a recipe's target and format allow, without `KEEP`.

    Ternary codes are stored as t5 where the format is `auto`: the smallest, at the same speed.
    """
    smallest = recipe.format == "auto" and recipe.target == "custom" and recipe.layout == "canonical"
    form = "t5" if smallest else recipe.format
    ternary = {"mode": "ternary", "format": form, "levels": 3}
    four = {"mode": "ternary", "format": "i2s", "levels": 4, "planes": 1, "granularity": "block:64"}
    found = [Candidate("ternary", ternary | {"planes": 1}), Candidate("four levels", four)]
    if recipe.target != "ort":
        found += [Candidate(f"{count} planes", ternary | {"planes": count}) for count in (2, 3)]
    found += [
        Candidate(f"int4 {size}", {"action": "int4", "granularity": f"block:{size}"}) for size in (128, 32)
    ]
    return (*found, Candidate("int8", {"action": "int8"}))


def spec_of(
    candidate: Candidate,
    linear: Linear,
    weight: np.ndarray,
    recipe: Recipe,
    statistics: LayerStatistics | None = None,
) -> LayerSpec | Keep:
    """Decide the layer as if the recipe had the candidate's rule only, and no data to round by."""
    rules = (Rule(**split(candidate.rule)),)
    alone = recipe.without_goals().replace(rules=rules, rounding="auto", rotation="none", offset=False)
    return decide(linear, weight, alone, statistics)


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


def try_out(
    linear: Linear,
    weight: np.ndarray,
    recipe: Recipe,
    statistics: LayerStatistics | None,
    choices: Sequence[Candidate],
) -> list[Trial]:
    """Quantize a layer in every way that it can take, and measure; `KEEP` is the last.

    Args:
        linear: the layer.
        weight: its weight (N, K).
        recipe: rounding, target and so on.
        statistics: what calibration knows of its inputs; None counts all inputs alike.
        choices: candidates.
    """
    trials = []
    for candidate in choices:
        spec = spec_of(candidate, linear, weight, recipe)
        if isinstance(spec, LayerSpec):
            quantized = quantize_layer(weight, spec)
            error = output_error(weight, quantized.dequantize, statistics)
            trials.append(Trial(candidate, store(quantized, linear, spec, recipe.target).nbytes, error))
    return [*trials, Trial(KEEP, linear.weight.nbytes, 0.0)]


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
