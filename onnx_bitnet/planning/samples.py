"""The data of a search: all of it, and what part of it is rounded by while the other judges."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_bitnet import cache, files
from onnx_bitnet.data.feeds import Feeds
from onnx_bitnet.data.inputs import Batch
from onnx_bitnet.recipe import Recipe

# One batch, or sample, of so many judges.
_SHARE = 4
# Samples of few batches of which a fourth still tells something.
_LEAST = 32


@dataclass(frozen=True)
class Samples:
    """Rounding fits data that it has seen better than other data, on which goals are measured therefore.

    Args:
        everything: all batches.
        known: those to round by.
        checks: those to measure on.
    """

    everything: Feeds
    known: Feeds
    checks: Feeds

    @property
    def apart(self) -> bool:
        """Whether what is measured on is not rounded by."""
        return self.known is not self.checks

    def key(self, what: str, source: Path, recipe: Recipe) -> str:
        """Return the key (cache.py) of a measurement of a model on this data; "" if nothing is kept."""
        if cache.folder() is None:
            return ""
        model = cache.digest_of_files([source, *sorted(files.read(source).data_files)])
        return cache.key_of({"what": what, "model": model, "data": self._digests, "recipe": recipe.to_dict()})

    @functools.cached_property
    def _digests(self) -> list[str]:
        parts = [self.known, self.checks] if self.apart else [self.known]
        return [cache.digest_of_batches(part) for part in parts]


def apart(feeds: Feeds) -> Samples:
    """Hold every fourth batch apart; with fewer than four, every fourth sample, where batches can be cut."""
    whole = feeds
    if sum(1 for _ in zip(range(_SHARE), feeds.source(), strict=False)) < _SHARE:
        if not _can_be_cut(feeds):
            return together(feeds)
        feeds = _cut(feeds)
    return Samples(
        whole,
        _chosen(feeds, lambda index: index % _SHARE != _SHARE - 2),
        _chosen(feeds, lambda index: index % _SHARE == _SHARE - 2),
    )


def _can_be_cut(feeds: Feeds) -> bool:
    """Whether the first axis of all inputs is one of any size, and there are samples enough."""
    axes = {item.shape[0] if item.shape else 0 for item in feeds.inputs}
    if len(axes) != 1 or not isinstance(axes.pop(), str):
        return False
    sizes = [_samples(batch) for batch in feeds]
    return min(sizes) >= _SHARE and sum(sizes) >= _LEAST


def _samples(batch: Batch) -> int:
    sizes = {array.shape[0] for array in batch.values()}
    return sizes.pop() if len(sizes) == 1 else 0


def _cut(feeds: Feeds) -> Feeds:
    """Return feeds with batches of every fourth sample, from the first, second, third and fourth on."""

    def source() -> Iterator[tuple[str, object]]:
        for label, batch in feeds.source():
            if isinstance(batch, Mapping):
                for start in range(_SHARE):
                    part = {name: np.asarray(array)[start::_SHARE] for name, array in batch.items()}
                    yield f"{label}, every fourth sample from {start} on", part

    return dataclasses.replace(feeds, source=source, count=0)


def together(feeds: Feeds) -> Samples:
    """Round by all batches, and measure on the same."""
    return Samples(feeds, feeds, feeds)


def _chosen(feeds: Feeds, wanted: Callable[[int], bool]) -> Feeds:
    def source() -> Iterator[tuple[str, object]]:
        yield from (item for index, item in enumerate(feeds.source()) if wanted(index))

    return dataclasses.replace(feeds, source=source, count=0)


def first(feeds: Feeds, count: int) -> Feeds:
    """Return feeds that end with the batch in which so many samples are reached."""

    def source() -> Iterator[tuple[str, object]]:
        samples = 0
        for label, batch in feeds.source():
            yield label, batch
            sizes = [np.shape(array) for array in batch.values()] if isinstance(batch, Mapping) else []
            samples += max((shape[0] for shape in sizes if shape), default=1)
            if samples >= count:
                return

    return dataclasses.replace(feeds, source=source)
