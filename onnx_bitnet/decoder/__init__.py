"""Natively ternary language models: write them as ONNX models for text generation, and generate.

>>> from onnx_bitnet.decoder import Generator, build
>>> build("bitnet-b1.58-2B-4T", "bitnet")                                  # doctest: +SKIP
>>> for text in Generator("bitnet").text("Once upon a time"):              # doctest: +SKIP
...     print(text, end="", flush=True)
"""

from onnx_bitnet.decoder.architecture import GEOMETRIES, Architecture, Rope
from onnx_bitnet.decoder.build import Options
from onnx_bitnet.decoder.folder import Built, build
from onnx_bitnet.decoder.generate import Generator, Times
from onnx_bitnet.decoder.sampling import Sampling

__all__ = [
    "GEOMETRIES",
    "Architecture",
    "Built",
    "Generator",
    "Options",
    "Rope",
    "Sampling",
    "Times",
    "build",
]
