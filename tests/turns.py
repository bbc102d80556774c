"""BlockHadamard nodes as ONNX models, with what they must compute; shared by the tests of op and body."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import packed
from onnx import helper, numpy_helper

from onnx_bitnet import reference
from onnx_bitnet.rewrite import functions


@dataclass(frozen=True)
class Turn:
    """One BlockHadamard node: its attribute and its constant input."""

    block_size: int
    signs: np.ndarray

    @property
    def k(self) -> int:
        return self.signs.size

    def expected(self, x: np.ndarray) -> np.ndarray:
        return reference.block_hadamard(x, self.signs, self.block_size)

    def node(self, x: str = "x", y: str = "y", name: str = "turn") -> onnx.NodeProto:
        return helper.make_node(
            "BlockHadamard",
            [x, "signs"],
            [y],
            name=name,
            domain=functions.DOMAIN,
            block_size=self.block_size,
        )

    def initializers(self) -> list[onnx.TensorProto]:
        return [numpy_helper.from_array(self.signs, "signs")]

    def model(
        self,
        dtype: type = np.float32,
        *,
        rank: int = 2,
        opset: int = 17,
        x_shape: packed.Shape | None = None,
        with_function: bool = True,
    ) -> onnx.ModelProto:
        """Make x -> node -> y; all dimensions of x but the last have names, unless x_shape says else."""
        named = [*(f"d{axis}" for axis in range(rank - 1)), self.k]
        return packed.model(
            [self.node()],
            self.initializers(),
            [packed.value("x", dtype, named if x_shape is None else x_shape)],
            [packed.value("y", dtype, named if x_shape is None else None)],
            opset=opset,
            with_function=with_function,
        )


def random_turn(seed: int, block_size: int, blocks: int = 3) -> Turn:
    rng = np.random.default_rng(seed)
    return Turn(block_size, rng.choice([-1, 1], block_size * blocks).astype(np.float32))
