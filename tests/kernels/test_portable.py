"""The C core works without Python, under sanitizers, and on another machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_portable.py")
STRICT = "-Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Werror"
SANITIZE = "-g -fsanitize=address,undefined -fno-sanitize-recover"


@pytest.mark.parametrize(
    ("compiler", "flags", "runner"),
    [
        pytest.param("gcc", f"{STRICT} {SANITIZE}", "", id="sanitized"),
        pytest.param("aarch64-linux-gnu-gcc", f"{STRICT} -static", "qemu-aarch64", id="aarch64"),
    ],
)
def test_core_without_python(compiler: str, flags: str, runner: str) -> None:
    for tool in filter(None, (compiler, runner)):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    command = [sys.executable, str(SCRIPT), "--cc", compiler, f"--flags={flags}", "--runner", runner]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "41 of 41 layers right" in done.stdout
