"""Bench: time models side by side on the same feeds, and say where a packed one spends its time."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_bitnet import files, runtime
from onnx_bitnet.arguments import check_threads
from onnx_bitnet.data.feeds import open_feeds
from onnx_bitnet.data.inputs import Batch, check_batch, model_inputs
from onnx_bitnet.errors import ModelError, RecipeError, RuntimeMissing
from onnx_bitnet.machine import cpu_name
from onnx_bitnet.report import Progress
from onnx_bitnet.timing import memory, peers, profile
from onnx_bitnet.timing.profile import PackedTime

SCHEMA = "onnx_bitnet.bench/1"
TURN = 0.02
"""Seconds that one contender runs in one round."""

_LEAST_ROUNDS = 3
_READ_BYTES = 1 << 28


@dataclass(frozen=True)
class Times:
    """Seconds of one run: the shortest and the median, of how many."""

    least: float
    median: float
    runs: int


@dataclass(frozen=True)
class ModelTimes:
    """How fast a model is.

    Args:
        name: the file, or which variant of the first one.
        nbytes: its size with external data.
        min_ms: the shortest run.
        median_ms: the median over the runs.
        runs: how many there were.
        rows_per_second: by the median; rows are the first axis of the first input.
        memory_bytes: peak of opening and running it, in a process of its own; None where that is not known.
        packed_share: part of a run that packed ops take, by onnxruntime's profiler; None if there are none.
        packed: these ops, in the order in which they run.
    """

    name: str
    nbytes: int
    min_ms: float
    median_ms: float
    runs: int
    rows_per_second: float
    memory_bytes: int | None
    packed_share: float | None = None
    packed: tuple[PackedTime, ...] = ()

    @property
    def packed_gbps(self) -> float | None:
        """GB of packed weights per second in the packed ops together; None if there are none."""
        microseconds = max(1, sum(op.microseconds for op in self.packed))
        return sum(op.weight_bytes for op in self.packed) / microseconds / 1e3 if self.packed else None


@dataclass(frozen=True)
class Bench:
    """Models timed side by side.

    Args:
        cpu: name of the CPU.
        cpus: how many it has.
        threads: given to onnxruntime.
        onnxruntime: its version.
        data: where the feeds came from.
        rows: first axis of the first input.
        read_gbps: measured read bandwidth of these threads, if a model has packed ops.
        models: in the order given, then the peers.
        notes: sentences the user should read.
    """

    cpu: str
    cpus: int
    threads: int
    onnxruntime: str
    data: str
    rows: int
    read_gbps: float | None
    models: tuple[ModelTimes, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as one JSON-able document."""
        document = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for entry, model in zip(document["models"], self.models, strict=True):
            entry["packed_gbps"] = model.packed_gbps
        return document


def bench(
    paths: Sequence[str | Path],
    data: object = None,
    *,
    threads: int = 0,
    seconds: float = 2.0,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    with_peers: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """Time models in turns on the first batch of the data.

    Args:
        paths: the models, all with the same inputs; usually a float one and its conversions.
        data: see `onnx_bitnet.data.feeds.open_feeds`; None for random feeds.
        threads: for onnxruntime, 0 for its own choice.
        seconds: how long each model runs.
        seed: of random feeds.
        dims: sizes of symbolic dimensions in random feeds, by name.
        with_peers: also quantize the first model with onnxruntime's own tools, int8 and 2 bits.
        progress: called as progress(done, total, what).

    Raises:
        ModelError: a model cannot be read or run.
        DataError: the data cannot be read or does not fit a model.
        RuntimeMissing: onnxruntime or the custom-op library cannot be used.
        RecipeError: seconds, threads or the seed make no sense.
    """
    check_threads(threads)
    if not 0 < seconds < math.inf:
        raise RecipeError(f"seconds = {seconds}: give a positive time")
    ort = runtime.import_onnxruntime()
    opened = [files.read(path) for path in paths]
    feeds = open_feeds(opened[0].model, data, seed=seed, dims=dims)
    batch = next(iter(feeds))
    for file in opened[1:]:
        check_batch(batch, model_inputs(file.model), f"{file.path}: {feeds.description}")
    contenders = [(str(path), Path(path)) for path in paths]
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(peers.PEERS if with_peers else ()):
            target = Path(folder, f"{index}", "model.onnx")
            target.parent.mkdir()
            try:
                peers.write(name, Path(paths[0]), target)
                contenders.append((name, target))
            except RuntimeMissing as error:
                notes.append(str(error))
        models = _race(contenders, batch, threads, seconds, progress or _silent)
    return Bench(
        cpu=cpu_name(),
        cpus=os.cpu_count() or 1,
        threads=threads,
        onnxruntime=ort.__version__,
        data=feeds.description,
        rows=_rows(batch),
        read_gbps=read_gbps(threads or os.cpu_count() or 1)
        if any(model.packed for model in models)
        else None,
        models=tuple(models),
        notes=tuple(notes),
    )


def in_turns(
    works: Sequence[Callable[[], object]],
    rounds: int,
    turn: float = TURN,
    progress: Progress | None = None,
) -> list[Times]:
    """Time contenders side by side: in every round each runs once to warm up, then for a turn.

    What else the machine does meets all of them alike.
    """
    samples: list[list[float]] = [[] for _ in works]
    for number in range(rounds):
        if progress:
            progress(number, rounds, "round")
        for work, taken in zip(works, samples, strict=True):
            work()
            end = time.perf_counter() + turn
            while True:
                start = time.perf_counter()
                work()
                now = time.perf_counter()
                taken.append(now - start)
                if now >= end:
                    break
    return [Times(min(taken), float(np.median(taken)), len(taken)) for taken in samples]


def read_gbps(threads: int, rounds: int = 5) -> float:
    """Measure how fast this many threads read memory: the largest of many int32, in GB/s."""
    parts = np.array_split(np.ones(_READ_BYTES // 4, np.int32), threads)

    def seconds(pool: ThreadPoolExecutor) -> float:
        start = time.perf_counter()
        list(pool.map(np.max, parts))
        return time.perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        return _READ_BYTES / min(seconds(pool) for _ in range(rounds)) / 1e9


def _race(
    contenders: Sequence[tuple[str, Path]], batch: Batch, threads: int, seconds: float, progress: Progress
) -> list[ModelTimes]:
    runs = [_runner(name, path, batch, threads) for name, path in contenders]
    rounds = max(_LEAST_ROUNDS, round(seconds / TURN))
    times = in_turns(runs, rounds, progress=progress)
    models = []
    for (name, path), took in zip(contenders, times, strict=True):
        share, packed = profile.packed_times(path, batch, threads)
        models.append(
            ModelTimes(
                name=name,
                nbytes=files.read(path).nbytes,
                min_ms=1e3 * took.least,
                median_ms=1e3 * took.median,
                runs=took.runs,
                rows_per_second=_rows(batch) / took.median,
                memory_bytes=memory.peak(path, batch, threads),
                packed_share=share,
                packed=packed,
            )
        )
    return models


def _runner(name: str, path: Path, batch: Batch, threads: int) -> Callable[[], object]:
    """Open a model whose threads stop spinning after each run, and run it once."""
    options = runtime.quiet_options()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.session(path, threads, options)
    try:
        session.run(None, batch)
    except Exception as error:  # onnxruntime's exceptions have no other base
        message = runtime.ort_message(error)
        raise ModelError(
            f"{name}: onnxruntime fails on the feeds: {message}; give data that suits it"
        ) from None
    return lambda: session.run(None, batch)


def _rows(batch: Batch) -> int:
    first = next(iter(batch.values()), None)
    return first.shape[0] if first is not None and first.ndim else 1


def _silent(done: int, total: int, what: str) -> None:
    pass
