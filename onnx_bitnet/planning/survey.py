"""What a search knows before it looks at goals: layers to decide, costs of candidates, weights.

It is measured once for a model, its data and a recipe, and kept (cache.py): goals come and go.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnx_bitnet import cache, files
from onnx_bitnet.calibration.activations import LayerStatistics
from onnx_bitnet.calibration.calibrate import calibrate
from onnx_bitnet.calibration.calibration import Calibration
from onnx_bitnet.conversion.decide import Keep, check_rules, decide, keep_unseen, rule_for
from onnx_bitnet.errors import EvaluationError
from onnx_bitnet.planning.candidates import Candidate, Trial, Trials
from onnx_bitnet.planning.frontier import Option
from onnx_bitnet.planning.goals import ALL_LOST, Goals
from onnx_bitnet.planning.probe import Probe, noise_to_signal
from onnx_bitnet.planning.samples import Samples, first
from onnx_bitnet.planning.simulation import Simulation, Weights
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.report import Progress, Reason
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.rewrite.scan import prepare, scan
from onnx_bitnet.validation.metrics import Metrics

# Samples that the model is run on to weigh the layers; a goal itself is measured on all that judge.
_SAMPLES = 32


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share a weight, and what can be done with it.

    Args:
        linear: the first of them.
        names: all of them.
        trials: every candidate tried, `KEEP` last.
        probed: the error of the layer in four bits, if it was weighed.
        harm: how far that takes the outputs away, by name.
        gain: loss of the outputs for each unit of error of the layer; infinite if few bits in it make values
            infinite or NaN, so that it had better stay float.
    """

    linear: Linear
    names: tuple[str, ...]
    trials: tuple[Trial, ...] = ()
    probed: float = 0.0
    harm: dict[str, Metrics] = dataclasses.field(default_factory=dict)
    gain: float = 1.0

    @property
    def products(self) -> int:
        """What the layers do with one row."""
        return len(self.names) * self.linear.weight.n * self.linear.weight.k

    def options(self) -> list[Option]:
        """Return the trials as the solver wants them: nothing but float loses nothing, as the last resort."""
        *others, _ = self.trials
        losses = [max(self._loss(trial.error), sys.float_info.min) for trial in others] + [0.0]
        return [
            Option(trial.candidate.name, trial.nbytes, loss, trial.time * self.products)
            for trial, loss in zip(self.trials, losses, strict=True)
        ]

    def _loss(self, error: float) -> float:
        return self.gain * error if math.isfinite(self.gain) else ALL_LOST

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured, JSON-able."""
        return {
            "names": self.names,
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
            "probed": self.probed,
            "harm": {name: dataclasses.asdict(metrics) for name, metrics in self.harm.items()},
        }

    def measured(self, kept: dict[str, Any]) -> Group:
        """Return the group with what `to_dict` returned."""
        trials = (trial | {"candidate": Candidate(**trial["candidate"])} for trial in kept["trials"])
        return dataclasses.replace(
            self,
            trials=tuple(Trial(**trial) for trial in trials),
            probed=kept["probed"],
            harm={name: Metrics(**metrics) for name, metrics in kept["harm"].items()},
        )


def survey(
    source: Path,
    recipe: Recipe,
    method: str,
    calibration: Calibration | None,
    samples: Samples | None,
    progress: Progress | None,
) -> list[Group]:
    """Return the layers that are the planner's to decide, tried and weighed.

    Args:
        source: the model.
        recipe: its goals are not looked at.
        method: see planner.settle.
        calibration: what is known of the layers' inputs, if there are no samples.
        samples: the data.
        progress: as in `convert`.

    Raises:
        DataError: the calibration is that of another model.
    """
    groups = open_to_choice(source, recipe)
    if calibration is not None:
        calibration.check([group.names[0] for group in groups if not group.linear.where])
    if samples is None or not groups:
        return _tried(groups, recipe, calibration, calibration, progress)
    what = "layers by their weights" if method == "weights" else "layers weighed"
    if method == "outputs":
        what = "layers by their outputs"
    key = samples.key(what, source, recipe.without_goals())
    kept = cache.recall(key)
    if kept is not None:
        return [group.measured(item) for group, item in zip(groups, kept, strict=True)]
    found = _measured(groups, source, recipe, method, samples, progress)
    cache.keep(key, [group.to_dict() for group in found])
    return found


def open_to_choice(source: Path, recipe: Recipe) -> list[Group]:
    """Return the layers that neither a rule nor exactly ternary weights decide."""
    model = files.read(source).model
    prepare(model)
    found = scan(model)
    check_rules(recipe, found)
    linears = [item for item in found if isinstance(item, Linear)]
    groups: dict[Hashable, Group] = {}
    for index, linear in enumerate(linears):
        if keep_unseen(index, linears, recipe) is not None or rule_for(linear, recipe) is not None:
            continue
        same = groups.get(linear.weight.key)
        if same is not None:
            groups[linear.weight.key] = dataclasses.replace(same, names=(*same.names, linear.name))
        elif _ordinary(linear, recipe):
            groups[linear.weight.key] = Group(linear, (linear.name,))
    return list(groups.values())


def _ordinary(linear: Linear, recipe: Recipe) -> bool:
    """Whether mode `auto` alone leaves a layer float because it is not ternary."""
    try:
        weight = linear.weight.array()
    except EvaluationError:
        return False
    decision = decide(linear, weight, recipe)
    return isinstance(decision, Keep) and decision.reason is Reason.NOT_TERNARY


def _measured(
    groups: Sequence[Group],
    source: Path,
    recipe: Recipe,
    method: str,
    samples: Samples,
    progress: Progress | None,
) -> list[Group]:
    if method == "weights":
        return _tried(groups, recipe, None, None, progress)
    known = calibrate(source, samples.known, mask=recipe.mask)
    judge = calibrate(source, samples.checks, mask=recipe.mask) if samples.apart else known
    tried = _tried(groups, recipe, known, judge, progress)
    return tried if method == "outputs" else _weighed(tried, source, recipe, samples, known, judge, progress)


def _tried(
    groups: Sequence[Group],
    recipe: Recipe,
    known: Calibration | None,
    judge: Calibration | None,
    progress: Progress | None,
) -> list[Group]:
    """Try all candidates on all layers."""
    trials, found = Trials(recipe), []
    outputs: Counter[str | None] = Counter()
    for group in groups:
        outputs[group.linear.x.name] += group.linear.weight.n
    for index, group in enumerate(groups):
        if progress is not None:
            progress(index, len(groups), f"trying {group.names[0]}")
        statistics = _of(known, group)
        judges = _of(judge, group) or statistics
        readers = outputs[group.linear.x.name]
        tried = trials.of(group.linear, group.linear.weight.array(), statistics, judges, readers)
        found.append(dataclasses.replace(group, trials=tuple(tried)))
    return found


def _of(calibration: Calibration | None, group: Group) -> LayerStatistics | None:
    """Return what is known of a group's inputs; nothing if it is not of all, as they are rounded alike."""
    if calibration is None:
        return None
    found = [calibration.of(name, group.linear.weight.k) for name in group.names]
    return found[0] if all(item is not None for item in found) else None


def _weighed(
    groups: Sequence[Group],
    source: Path,
    recipe: Recipe,
    samples: Samples,
    known: Calibration,
    judge: Calibration,
    progress: Progress | None,
) -> list[Group]:
    """Measure what an error in each layer alone does to the outputs, on some samples.

    The error is that of four bits (probe.py), on data that it was not rounded by if there is enough.
    """
    simulation = Simulation(source, {name for group in groups for name in group.names})
    probes: dict[int, Probe] = {}
    errors: dict[int, float] = {}

    def rounded(place: int) -> Weights:
        group = groups[place]
        array, statistics = group.linear.weight.array(), known.layers[group.names[0]]
        if place not in probes:
            probes[place] = Probe.of(group.linear.name, array, statistics)
        decoded = probes[place].decoded(array)
        if place not in errors:
            errors[place] = noise_to_signal(decoded - array, array, _of(judge, group) or statistics)
        return dict.fromkeys(group.names, np.ascontiguousarray(decoded.T))

    inside = [
        place
        for place, group in enumerate(groups)
        if simulation.layers.issuperset(group.names) and group.names[0] in known.layers
    ]
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, 0, f"weighing {groups[inside[(done - 1) % len(inside)]].names[0]}")

    variants = [partial(rounded, place) for place in inside]
    harms = simulation.measure(first(samples.checks, _SAMPLES), variants, tick, recipe.mask)
    found = list(groups)
    for place, harm in zip(inside, harms, strict=True):
        found[place] = dataclasses.replace(found[place], probed=errors[place], harm=harm)
    return found


def with_gains(groups: Sequence[Group], goals: Goals) -> list[Group]:
    """Return the groups with gains, if they were weighed.

    Later layers make good part of what one lost, the more the more it was: a gain is the geometric mean of
    the layer's own and the typical one, which those that cannot be reached get.
    """
    gains = {
        place: math.inf if _breaks(group.harm) else goals.loss(group.harm) / group.probed
        for place, group in enumerate(groups)
        if group.probed > 0
    }
    if not any(group.harm for group in groups):
        return list(groups)
    typical = float(np.median([gain for gain in gains.values() if math.isfinite(gain)] or [1.0]))
    return [
        dataclasses.replace(group, gain=math.sqrt(gains.get(place, typical) * typical))
        for place, group in enumerate(groups)
    ]


def _breaks(outputs: Mapping[str, Metrics]) -> bool:
    """Return whether some values are not finite that should be, or the other way round."""
    return any(metrics.nonfinite_differ for metrics in outputs.values())
