"""How much memory a model takes: measured in a process of its own, which this module also is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from onnx_bitnet import runtime
from onnx_bitnet.data.inputs import Batch

_STATUS = Path("/proc/self/status")


def peak(path: Path, batch: Batch, threads: int) -> int | None:
    """Return the bytes by which opening a model and running it once make a process grow at most.

    Pages of a mapped file count once they are touched. None where the system does not tell or the model
    fails.
    """
    if not _STATUS.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        feeds = Path(folder, "feeds.npz")
        np.savez(feeds, **batch)  # type: ignore[arg-type]
        command = [
            sys.executable,
            "-m",
            "onnx_bitnet.timing.memory",
            str(path.resolve()),
            str(feeds),
            str(threads),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def _status(key: str) -> int:
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _main(path: str, feeds: str, threads: str) -> None:
    batch = dict(np.load(feeds))
    runtime.import_onnxruntime()
    before = _status("VmRSS")
    runtime.session(path, int(threads)).run(None, batch)
    sys.stdout.write(f"{_status('VmHWM') - before}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
