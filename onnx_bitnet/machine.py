"""The machine that this runs on: how many CPUs there are, and which."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

# What tells one kind of core from another, on x86 and on Arm.
_KIND = ("model name", "cpu family", "model", "CPU implementer", "CPU part")


def cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return what the CPU calls itself."""
    names = (value for key, value in _cpu_facts() if key == "model name")
    return next(names, "") or platform.processor() or platform.machine()


def cpu_kinds() -> str:
    """Return what tells the kinds of cores from those of other CPUs, by which BLAS chooses its kernels."""
    facts = (f"{key}: {value}" for key, value in _cpu_facts() if key in _KIND)
    return " ".join(facts) or platform.processor()


@functools.cache
def _cpu_facts() -> tuple[tuple[str, str], ...]:
    """Return what Linux says of the cores, each fact once; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    parts = (line.partition(":") for line in lines)
    return tuple(dict.fromkeys((key.strip(), value.strip()) for key, _, value in parts))
