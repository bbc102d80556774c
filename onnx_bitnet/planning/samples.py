"""The data of a search: all of it, and which batches are rounded by while the others judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from onnx_bitnet.data.feeds import Feeds

# One batch of so many judges.
_SHARE = 4


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


def apart(feeds: Feeds) -> Samples:
    """Hold every fourth batch apart, or none if there are fewer than four."""
    if sum(1 for _ in zip(range(_SHARE), feeds.source(), strict=False)) < _SHARE:
        return together(feeds)
    return Samples(
        feeds,
        _chosen(feeds, lambda index: index % _SHARE != _SHARE - 2),
        _chosen(feeds, lambda index: index % _SHARE == _SHARE - 2),
    )


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
