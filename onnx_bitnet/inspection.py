"""Look into a model file: what is packed, how, and what is still float."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_bitnet import files
from onnx_bitnet.report import KEPT
from onnx_bitnet.rewrite.packed import PackedNode, packed_nodes
from onnx_bitnet.rewrite.records import Linear
from onnx_bitnet.rewrite.scan import scan, state_ranks

SCHEMA = "onnx_bitnet.inspection/1"


@dataclass(frozen=True)
class PackedLayer:
    """A packed layer as it stands in a file.

    Args:
        name: the layer's name.
        format: canonical format.
        n: outputs.
        k: inputs.
        planes: planes of codes.
        granularity: `tensor`, `channel` or `block:B`.
        activation_bits: 8, 16 or 32.
        nbytes: bytes of codes, scales and zero points.
        code_bytes: bytes of the codes alone.
        bits_per_weight: `nbytes` in bits by the number of weights.
        codes: share of each code 0 to 3 over all planes.
    """

    name: str
    format: str
    n: int
    k: int
    planes: int
    granularity: str
    activation_bits: int
    nbytes: int
    code_bytes: int
    bits_per_weight: float
    codes: tuple[float, ...]


@dataclass(frozen=True)
class Inspection:
    """What a model file holds.

    Args:
        path: the file.
        nbytes: its size with external data.
        ir_version: of the ONNX file format.
        opsets: version by domain.
        producer: who exported it.
        metadata: the model's own key-value pairs, the recipe of a converted model among them.
        packed: packed layers.
        float_layers: name, N and K of linear layers with constant weights that are not packed.
        kept: why layers were left, by name, if the conversion noted it.
    """

    path: str
    nbytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    metadata: dict[str, str]
    packed: tuple[PackedLayer, ...]
    float_layers: tuple[tuple[str, int, int], ...]
    kept: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


def inspect(path: str | Path) -> Inspection:
    """Read a model file and describe its linear layers, packed or not.

    Raises:
        ModelError: the file or one of its packed layers is damaged.
    """
    return describe(files.read(path))


def describe(file: files.ModelFile) -> Inspection:
    """Describe a model that was read.

    Raises:
        ModelError: one of its packed layers is damaged.
    """
    model = file.model
    state_ranks(model)
    metadata = dict(model.metadata_props)
    return Inspection(
        path=str(file.path),
        nbytes=file.nbytes,
        ir_version=model.ir_version,
        opsets=dict(model.opset_imports),
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        metadata={key: text for key, text in metadata.items() if key != KEPT},
        packed=tuple(_describe(packed) for packed in packed_nodes(model)),
        float_layers=tuple(
            (found.name, found.weight.n, found.weight.k) for found in scan(model) if isinstance(found, Linear)
        ),
        kept=_kept(metadata.get(KEPT, "{}")),
    )


def _kept(text: str) -> dict[str, str]:
    try:
        kept = json.loads(text)
    except ValueError:
        kept = None
    if not isinstance(kept, dict):
        return {}  # someone else's note; it decides nothing
    return {str(name): str(reason) for name, reason in kept.items()}


def _describe(packed: PackedNode) -> PackedLayer:
    weight = packed.quantized()
    counts = np.zeros(4, dtype=np.int64)
    for codes in packed.codes(weight):
        counts += np.bincount(codes.reshape(-1), minlength=4)
    return PackedLayer(
        name=packed.layer,
        format=packed.format,
        n=packed.n,
        k=packed.k,
        planes=weight.planes,
        granularity=weight.granularity,
        activation_bits=packed.activation_bits,
        nbytes=packed.nbytes,
        code_bytes=weight.weight.nbytes,
        bits_per_weight=8 * packed.nbytes / (packed.n * packed.k),
        codes=tuple(float(count) for count in counts / counts.sum()),
    )
