"""What `load_weights` returns: tensors by name, each read from its file when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from onnx_bitnet.quantization.quantized import Quantized

T = TypeVar("T")


class Lazy(Mapping[str, T], Generic[T]):
    """A mapping whose values are made anew each time they are asked for, and never kept."""

    def __init__(self, makers: Mapping[str, Callable[[], T]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> T:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Weights(Lazy[Quantized]):
    """The linear layers of a model by the names that their file gives them, few-bit and packed.

    Args:
        path: the file or folder they come from.
        makers: what reads and packs each weight.
        others: all tensors that are no linear layer (norms, biases, embeddings, the head), as arrays.
        metadata: what the file says of the model: a checkpoint's config.json, or the keys of a GGUF file.
    """

    def __init__(
        self,
        path: Path,
        makers: Mapping[str, Callable[[], Quantized]],
        others: Mapping[str, Callable[[], np.ndarray]],
        metadata: Mapping[str, Any],
    ) -> None:
        super().__init__(makers)
        self.path = path
        self.others: Lazy[np.ndarray] = Lazy(others)
        self.metadata = metadata
