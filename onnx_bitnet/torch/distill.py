"""Teach a ternary model to answer as the float model it came from, on inputs that need no labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from onnx_bitnet.arguments import is_whole
from onnx_bitnet.errors import DataError, RecipeError
from onnx_bitnet.recipe_values import is_number
from onnx_bitnet.torch.swap import set_progress


@dataclass(frozen=True)
class Settings:
    """How to distill.

    Args:
        steps: batches to learn from.
        learning_rate: of AdamW at its peak; it rises over `warm_up` and then falls to 0 as a cosine.
        warm_up: share of the steps.
        harden: share of the steps in which `progress` of the layers goes from 0 to 1; with 0 it is always 1.
        match: globs on the names of modules whose outputs are matched besides the model's own; in
            `distill_onnx` on those of nodes and values.
        match_weight: weight of the mean of their losses; the model's own outputs have weight 1.
        bfloat16: run matrix products in bfloat16: 5 times as fast on CPUs with AVX512-BF16 or AMX.

    Raises:
        RecipeError: a number is out of range.
    """

    steps: int
    learning_rate: float = 5e-4
    warm_up: float = 0.05
    harden: float = 0.0
    match: tuple[str, ...] = ()
    match_weight: float = 1.0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.steps, 1):
            raise RecipeError(f"steps = {self.steps!r} is no whole number from 1 on")
        for name in ("learning_rate", "match_weight"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise RecipeError(f"{name} = {value!r} is no finite number from 0 on")
        if not (is_number(self.warm_up) and 0 <= self.warm_up < 1):
            raise RecipeError(f"warm_up = {self.warm_up!r} is no share of the steps; use 0 to less than 1")
        if not (is_number(self.harden) and 0 <= self.harden <= 1):
            raise RecipeError(f"harden = {self.harden!r} is no share of the steps; use 0 to 1")


@dataclass(frozen=True)
class Step:
    """What a step came to: its number from 1, the loss of the outputs and the mean loss of matched modules.

    A loss is the mean squared error relative to the variance of the teacher's output over the batch.
    """

    number: int
    output_loss: float
    match_loss: float


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Tensor] | tuple[Tensor, ...] | Tensor],
    settings: Settings,
    on_step: Callable[[Step], None] = lambda _: None,
) -> list[Step]:
    """Train the student's parameters, in place, until its outputs are those of the teacher.

    Args:
        student: usually a copy of the teacher after `to_bitlinear`.
        teacher: the float model; not changed.
        batches: inputs of the models: keyword arguments, a tuple of arguments, or the one argument. Started
            again when they end.
        settings: see Settings.
        on_step: called after each step; to print, to evaluate, or to stop by raising.

    Returns:
        One record for each step.

    Raises:
        RecipeError: a glob of `settings.match` matches no module of both models.
        DataError: there are no batches.
    """
    with _watched(student, settings.match) as seen, _watched(teacher, settings.match) as meant:

        def losses(batch: Any) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                expected = _call(teacher, batch)
            output_loss = mean_loss(_call(student, batch), expected)
            matched = (_all(outputs[name] for name in sorted(meant)) for outputs in (seen, meant))
            return output_loss, mean_loss(*matched)

        return train(student, batches, losses, settings, on_step)


def train(
    student: nn.Module,
    batches: Iterable[Any],
    losses: Callable[[Any], tuple[Tensor, Tensor]],
    settings: Settings,
    on_step: Callable[[Step], None],
) -> list[Step]:
    """Train a student's parameters in place; see `distill`.

    Args:
        student: holds the parameters, and the layers that `settings.harden` is about.
        batches: started again when they end.
        losses: returns the losses of outputs and of what is matched besides, for a batch.
        settings: see Settings.
        on_step: called after each step.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, (0.9, 0.98), weight_decay=0, fused=True)
    inputs = _endless(batches)
    history = []
    for number in range(1, settings.steps + 1):
        part = number / settings.steps
        optimizer.param_groups[0]["lr"] = settings.learning_rate * _slope(part, settings.warm_up)
        set_progress(student, min(1.0, part / settings.harden) if settings.harden else 1.0)
        batch = next(inputs)
        with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=settings.bfloat16):
            output_loss, match_loss = losses(batch)
        optimizer.zero_grad()
        (output_loss + settings.match_weight * match_loss).backward()
        optimizer.step()
        history.append(Step(number, output_loss.item(), match_loss.item()))
        on_step(history[-1])
    set_progress(student, 1.0)
    return history


def _slope(part: float, warm_up: float) -> float:
    """Return the share of the learning rate: up in a line, down as a cosine."""
    if part < warm_up:
        return part / warm_up
    return 0.5 * (1 + math.cos(math.pi * (part - warm_up) / (1 - warm_up)))


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    empty = True
    while True:
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise DataError("there is no batch to distill from")


@contextmanager
def _watched(model: nn.Module, patterns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the latest output of each module that matches a glob, by name."""
    names = {name for name, _ in model.named_modules() for p in patterns if fnmatchcase(name, p)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(f"{pattern!r} matches no module of {type(model).__name__}")
    outputs: dict[str, Any] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    hooks = [model.get_submodule(name).register_forward_hook(remember(name)) for name in sorted(names)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _call(model: nn.Module, batch: Any) -> list[Tensor]:
    """Run the model and return its floating-point outputs."""
    if isinstance(batch, Mapping):
        result = model(**batch)
    else:
        result = model(*batch) if isinstance(batch, tuple) else model(batch)
    return _all([result])


def _all(results: Iterable[Any]) -> list[Tensor]:
    """Return the floating-point tensors of results that may be tensors, or tuples or mappings of such."""
    found: list[Tensor] = []
    for result in results:
        if isinstance(result, Tensor):
            found += [result] if result.is_floating_point() else []
        elif isinstance(result, Mapping):
            found += _all(result.values())
        elif isinstance(result, (tuple, list)):
            found += _all(result)
    return found


def mean_loss(got: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Return the mean of the losses of some tensors (..., channels), 0 if there are none."""
    if not expected:
        return torch.zeros(())
    return torch.stack([_loss(g.float(), e.float()) for g, e in zip(got, expected, strict=True)]).mean()


def _loss(got: Tensor, expected: Tensor) -> Tensor:
    """Return the squared error relative to the variance of what was expected, channel means taken out."""
    channels = expected.flatten(0, -2)
    power = (channels - channels.mean(dim=0)).square().sum().clamp(min=1e-12)
    return (got - expected).square().sum() / power
