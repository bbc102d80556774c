"""Choose the next token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_bitnet.arguments import is_whole
from onnx_bitnet.errors import RecipeError


@dataclass(frozen=True)
class Sampling:
    """How to choose a token by its logits.

    Args:
        temperature: 0 takes the most likely token; 1 draws by the model's own probabilities.
        top_k: draw from so many of the likeliest tokens; 0 from all.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: the same seed gives the same text.

    Raises:
        RecipeError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = self.temperature >= 0 and is_whole(self.top_k, 0) and is_whole(self.seed, 0)
        if not (least and 0 < self.top_p <= 1):
            raise RecipeError(
                f"temperature, top_k and seed must be 0 or more and top_p in (0, 1], not {self}"
            )

    def generator(self) -> np.random.Generator:
        """Return the source of randomness of one text."""
        return np.random.default_rng(self.seed)

    def choose(self, logits: np.ndarray, rng: np.random.Generator) -> int:
        """Return a token by its logits float32 (vocabulary,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")[: self.top_k or None]
        scaled = logits[order].astype(np.float64) / self.temperature
        share = np.exp(scaled - scaled[0])
        share /= share.sum()
        count = int(np.searchsorted(np.cumsum(share), self.top_p)) + 1
        kept = share[:count] / share[:count].sum()
        return int(order[rng.choice(len(kept), p=kept)])
