"""Distil an exported model: its file and unlabelled data in, a file with trained ternary layers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnx_bitnet import files, outputs
from onnx_bitnet.conversion.verify import verify
from onnx_bitnet.data.feeds import open_feeds
from onnx_bitnet.data.inputs import Batch
from onnx_bitnet.data.padding import USUAL, check_mask, counted, tokens
from onnx_bitnet.data.replay import Replay, replayed
from onnx_bitnet.errors import DataError, ModelError, RecipeError
from onnx_bitnet.quantization.detect import detect
from onnx_bitnet.recipe_values import near_misses
from onnx_bitnet.rewrite.cleanup import cleanup
from onnx_bitnet.rewrite.constants import Constant
from onnx_bitnet.rewrite.plain import Plain, replace_plain
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.rewrite.replace import Shared
from onnx_bitnet.rewrite.scan import prepare, scan
from onnx_bitnet.rewrite.types import FLOATS
from onnx_bitnet.runner import start_part
from onnx_bitnet.torch.distill import Settings, Step, mean_loss, train
from onnx_bitnet.torch.graph import Graph, Layer, tensor, trainable


@dataclass(frozen=True)
class Distilled:
    """What `distill_onnx` did.

    Args:
        layers: names of the layers that were trained and are ternary now.
        left: name of each layer that was chosen and is as it was -> why.
        steps: the losses of all steps.
    """

    layers: tuple[str, ...]
    left: Mapping[str, str]
    steps: tuple[Step, ...]


def distill_onnx(
    source: str | Path,
    output: str | Path,
    data: object,
    settings: Settings,
    *,
    layers: Sequence[str] = ("*",),
    granularity: str = "block:128",
    activation_bits: Literal[8, 16, 32] = 8,
    scale: Literal["absmean", "learned"] = "learned",
    noise: float = 0.0,
    batch_size: int = 32,
    mask: str = USUAL,
    force: bool = False,
    on_step: Callable[[Step], None] = lambda _: None,
) -> Distilled:
    """Make linear layers of an ONNX model ternary by training them to give what they gave as floats.

    onnxruntime runs the float model for what is to be learned; torch runs what lies between the layers and
    the model's float outputs, in float32. Weights, scales and biases of the layers are trained, all else
    stays as it is: nodes, names and other weights. The file that is written is plain ONNX with exactly
    ternary weights, which `convert` packs without loss. It is there whole or not at all; interrupting leaves
    nothing behind.

    Args:
        source: an ONNX model; not changed.
        output: where to write.
        data: inputs without labels, see `onnx_bitnet.data.feeds.open_feeds`; batches are used in turn until
            the last step.
        settings: see Settings; `match` has globs on names of nodes or of the values they make.
        layers: globs on the names that `onnx-bitnet plan` shows. Those that are ternary already, are inside
            of a subgraph or function, or have no way to a float output are left as they are.
        granularity: what shares a scale: `tensor`, `channel` or `block:B`.
        activation_bits: what the layers are trained with. 8 is written into the graph, for `convert` to put
            into the packed ops; of 16, which it chooses itself, and 32 the file holds nothing.
        scale: `learned`, or `absmean` as in BitNet.
        noise: see BitLinear.
        batch_size: samples to a step. Larger batches are cut along the first axis, shuffled, where all inputs
            have as many samples and the model takes any number of them.
        mask: see `calibrate`: outputs where data is padding are not compared.
        force: overwrite existing output files.
        on_step: called after each step, and may stop by raising; nothing is written then.

    Raises:
        ModelError: the model cannot be read or run, or an operator behind the layers is none that torch
            computes here.
        RecipeError: a glob matches nothing, or an option does not exist.
        DataError: the data cannot be read or does not fit.
        OutputError: the output cannot be written, or would overwrite a file.
    """
    output, file = Path(output), files.read(source)
    outputs.check_output(file, output, force=force)
    for target in (output, files.data_path(output)):
        outputs.check_inputs(target, others=(data,))
    prepare(file.model)
    chosen, left = _chosen(file.model, layers)
    options = {"granularity": granularity, "activation_bits": activation_bits, "scale": scale, "noise": noise}
    made = trainable(chosen, **options)
    ends, matched = _targets(file.model, chosen, settings.match)
    graph = Graph(file.model, made, (*ends, *matched)).train()
    trained = {layer.linear: layer for layer in graph.layers}
    left |= {item.name: "it has no way to a float output" for item in chosen if item not in trained}
    if not trained:
        raise RecipeError(f"{source}: there is nothing to train: {_shown(left)}")
    lost = sorted(set(matched) - set(graph.names))
    if lost:
        raise RecipeError(f"{lost[0]!r} cannot be matched: no layer that is trained changes it; leave it out")
    with replayed(open_feeds(file.model, _given(data))) as feeds:
        check_mask(mask, feeds.feeds.inputs)
        lessons = _Lessons(file, graph, feeds, batch_size, mask)
        losses = _Losses(graph, ends, matched)
        steps = train(graph, lessons, losses, settings, _finite(on_step))
    _write(file.model, trained, activation_bits, output)
    return Distilled(tuple(item.name for item in trained), left, tuple(steps))


def _finite(on_step: Callable[[Step], None]) -> Callable[[Step], None]:
    def check(step: Step) -> None:
        if not math.isfinite(step.output_loss + step.match_loss):
            raise ModelError(
                f"the loss of step {step.number} is not finite: check the model's outputs on the data, "
                "or use a smaller learning_rate"
            )
        on_step(step)

    return check


def _chosen(model: ir.Model, patterns: Sequence[str]) -> tuple[list[Linear], dict[str, str]]:
    """Return the layers that match, and why others that match are left."""
    linears = [item for item in scan(model) if isinstance(item, Linear)]
    names = [item.name for item in linears]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(f"{pattern!r} matches no linear layer; {near_misses(pattern, names)}")
    chosen, left = [], {}
    for item in linears:
        if not any(fnmatchcase(item.name, pattern) for pattern in patterns):
            continue
        if item.node.graph is not model.graph:
            left[item.name] = "it is inside of a subgraph or function"
        elif detect(item.weight.array()) is not None:
            left[item.name] = "its weights are ternary"
        else:
            chosen.append(item.folded or item)
    return chosen, left


def _shown(left: Mapping[str, str]) -> str:
    name, why = next(iter(left.items()), ("", ""))
    return f"layer {name!r}: {why}" if name else "no layer is chosen"


def _targets(
    model: ir.Model, chosen: Sequence[Linear], patterns: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the names of the model's float outputs, and those of values to match."""
    ends = [str(value.name) for value in model.graph.outputs if value.dtype is None or value.dtype in FLOATS]
    names = {str(value.name): [str(value.name), node.name] for node in model.graph for value in node.outputs}
    for linear in chosen:
        for node in (linear.node, *linear.absorbed):
            names.pop(str(node.outputs[0].name), None)
        names[str(linear.y.name)] = [str(linear.y.name), linear.name]
    for pattern in patterns:
        if not any(fnmatchcase(str(name), pattern) for known in names.values() for name in known):
            raise RecipeError(f"{pattern!r} matches no node of the model and no value that it computes")
    matched = [
        value
        for value, known in names.items()
        if value not in ends and any(fnmatchcase(str(name), p) for name in known for p in patterns)
    ]
    return ends, matched


def _given(data: object) -> object:
    if data is None:
        raise DataError("there is no data to distill with; random numbers would teach nothing")
    return data


class _Lessons:
    """For each batch what the graph needs, and what the float model makes of it."""

    def __init__(
        self, file: files.ModelFile, graph: Graph, feeds: Replay, batch_size: int, mask: str
    ) -> None:
        self._feeds, self._batch_size, self._mask, self._graph = feeds, batch_size, mask, graph
        self._names = tuple(dict.fromkeys((*graph.needs, *graph.names)))
        self._runner = start_part(file.model, file.path, self._names, torch.get_num_threads())
        self._rng = np.random.default_rng(0)
        self._defaults = {
            str(value.name): value.const_value.numpy()
            for value in file.model.graph.inputs
            if value.const_value is not None
        }

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], np.ndarray | None]]:
        """Yield tensors by name, and where they are not padding."""
        for label, batch in zip(self._feeds.labels, self._feeds, strict=True):
            for part in self._cut(batch):
                have = self._defaults | part
                names = [name for name in self._names if name not in have]
                assert self._runner is not None, "what is compared is computed"
                have |= self._runner.run(names, part, label)
                yield {name: tensor(have[name]) for name in self._names}, tokens(part, self._mask)

    def _cut(self, batch: Batch) -> Iterator[Batch]:
        inputs = self._feeds.feeds.inputs
        free = all(item.shape and isinstance(item.shape[0], str) for item in inputs if item.name in batch)
        sizes = {array.shape[0] if array.ndim else 0 for array in batch.values()}
        if not free or len(sizes) != 1 or max(sizes) <= self._batch_size:
            yield batch
            return
        order = self._rng.permutation(sizes.pop())
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            yield {name: array[rows] for name, array in batch.items()}


class _Losses:
    """Compares what the graph makes of a batch with what the float model does."""

    def __init__(self, graph: Graph, ends: Sequence[str], matched: Sequence[str]) -> None:
        self._graph = graph
        self._ends = [name for name in graph.names if name in ends]
        self._matched = [name for name in graph.names if name in matched]

    def __call__(self, batch: tuple[Mapping[str, Tensor], np.ndarray | None]) -> tuple[Tensor, Tensor]:
        values, there = batch
        made = self._graph(values)
        output_loss, match_loss = (
            mean_loss(
                [_rows(made[name], there) for name in names], [_rows(values[name], there) for name in names]
            )
            for names in (self._ends, self._matched)
        )
        return output_loss, match_loss


def _rows(value: Tensor, there: np.ndarray | None) -> Tensor:
    """Return the rows (rows, channels) of a value that are no padding."""
    rows = value.reshape(-1, value.shape[-1] if value.ndim > 1 else 1)
    kept: Tensor = counted(rows, tuple(value.shape[:-1]), there)
    return kept


def _write(model: ir.Model, trained: Mapping[Linear, Layer], activation_bits: int, output: Path) -> None:
    """Put the trained layers into the model and write it."""
    shared = Shared.of(model)
    made: dict[Any, Plain] = {}
    meant: dict[str, Plain] = {}
    bits = activation_bits if activation_bits == 8 else 32
    for linear, layer in trained.items():
        weight = layer.bit.ternary().detach().numpy()
        if layer.bit.bias is not None:
            linear = _with_bias(linear, layer.bit.bias.detach().numpy(), shared)
        plain = made.setdefault(linear.weight.key, Plain.of(weight, linear))
        meant[linear.name] = plain
        replace_plain(model, linear, plain, activation_bits=bits, shared=shared)
    cleanup(model)
    with files.staged(model, output) as written:
        verify(written, meant)


def _with_bias(linear: Linear, bias: np.ndarray, shared: Shared) -> Linear:
    """Return the layer with another bias, a new constant of the graph."""
    name = f"{linear.name}.bias"
    value = shared.constant(linear.root, name, name, bias)
    assert value.const_value is not None
    return replace(linear, bias=Constant(value, value.const_value, bias.shape))
