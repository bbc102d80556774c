"""Run a model to one value after another, each time from where the last run ended.

What later values need of a run is kept, in memory or in files, and dropped when nothing needs it any
more. The model may be changed meanwhile, but not before what has been run: as a conversion in order does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_bitnet.conversion.shelf import Shelf
from onnx_bitnet.data.replay import Replay
from onnx_bitnet.graphs import reads
from onnx_bitnet.runner import start_part
from onnx_bitnet.taps import values


class Stages:
    """A model on its way.

    Args:
        model: the model; its inputs are fed.
        path: the file that it came from.
        feeds: the data.
        threads: for onnxruntime, 0 for its own choice.
        folder: an empty one for what is kept and memory has no room for.
    """

    def __init__(self, model: ir.Model, path: Path, feeds: Replay, threads: int, folder: Path) -> None:
        self._model, self._path, self._feeds, self._threads = model, path, feeds, threads
        self._shelf = Shelf(folder)
        self._kept: dict[str, ir.DataType] = {}

    def run(self, name: str, later: Sequence[str]) -> Iterator[Any]:
        """Yield a value for each batch; to be read to the end.

        Args:
            name: the value.
            later: names of those that will be asked for, in any order.
        """
        known = values(self._model)
        kept = {key: kind for key, kind in self._kept.items() if key in known}
        fed = [value for value in self._model.graph.inputs if not value.is_initializer()]
        starts = {*(known[key] for key in kept), *fed}
        cuts = _needs([known[name]], starts) & self._moving(starts)
        ends = [known[key] for key in later if key in known]
        while True:
            needed = [str(value.name) for value in _boundary(ends, starts, cuts)]
            keep = [key for key in needed if all(key != value.name for value in fed)]
            wanted = [key for key in dict.fromkeys([name, *keep]) if known[key] not in starts]
            runner = start_part(self._model, self._path, wanted, self._threads, kept)
            types = kept | (runner.types() if runner is not None else {})
            no_tensors = {known[key] for key in wanted if key not in types} - {known[name]}
            if not no_tensors:
                break
            cuts -= no_tensors
        for index, batch in enumerate(self._feeds):
            have = batch | (self._shelf.take(index) if self._kept else {})
            if runner is not None:
                fits = {key: have[key] for key in runner.inputs() if key in have}
                have |= runner.run(wanted, fits, self._feeds.labels[index])
            if keep:
                self._shelf.put(index, {key: have[key] for key in keep})
            yield have[name]
        self._kept = {key: types[key] for key in keep}

    def _moving(self, starts: set[ir.Value]) -> set[ir.Value]:
        """Return the values that depend on the data; the others are constants, which nobody need keep."""
        moving = set(starts)
        for node in self._model.graph:
            if any(value in moving for value in reads(node)):
                moving.update(node.outputs)
        return moving


def _needs(targets: Sequence[ir.Value], starts: set[ir.Value]) -> set[ir.Value]:
    """Return what is computed on the way from some values to the targets, these included."""
    found: set[ir.Value] = set()
    stack = list(targets)
    while stack:
        value = stack.pop()
        if value in found or value in starts:
            continue
        found.add(value)
        node = value.producer()
        if node is not None:
            stack.extend(reads(node))
    return found


def _boundary(targets: Sequence[ir.Value], starts: set[ir.Value], cuts: set[ir.Value]) -> list[ir.Value]:
    """Return the values, of those to start from or to cut at, from which all targets can be computed."""
    found, seen = [], set()
    stack = list(targets)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in starts or value in cuts:
            found.append(value)
        elif (node := value.producer()) is not None:
            stack.extend(reads(node))
    return found
