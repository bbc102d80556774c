"""Measurements kept from one call to the next: small files, each named after all that its content depends on.

A key is a hash of contents, never of paths or times: of what the caller says (model, data, recipe), of this
package's own code, and of the machine and libraries that compute. So nothing is found but what would be
measured again. The folder may be deleted at any time; ONNX_BITNET_CACHE names another one, or is `off`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from onnx_bitnet import _native
from onnx_bitnet.machine import cpu_kinds, cpus

OFF = "off"
# Bytes that the folder may take; beyond, what was not used for longest goes.
LIMIT = 64 << 20


def folder() -> Path | None:
    """Return where measurements are kept; None if they are not."""
    chosen = os.environ.get("ONNX_BITNET_CACHE")
    if chosen:
        return None if chosen == OFF else Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return Path(base or Path.home() / ".cache", "onnx_bitnet")
    except RuntimeError:  # there is no home
        return None


def key_of(parts: Mapping[str, Any]) -> str:
    """Return the key of a measurement.

    Args:
        parts: JSON-able; all that it depends on but for code, machine and libraries, which are added.
    """
    computer = {
        "code": _code(),
        "libraries": [version(name) for name in ("numpy", "onnxruntime", "onnx-ir", "onnx")],
        "machine": [platform.system(), platform.machine(), cpu_kinds(), _native.allowed_isas()],
        "threads": [cpus(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("OPENBLAS_NUM_THREADS")],
    }
    return _hash(json.dumps([computer, parts], sort_keys=True).encode())


def recall(key: str) -> Any | None:
    """Return what was kept under a key; None if there is nothing, or it is damaged."""
    place = folder()
    if place is None:
        return None
    file = place / f"{key}.json"
    try:
        digest, _, text = file.read_bytes().partition(b"\n")
        if digest.decode("ascii", "replace") != _hash(text):
            return None
        os.utime(file)  # used just now
    except OSError:
        return None
    return json.loads(text)


def keep(key: str, value: Any) -> None:
    """Keep a JSON-able value, whole or not at all; where it cannot be written, it is not kept."""
    place = folder()
    if place is None:
        return
    text = json.dumps(value).encode()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".") as own:
            part = Path(own, "part")
            part.write_bytes(_hash(text).encode() + b"\n" + text)
            part.replace(place / f"{key}.json")
        _trim(place)
    except OSError:
        return


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return a hash of the contents of some files, in their order."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return _hash(" ".join(digests).encode())


def digest_of_batches(batches: Iterable[Mapping[str, np.ndarray]]) -> str:
    """Return a hash of the names, types, shapes and values of all arrays, in their order."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(f"batch of {len(batch)}\n".encode())
        for name, array in sorted(batch.items()):
            values = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
            found.update(f"{name!r} {array.dtype.str} {array.shape} {len(values)}\n".encode() + values)
    return found.hexdigest()


def _trim(place: Path) -> None:
    """Delete what was not used for longest, until the rest is within the limit; others may do the same."""
    known = []
    for file in place.glob("*.json"):
        try:
            state = file.stat()
        except FileNotFoundError:
            continue
        known.append((state.st_mtime_ns, state.st_size, file))
    total = sum(size for _, size, _ in known)
    for _, size, file in sorted(known):
        if total <= LIMIT:
            return
        file.unlink(missing_ok=True)
        total -= size


@functools.cache
def _code() -> str:
    """Return a hash of this package as it is installed."""
    root = Path(__file__).parent
    files = sorted(
        path for path in root.rglob("*") if path.suffix in (".py", ".so", ".pyd", ".dll", ".dylib")
    )
    return _hash(
        " ".join([*(str(path.relative_to(root)) for path in files), digest_of_files(files)]).encode()
    )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
