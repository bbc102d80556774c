"""Few-bit neural networks in ONNX Runtime on CPUs: convert, run, validate.

>>> import onnx_bitnet as bn
>>> report = bn.convert("model.onnx", "model.bitnet.onnx")          # doctest: +SKIP
>>> session = bn.session("model.bitnet.onnx")                       # doctest: +SKIP
>>> result = bn.validate("model.onnx", "model.bitnet.onnx")         # doctest: +SKIP
"""

from onnx_bitnet.calibration.calibrate import calibrate
from onnx_bitnet.calibration.calibration import Calibration
from onnx_bitnet.errors import BitNetError
from onnx_bitnet.kernels import Kernel, kernels
from onnx_bitnet.planning.planner import convert, plan
from onnx_bitnet.quantization.quantize import quantize
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.recipe import Recipe, Rule
from onnx_bitnet.report import Report
from onnx_bitnet.runtime import library_path, register, session
from onnx_bitnet.validation.validate import validate
from onnx_bitnet.validation.validation import Validation
from onnx_bitnet.weights import Weights, load_weights

__all__ = [
    "BitNetError",
    "Calibration",
    "Kernel",
    "Quantized",
    "Recipe",
    "Report",
    "Rule",
    "Validation",
    "Weights",
    "calibrate",
    "convert",
    "kernels",
    "library_path",
    "load_weights",
    "plan",
    "quantize",
    "register",
    "session",
    "validate",
]
