"""What the benchmarks share: repeated timing, sessions that do not disturb each other, tables."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

import onnx_bitnet as bn
from onnx_bitnet.timing.bench import Times


def best_of(work: Callable[[], object], seconds: float, least: int = 5) -> Times:
    """Run something small again and again for some time."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start)
    return Times(min(samples), float(np.median(samples)), len(samples))


def open_session(path: Path, threads: int, config: dict[str, str] | None = None) -> ort.InferenceSession:
    """Open a model whose thread pool stops spinning after each run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in {"session.force_spinning_stop": "1", **(config or {})}.items():
        options.add_session_config_entry(key, value)
    bn.register(options)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def print_table_head(*cells: str) -> None:
    print_row(*cells)
    print_row(*["---"] * len(cells))
