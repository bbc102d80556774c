"""Train ternary layers, or turn a trained model's layers ternary, in PyTorch: the extra `[torch]`.

>>> from onnx_bitnet.torch import freeze, to_bitlinear                    # doctest: +SKIP
>>> to_bitlinear(model, "*.dense", granularity="block:128")               # doctest: +SKIP
>>> ...  # train as always, or distill(model, teacher, batches, Settings(steps=1000))
>>> torch.onnx.export(freeze(model), example, "model.onnx")               # doctest: +SKIP

A model of which there is only an ONNX file: `distill_onnx(model, output, data, Settings(steps=1000))`.

What comes out converts without loss, activations included: `onnx-bitnet convert model.onnx`.
"""

from onnx_bitnet.torch.distill import Settings, Step, distill
from onnx_bitnet.torch.exported import Distilled, distill_onnx
from onnx_bitnet.torch.linear import BitLinear, TernaryLinear
from onnx_bitnet.torch.rounding import round_activations, round_weights
from onnx_bitnet.torch.swap import freeze, set_progress, to_bitlinear

__all__ = [
    "BitLinear",
    "Distilled",
    "Settings",
    "Step",
    "TernaryLinear",
    "distill",
    "distill_onnx",
    "freeze",
    "round_activations",
    "round_weights",
    "set_progress",
    "to_bitlinear",
]
