"""Read the weights of natively few-bit models from the files they are published in."""

from onnx_bitnet.weights.load import load_weights
from onnx_bitnet.weights.mapping import Lazy, Weights

__all__ = ["Lazy", "Weights", "load_weights"]
