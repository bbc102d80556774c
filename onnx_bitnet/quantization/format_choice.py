"""The format of a layer where the recipe leaves it open: by the CPU that will run it, and the layer's shape.

The number of rows does not matter: where t5 is taken, docs/speed.md has it as fast as i2s or faster for all.
"""

from __future__ import annotations

import dataclasses

from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.recipe import Recipe

# Instruction sets whose kernels multiply t5 as it is; on others it becomes the panels of i2s.
_READS_T5 = ("avx512vbmi",)
# As i2s. Models with layers of this size are larger than caches: the weights come from memory for each run.
_FROM_MEMORY = 1 << 20


def with_format(spec: LayerSpec, n: int, k: int, recipe: Recipe) -> LayerSpec:
    """Settle the format of a layer (N, K) and say why, unless the recipe names one."""
    if recipe.format != "auto" or recipe.target != "custom" or spec.integer_bits:
        return spec
    form, why = _choose(spec, n, k, recipe)
    detail = f"{why}; {spec.detail}" if spec.detail else why
    return dataclasses.replace(spec, format=form, detail=detail)


def _choose(spec: LayerSpec, n: int, k: int, recipe: Recipe) -> tuple[str, str]:
    if spec.exact is None and spec.levels != 3:
        return "i2s", "only i2s holds four levels"
    if recipe.target_cpu not in _READS_T5:
        return "i2s", "i2s loads fastest; tl2 and t5 make smaller files"
    if recipe.layout == "panel" or recipe.fuse:
        return "i2s", "layout panel and fused layers are i2s"
    planes = 1 if spec.exact is not None else spec.planes
    if planes > 1 or spec.group_length(k) < k or spec.activation_bits == 32:
        return "i2s", "i2s: t5 is fast with one plane, one scale for each output and integer activations"
    if n * k // 4 < _FROM_MEMORY:
        return "i2s", "i2s is faster than t5 for single rows of weights that stay in the cache"
    return "t5", f"t5 takes a fifth less memory and is as fast or faster from there with {recipe.target_cpu}"
