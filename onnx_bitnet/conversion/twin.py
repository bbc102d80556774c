"""The model with packed ops, beside one that gets other forms of the same weights.

What later layers read is measured in it, so that codes and scales are the same whatever the target.
"""

from __future__ import annotations

from pathlib import Path

from onnx_bitnet import files
from onnx_bitnet.conversion.decide import way
from onnx_bitnet.conversion.targets import Basis, put
from onnx_bitnet.quantization.floats import Floats
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.quantization.spec import LayerSpec
from onnx_bitnet.recipe import Recipe
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.rewrite.replace import Shared
from onnx_bitnet.rewrite.scan import prepare, scan


class Twin:
    """A copy of a model that is converted layer by layer as it would be for the target `custom`.

    Args:
        path: the file that the model comes from.
        recipe: what is done to the model itself.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.model = files.read(path).model
        prepare(self.model)
        self._layers = {item.name: item for item in scan(self.model) if isinstance(item, Linear)}
        self._shared, self._recipe = Shared.of(self.model), recipe

    def replace(self, layer: str, weight: Quantized | Floats, spec: LayerSpec, basis: Basis) -> None:
        """Put the packed op in the place of a layer, or what stands for floats, which have none."""
        linear = way(self._layers[layer], self._recipe)
        put(self.model, linear, weight, spec, basis, layout="canonical", shared=self._shared)
