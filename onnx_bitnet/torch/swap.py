"""Exchange the linear layers of a model: ordinary ones for BitLinear, trained ones for their export form."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from onnx_bitnet.errors import RecipeError
from onnx_bitnet.torch.linear import BitLinear, TernaryLinear


def to_bitlinear(model: nn.Module, *patterns: str, **options: Any) -> list[str]:
    """Replace nn.Linear modules of a model by BitLinear ones with the same weights, in place.

    Optimizers must be made afterwards.

    Args:
        model: it is changed; a layer that is used in two places stays one layer.
        patterns: globs on the modules' names, such as `encoder.*.dense`; none means all linear layers.
        **options: as for BitLinear: granularity, activation_bits, scale, noise.

    Returns:
        The names of the layers that were replaced.

    Raises:
        RecipeError: a pattern matches no linear layer.
    """
    linear = {name: module for name, module in _modules(model) if type(module) is nn.Linear}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise RecipeError(f"{pattern!r} matches no linear layer; there are {', '.join(linear) or 'none'}")
    chosen = {
        name: module
        for name, module in linear.items()
        if not patterns or any(fnmatchcase(name, p) for p in patterns)
    }
    made = {module: BitLinear.of(module, **options) for module in chosen.values()}
    for name, module in chosen.items():
        model.set_submodule(name, made[module])
    return list(chosen)


def freeze(model: nn.Module) -> nn.Module:
    """Replace each BitLinear by the TernaryLinear that it has become, in place, and return the model.

    Export the result: `torch.onnx.export(freeze(model), ...)`. It cannot be trained any further.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(_modules(model)):
        if isinstance(module, BitLinear):
            made[module] = made.get(module) or TernaryLinear(module)
            if not name:
                return made[module]
            model.set_submodule(name, made[module])
    return model.eval()


def set_progress(model: nn.Module, progress: float) -> None:
    """Set how much of the rounding all BitLinear layers apply, 0 to 1."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.progress = progress


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))
