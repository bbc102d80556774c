"""Feeds that are run several times: checked before the first run, and kept if they cannot be read again."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_bitnet.arguments import is_whole
from onnx_bitnet.data.feeds import Feeds
from onnx_bitnet.data.inputs import Batch, check_batch
from onnx_bitnet.errors import DataError, one_line

# Bytes of feeds that are kept in memory.
_ROOM = 64 << 20


@dataclass(frozen=True)
class Replay:
    """Batches that are known to fit the model and can be read any number of times.

    Args:
        feeds: where they come from.
        labels: what each batch is called in error messages.
        samples: rows along the first axis of the first input, over all batches.
        held: the first of them, as many as memory has room for.
        folder: where the others are kept, if they cannot be read again.
    """

    feeds: Feeds
    labels: tuple[str, ...]
    samples: int
    held: tuple[Batch, ...]
    folder: Path | None

    @property
    def count(self) -> int:
        """Number of batches."""
        return len(self.labels)

    @property
    def description(self) -> str:
        """A phrase that says where the data comes from."""
        return self.feeds.description

    @property
    def random(self) -> bool:
        """Whether no data was given."""
        return self.feeds.random

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        yield from self.held
        if len(self.held) == self.count:
            return
        if self.folder is None:
            yield from itertools.islice(self.feeds, len(self.held), self.count)
            return
        for index in range(len(self.held), self.count):
            with np.load(self.folder / f"{index}.npz", allow_pickle=False) as archive:
                batch = {name: archive[name] for name in archive.files}
            yield check_batch(batch, self.feeds.inputs, self.labels[index])

    def as_feeds(self) -> Feeds:
        """Return the batches as others take them."""
        return dataclasses.replace(
            self.feeds,
            count=self.count,
            rereadable=True,
            source=lambda: zip(self.labels, self, strict=True),
        )


@contextmanager
def replayed(feeds: Feeds, max_samples: int | None = None) -> Iterator[Replay]:
    """Read all batches once, to check and count them.

    The first are kept in memory; the others of a generator are written to a temporary folder, one at a time.

    Args:
        feeds: the data.
        max_samples: stop after the batch that reaches this number; None for all.

    Raises:
        DataError: a batch does not fit the model, there is none, or the disk is full.
    """
    if max_samples is not None and not is_whole(max_samples, 1):
        raise DataError(f"max_samples is {max_samples!r}; give at least 1, or leave it out for all data")
    with tempfile.TemporaryDirectory() as temporary:
        folder = None if feeds.rereadable else Path(temporary)
        held: list[Batch] = []
        labels: list[str] = []
        samples = size = 0
        for label, batch in feeds.labelled():
            size += sum(array.nbytes for array in batch.values())
            if size <= _ROOM:
                held.append({name: array.copy() for name, array in batch.items()})
            elif folder is not None:
                _keep(batch, folder / f"{len(labels)}.npz")
            labels.append(label)
            samples += _samples(batch, feeds)
            if max_samples is not None and samples >= max_samples:
                break
        yield Replay(feeds, tuple(labels), samples, tuple(held), folder)


def _samples(batch: Batch, feeds: Feeds) -> int:
    if not feeds.inputs:
        return 1
    first = batch[next(item.name for item in feeds.inputs if item.name in batch)]
    return len(first) if first.ndim else 1


def _keep(batch: Batch, path: Path) -> None:
    plain = {name: array.astype(str) if array.dtype.hasobject else array for name, array in batch.items()}
    try:
        np.savez(path, **plain)  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(
            f"{path}: cannot keep the feeds, which are read several times: {one_line(error)}"
        ) from None
