"""Try weights in a model without converting it: one session that is fed with the weights of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_bitnet import files
from onnx_bitnet.data.feeds import Feeds
from onnx_bitnet.data.inputs import Batch
from onnx_bitnet.data.padding import USUAL, compared, tokens
from onnx_bitnet.rewrite.cleanup import cleanup
from onnx_bitnet.rewrite.plain import Plain, plain_nodes, replace_plain
from onnx_bitnet.rewrite.records import Linear, operand
from onnx_bitnet.rewrite.replace import Shared
from onnx_bitnet.rewrite.scan import prepare, scan
from onnx_bitnet.runner import start
from onnx_bitnet.validation.metrics import Accumulator, Metrics

Weights = Mapping[str, np.ndarray]


class Simulation:
    """A float model whose weights are inputs.

    Layers inside of subgraphs and functions keep their weights: `layers` names those that can be changed.

    Args:
        source: the float model.
        names: the layers of interest.
        threads: for onnxruntime, 0 for its own choice.
    """

    def __init__(self, source: str | Path, names: set[str], threads: int = 0) -> None:
        file = files.read(source)
        model = file.model
        self._outputs = [str(v.name) for v in model.graph.outputs if isinstance(v.type, ir.TensorType)]
        prepare(model)
        shared = Shared.of(model)
        weights: dict[str, np.ndarray] = {}
        done: dict[object, Plain] = {}
        for linear in scan(model):
            if isinstance(linear, Linear) and linear.name in names and linear.node.graph is model.graph:
                array = linear.weight.array()
                plain = done.setdefault(linear.weight.key, Plain(np.ascontiguousarray(array.T, np.float32)))
                weights[linear.name] = plain.weight
                replace_plain(model, linear, plain, activation_bits=32, shared=shared)
        cleanup(model)
        self._inputs = _feed(model, set(weights))
        self._exact = {self._inputs[name]: weight for name, weight in weights.items()}
        self._runner = start(model, file.path, threads)

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers whose weights can be changed."""
        return frozenset(self._inputs)

    def run(self, batch: Batch, label: str, changed: Weights | None = None) -> Batch:
        """Return the outputs for one batch, with other weights (K, N) for some layers."""
        given = {self._inputs[name]: weight for name, weight in (changed or {}).items()}
        return self._runner.run(self._outputs, batch | self._exact | given, label)

    def measure(
        self,
        feeds: Feeds,
        variants: Sequence[Callable[[], Weights]],
        tick: Callable[[], None] | None = None,
        mask: str = USUAL,
    ) -> list[dict[str, Metrics]]:
        """Return how far the outputs are apart, by name, for each set of weights.

        Args:
            feeds: every batch is run with the exact weights and with each variant.
            variants: called for the weights (K, N) of the layers that differ, by layer.
            tick: called after each run.
            mask: as in `validate`.
        """
        sums = [{name: Accumulator() for name in self._outputs} for _ in variants]
        for label, batch in feeds.labelled():
            there = tokens(batch, mask)
            exact = self.run(batch, label)
            for accumulators, variant in zip(sums, variants, strict=True):
                got = self.run(batch, label, variant())
                for name, accumulator in accumulators.items():
                    accumulator.update(compared(exact[name], there), compared(got[name], there))
                if tick is not None:
                    tick()
        return [{name: item.result() for name, item in accumulators.items()} for accumulators in sums]


def _feed(model: ir.Model, names: set[str]) -> dict[str, str]:
    """Turn the weights of plain layers into inputs of the model; return their names by layer."""
    found = {}
    for node in plain_nodes(model):
        if node.layer in names and node.node.graph is model.graph:
            value = operand(node.node, 1)
            found[node.layer] = str(value.name)
            if value.is_initializer():
                del model.graph.initializers[str(value.name)]
                value.const_value = None
                model.graph.inputs.append(value)
    return found
