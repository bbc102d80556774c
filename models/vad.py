"""Copies silero's voice activity detection models out of their PyPI wheel.

    python models/vad.py vad.onnx [--variant silero_vad_op18_ifless.onnx] [--data frame.npz]

Both variants keep everything in the two branches of an `If` on the sampling rate: 1-D convolutions, of which
the last is pointwise, and an LSTM, which the variant `silero_vad_op18_ifless.onnx` spells as two Gemms. The
data are one frame of noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import installed
import numpy as np

WHEEL = "silero-vad"
VARIANTS = ("silero_vad.onnx", "silero_vad_op18_ifless.onnx")
SAMPLES = {8000: 288, 16000: 576}  # of one frame: 32 ms, and what came before it


def path(variant: str = VARIANTS[0]) -> Path | None:
    """Return the model in the installed wheel, or None."""
    return installed.find(WHEEL, f"silero_vad/data/{variant}")


def frame(rate: int = 16000, batch: int = 1) -> dict[str, np.ndarray]:
    """Return feeds of `batch` frames of noise with a fresh state."""
    noise = np.random.default_rng(0).normal(0, 0.1, (batch, SAMPLES[rate]))
    return {
        "input": noise.astype(np.float32),
        "state": np.zeros((2, batch, 128), np.float32),
        "sr": np.array(rate, np.int64),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="ONNX file to write")
    parser.add_argument("--variant", choices=VARIANTS, default=VARIANTS[0])
    parser.add_argument("--data", type=Path, help="npz file to write: one frame of noise")
    arguments = parser.parse_args()
    installed.copy(WHEEL, f"silero_vad/data/{arguments.variant}", arguments.out)
    print(f"{arguments.out}: {arguments.variant}, {arguments.out.stat().st_size / 1e6:.1f} MB")
    if arguments.data:
        np.savez(arguments.data, **frame())


if __name__ == "__main__":
    main()
