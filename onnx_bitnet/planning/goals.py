"""Goals of a recipe: how far outputs are from them, and whether a conversion reaches them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnx_bitnet.errors import RecipeError
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.validation.metrics import Metrics
from onnx_bitnet.validation.validate import Metric
from onnx_bitnet.validation.validation import OutputMetrics, Task, failures

ALL_LOST = 1.0
"""The loss of outputs that have nothing to do with what they should be."""


@dataclass(frozen=True)
class Goals:
    """What the outputs of a conversion must reach.

    Args:
        min_cosine: as in Recipe.
        min_sqnr: as in Recipe.
        min_metric: as in Recipe.
        metric: the user's own, see `bn.validate`.
    """

    min_cosine: float | None
    min_sqnr: float | None
    min_metric: float | None
    metric: Metric | None

    @classmethod
    def of(cls, recipe: Recipe, metric: Metric | None) -> Goals:
        """Take the goals of a recipe.

        Raises:
            RecipeError: there is a metric and no value that it must reach, or the other way round.
        """
        if (recipe.min_metric is None) != (metric is None):
            raise RecipeError("min_metric and metric go together: the value to reach, and what computes it")
        return cls(recipe.min_cosine, recipe.min_sqnr, recipe.min_metric, metric)

    @property
    def any(self) -> bool:
        """Whether the outputs matter."""
        return not (self.min_cosine is None and self.min_sqnr is None and self.min_metric is None)

    @property
    def allowed(self) -> float | None:
        """The largest loss that reaches them; None if no loss says so."""
        if self.min_cosine is not None:
            return 1 - self.min_cosine
        return None if self.min_sqnr is None else float(10 ** (-self.min_sqnr / 10))

    def loss(self, outputs: Mapping[str, Metrics]) -> float:
        """Return how bad the worst float output is: 1 - cosine, or noise over signal for `min_sqnr` alone.

        One that is not finite has ALL_LOST.
        """
        graded = [metrics for metrics in outputs.values() if metrics.agreement is None]
        if self.min_sqnr is not None and self.min_cosine is None:
            return max((10 ** (-_number(metrics.sqnr_db) / 10) for metrics in graded), default=0.0)
        return max((1 - _number(metrics.cosine) for metrics in graded), default=0.0)

    def missed(self, outputs: Mapping[str, Metrics], task: Task | None) -> tuple[str, ...]:
        """Return a sentence for each goal that is missed."""
        graded = [OutputMetrics(name, metrics) for name, metrics in outputs.items()]
        return failures(graded, task, self.min_sqnr, self.min_cosine, self.min_metric)


def _number(value: float | None) -> float:
    return 0.0 if value is None or math.isnan(value) else value
