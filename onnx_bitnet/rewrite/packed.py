"""Find the packed ops in a model and read what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_bitnet import reference
from onnx_bitnet.errors import ModelError
from onnx_bitnet.formats import FORMATS, PANEL_OP, Format, from_panels, panel_shape
from onnx_bitnet.graphs import roots
from onnx_bitnet.quantization.quantized import Quantized
from onnx_bitnet.rewrite.functions import DOMAIN
from onnx_bitnet.rewrite.replace import LAYER

_Tensors = tuple[ir.TensorProtocol, ...]
_ACTIVATION_BITS = (8, 16, 32)
_WAY_OUT = "convert the model again"
_FORMATS = {form.op_type: form for form in FORMATS.values()} | {PANEL_OP: FORMATS["i2s"]}


@dataclass(frozen=True)
class PackedNode:
    """A packed op as it stands in a model.

    Args:
        layer: name of the layer it replaced.
        node: the node itself.
        format: canonical format of its weight.
        n: outputs.
        k: inputs.
        block_size: inputs that share a scale; 0 means all of K.
        activation_bits: 8, 16 or 32.
        tensors: weight uint8 (P, N, row_bytes), or panels, scale (P, N or 1, G or 1) and, where the format
            has one, zero point likewise.
        root: the main graph, or the body of the function that the node is in.
    """

    layer: str
    node: ir.Node
    format: str
    n: int
    k: int
    block_size: int
    activation_bits: int
    tensors: _Tensors
    root: ir.Graph

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def arrays(self) -> list[np.ndarray]:
        """Load weight in canonical bytes, scale and zero point, which is 1 where the format has none.

        Raises:
            ModelError: the file holds fewer or more bytes than their shapes need, damaged panels, or scales
                that are not finite.
        """
        try:
            arrays = [tensor.numpy() for tensor in self.tensors]
            if self.node.op_type == PANEL_OP:
                arrays[0] = from_panels(arrays[0], self.n, self.k)
        except (ValueError, OSError) as error:
            raise ModelError(
                f"packed node {self.layer!r}: its data is damaged: {error}; {_WAY_OUT}"
            ) from None
        if not all(np.isfinite(parameter).all() for parameter in arrays[1:]):
            raise ModelError(
                f"packed node {self.layer!r}: scale or zero point holds NaN or infinity; {_WAY_OUT}"
            )
        if not FORMATS[self.format].four_levels:
            arrays.append(np.ones((arrays[0].shape[0], 1, 1), arrays[1].dtype))
        return arrays

    def quantized(self) -> Quantized:
        """Load the weight."""
        weight, scale, zero_point = self.arrays()
        return Quantized(
            self.format, self.n, self.k, self.block_size, weight, scale, zero_point, lossless=True
        )

    def dequantize(self) -> np.ndarray:
        """Return the weight float32 (N, K) that the op stands for.

        Raises:
            ModelError: it holds bytes that stand for no codes, or blocks that only the kernels can decode.
        """
        try:
            return self.quantized().dequantize()
        except ValueError as error:
            raise ModelError(f"packed node {self.layer!r}: {error}; {_WAY_OUT}") from None

    def decoder(self) -> Callable[[slice], np.ndarray]:
        """Return what decodes rows of the weight to float32 (rows, K), by the NumPy reference.

        It raises ValueError where bytes stand for no codes.
        """
        weight, *parameters = self.arrays()

        def decode(rows: slice) -> np.ndarray:
            scale, zero_point = (part if part.shape[1] == 1 else part[:, rows] for part in parameters)
            return reference.dequantize(
                weight[:, rows], scale, zero_point, self.k, self.block_size, self.format
            )

        return decode

    def codes(self, weight: Quantized) -> Iterator[np.ndarray]:
        """Yield the codes uint8 (N, K) of each plane of the weight, as `quantized` has loaded it.

        Raises:
            ModelError: the weight holds bytes that stand for no codes.
        """
        for plane in weight.weight:
            try:
                yield FORMATS[self.format].unpack(plane, self.k)
            except ValueError as error:
                raise ModelError(f"packed node {self.layer!r}: {error}; {_WAY_OUT}") from None


def leave_float(node: ir.Node) -> None:
    """Let a packed op leave its activations float, in place."""
    node.attributes["activation_bits"] = ir.AttrInt64("activation_bits", 32)


def packed_nodes(model: ir.Model) -> Iterator[PackedNode]:
    """Yield every packed op of the main graph, its subgraphs and the model's own functions.

    Raises:
        ModelError: a packed op lacks an attribute, or its tensors are not constants that fit together.
    """
    for root in roots(model, without=DOMAIN):
        for node in root.all_nodes():
            form = _FORMATS.get(node.op_type) if node.domain == DOMAIN else None
            if form is not None:
                yield _read(node, form, root)


def _read(node: ir.Node, form: Format, root: ir.Graph) -> PackedNode:
    where = f"packed node {node.name or node.outputs[0].name!r}"
    try:
        n, k, block_size, bits = (
            node.attributes[name].as_int() for name in ("N", "K", "block_size", "activation_bits")
        )
    except (KeyError, TypeError) as error:
        raise ModelError(f"{where}: attribute {error} is missing or no integer; {_WAY_OUT}") from None
    if n < 1 or k < 1 or block_size < 0:
        raise ModelError(f"{where}: N = {n}, K = {k}, block_size = {block_size}; {_WAY_OUT}")
    if bits not in _ACTIVATION_BITS:
        raise ModelError(f"{where}: activation_bits = {bits}; it must be 8, 16 or 32; {_WAY_OUT}")
    count = 3 if form.four_levels else 2
    given = (value for value in node.inputs[1 : 1 + count] if value is not None)
    tensors = tuple(filter(None, map(ir.convenience.get_const_tensor, given)))
    if len(tensors) != count:
        raise ModelError(f"{where}: weight, scale or zero point is not a constant; {_WAY_OUT}")
    rows = panel_shape(n, k) if node.op_type == PANEL_OP else (n, form.row_bytes(k))
    if not _fit(tensors, n, rows, -(-k // (block_size or k))):
        shapes = ", ".join(f"{tensor.dtype} {list(tensor.shape.numpy())}" for tensor in tensors)
        raise ModelError(
            f"{where}: weight, scale and zero point ({shapes}) do not fit N = {n}, K = {k}, "
            f"block_size = {block_size}; {_WAY_OUT}"
        )
    if not _is_bias(node.inputs[1 + count] if len(node.inputs) > 1 + count else None, n):
        raise ModelError(f"{where}: its bias must be a constant float32 [{n}]; {_WAY_OUT}")
    layer = node.metadata_props.get(LAYER) or node.name or str(node.outputs[0].name)
    return PackedNode(layer, node, form.name, n, k, block_size, bits, tensors, root)


def _fit(tensors: _Tensors, n: int, rows: tuple[int, int], groups: int) -> bool:
    """Return whether a weight (P, *rows) and its parameters have the shapes and types of an op."""
    weight, *parameters = tensors
    shape = weight.shape.numpy()
    shapes = {(*shape[:1], outputs, count) for outputs in (1, n) for count in (1, groups)}
    return (
        weight.dtype == ir.DataType.UINT8
        and shape[1:] == rows
        and all(
            tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and tensor.shape.numpy() in shapes
            for tensor in parameters
        )
    )


def _is_bias(value: ir.Value | None, n: int) -> bool:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.shape.numpy() == (n,)
