"""Trains a natively ternary classifier of handwritten digits in seconds and writes it as fp32 ONNX.

    python models/digits.py digits.onnx [--data digits.npz]

A 64-256-256-10 network on scikit-learn's digits. The two hidden layers are BitLinear as in BitNet b1.58:
the forward pass sees weights s * {-1, 0, 1} with s = mean|W| and activations rounded to 8 bits per row; the
backward pass goes straight through both roundings. The head stays float, as it does in BitNet. The ONNX file
holds plain MatMul, Add and Relu; its hidden weights, 97 % of all, are exactly s * {-1, 0, 1}.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZES = (64, 256, 256, 10)
EPOCHS = 40
BATCH = 64
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Split:
    """Images float32 (n, 64) of pixels in [0, 1], and their labels int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Parameters:
    """Weights float32 (K, N) and biases float32 (N,) of the three layers; the hidden ones are ternary."""

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Run the network in float32, as the ONNX file does."""
        x = images
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = np.maximum(x @ weight + bias, 0)
        return x @ self.weights[-1] + self.biases[-1]


def splits() -> tuple[Split, Split]:
    """Return the fixed split: 1297 images to train on, 500 to test on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.data[order] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int64)
    return Split(images[:-500], labels[:-500]), Split(images[-500:], labels[-500:])


def ternary(weight: np.ndarray) -> np.ndarray:
    """Return s * {-1, 0, 1} with s = mean|W|: BitNet's absmean rounding."""
    scale = np.float32(np.abs(weight).mean())
    return scale * np.clip(np.rint(weight / scale), -1, 1)


def _rounded(x: np.ndarray) -> np.ndarray:
    """Return x rounded to 8 bits per row by its largest magnitude."""
    scale = 127 / np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-5)
    return np.rint(x * scale) / scale


def _gradients(weights: list[np.ndarray], biases: list[np.ndarray], batch: Split) -> list[np.ndarray]:
    """Return the gradients of the mean cross entropy, in the order of weights + biases."""
    used = [ternary(weights[0]), ternary(weights[1]), weights[2]]
    inputs, x = [], batch.images
    for index, (weight, bias) in enumerate(zip(used, biases, strict=True)):
        inputs.append(_rounded(x) if index < 2 else x)
        x = inputs[-1] @ weight + bias
        if index < 2:
            x = np.maximum(x, 0)

    probabilities = np.exp(x - x.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    delta = (probabilities - np.eye(10, dtype=np.float32)[batch.labels]) / len(batch.labels)
    weight_gradients, bias_gradients = [], []
    for index in (2, 1, 0):
        weight_gradients.insert(0, inputs[index].T @ delta)
        bias_gradients.insert(0, delta.sum(axis=0))
        if index:
            delta = (delta @ used[index].T) * (inputs[index] > 0)
    return weight_gradients + bias_gradients


def train(data: Split, seed: int = 0) -> Parameters:
    """Train with Adam and a learning rate that falls to zero; deterministic for a seed."""
    rng = np.random.default_rng(seed)
    shapes = list(pairwise(SIZES))
    weights = [rng.normal(0, (2 / k) ** 0.5, (k, n)).astype(np.float32) for k, n in shapes]
    biases = [np.zeros(n, np.float32) for _, n in shapes]
    parameters = weights + biases
    mean = [np.zeros_like(p) for p in parameters]
    square = [np.zeros_like(p) for p in parameters]

    batches = len(data.labels) // BATCH
    steps = EPOCHS * batches
    for step in range(steps):
        if step % batches == 0:
            order = rng.permutation(len(data.labels))
        chosen = order[step % batches * BATCH :][:BATCH]
        gradients = _gradients(weights, biases, Split(data.images[chosen], data.labels[chosen]))
        rate = LEARNING_RATE * (1 - step / steps)
        for p, m, v, g in zip(parameters, mean, square, gradients, strict=True):
            m += 0.1 * (g - m)
            v += 0.01 * (g * g - v)
            p -= rate * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-8)
    return Parameters((ternary(weights[0]), ternary(weights[1]), weights[2]), tuple(biases))


def build(parameters: Parameters) -> onnx.ModelProto:
    """Return the model: pixels float32 (batch, 64) to logits float32 (batch, 10)."""
    nodes, initializers, x = [], [], "pixels"
    for index, (weight, bias) in enumerate(zip(parameters.weights, parameters.biases, strict=True)):
        layer = ("hidden.0", "hidden.1", "head")[index]
        y = f"{layer}.out" if layer != "head" else "logits"
        initializers += [
            numpy_helper.from_array(weight, f"{layer}.weight"),
            numpy_helper.from_array(bias, f"{layer}.bias"),
        ]
        nodes.append(helper.make_node("MatMul", [x, f"{layer}.weight"], [f"{layer}.product"], name=layer))
        nodes.append(helper.make_node("Add", [f"{layer}.product", f"{layer}.bias"], [y], name=f"{layer}.add"))
        if layer != "head":
            nodes.append(helper.make_node("Relu", [y], [f"{layer}.relu"], name=f"{layer}.relu"))
        x = f"{layer}.relu"
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", SIZES[0]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", SIZES[-1]])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=8, producer_name="onnx_bitnet models/digits.py"
    )
    onnx.checker.check_model(model)
    return model


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of rows whose largest logit is the label."""
    return float((logits.argmax(axis=-1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="ONNX file to write")
    parser.add_argument("--data", type=Path, help="npz file to write: the 500 test images")
    arguments = parser.parse_args()
    training, test = splits()
    parameters = train(training)
    onnx.save(build(parameters), arguments.out)
    share = accuracy(parameters.logits(test.images), test.labels)
    print(
        f"{arguments.out}: digits 64-256-256-10, hidden layers ternary, {share:.1%} of the test split right"
    )
    if arguments.data:
        np.savez(arguments.data, pixels=test.images)
        print(f"{arguments.data}: {len(test.images)} test images")


if __name__ == "__main__":
    main()
