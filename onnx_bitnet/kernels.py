"""The kernels of this build: which there are, which run here, which one is used."""

from __future__ import annotations

import os
from dataclasses import dataclass

from onnx_bitnet import _native
from onnx_bitnet.errors import RecipeError


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, a row of ext/kernels.inc.

    Args:
        op: what it computes, see ext/kernel.h.
        format: the data it works on.
        isa: the instruction set it is written for, see ext/isa.inc.
        runs_here: this CPU and operating system can run it.
        chosen: it is the one used here, under the present ONNX_BITNET_ISA; never one that computes
            wrong numbers on this machine, about which `kernels` warns.
    """

    op: str
    format: str
    isa: str
    runs_here: bool
    chosen: bool

    def __str__(self) -> str:
        """Return the name of its source file, without the suffix."""
        return f"{self.op}_{self.format}_{self.isa}"


def check_environment() -> None:
    """Raise RecipeError if ONNX_BITNET_ISA does not name an instruction set that runs here."""
    try:
        _native.allowed_isas()
    except ValueError:
        known = ", ".join(name for name, runs_here in _native.isas() if runs_here)
        asked = os.environ.get("ONNX_BITNET_ISA")
        raise RecipeError(
            f"ONNX_BITNET_ISA={asked}: not an instruction set that runs here; use {known}"
        ) from None


def strongest() -> str:
    """Return the strongest instruction set in use here, under the present ONNX_BITNET_ISA.

    Raises:
        RecipeError: as `check_environment`.
    """
    check_environment()
    return str(_native.allowed_isas()[-1])


def kernels() -> list[Kernel]:
    """Return every kernel of this build, in the order of ext/kernels.inc.

    Raises:
        RecipeError: ONNX_BITNET_ISA names an instruction set that does not exist or does not run here.
    """
    check_environment()
    runs_here = dict(_native.isas())
    return [
        Kernel(op, format, isa, runs_here[isa], chosen=_native.find(op, format) == isa)
        for op, format, isa in _native.kernels()
    ]
