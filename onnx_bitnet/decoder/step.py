"""Run a decoder on new tokens, with keys and values of all tokens before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnx_bitnet import runtime
from onnx_bitnet.errors import ModelError

CHUNK = 128
"""Tokens that are read at a time: attention of a long prompt at once leaves the cache of the CPU."""


class Step:
    """One text: the model, and its cache of keys and values.

    Args:
        session: of the model.
        decoder: what genai_config.json says of it: names of inputs and outputs, sizes.
        capacity: the most tokens the text will have.
        in_place: past and present are one buffer of this capacity; otherwise each run makes a new cache.
    """

    def __init__(self, session: Any, decoder: Mapping[str, Any], capacity: int, *, in_place: bool) -> None:
        self._session, self._binding = session, session.io_binding()
        self._names, self._logits = decoder["inputs"], decoder["outputs"]["logits"]
        self._wants = {value.name for value in session.get_inputs()}
        self._length = 0
        self._cache = [
            (
                decoder["inputs"][f"past_{part}_names"] % index,
                decoder["outputs"][f"present_{part}_names"] % index,
            )
            for index in range(decoder["num_hidden_layers"])
            for part in ("key", "value")
        ]
        shape = 1, decoder["num_key_value_heads"], capacity if in_place else 0, decoder["head_size"]
        self._buffers = [np.zeros(shape, np.float32) for _ in self._cache]  # onnxruntime does not own them
        self._in_place = in_place
        value_of = runtime.import_onnxruntime().OrtValue.ortvalue_from_numpy
        self._bind([value_of(buffer) for buffer in self._buffers])

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Go on with some tokens; return the logits float32 (vocabulary,) after the last.

        Raises:
            ModelError: onnxruntime fails.
        """
        for first in range(0, len(tokens), CHUNK):
            logits = self._run(tokens[first : first + CHUNK])
        return logits

    def _run(self, tokens: Sequence[int]) -> np.ndarray:
        start, self._length = self._length, self._length + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(start, self._length)[None],
        }
        for name, array in feeds.items():
            name = self._names.get(name, name)
            if name in self._wants:
                self._binding.bind_cpu_input(name, array)
        self._binding.bind_output(self._logits)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise ModelError(f"the model fails: {runtime.ort_message(error)}") from error
        *present, logits = self._binding.get_outputs()
        if not self._in_place:
            self._bind(present)
        last: np.ndarray = logits.numpy()[0, -1]
        return last

    def _bind(self, values: Sequence[Any]) -> None:
        for (past, present), value in zip(self._cache, values, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            if self._in_place:
                self._binding.bind_ortvalue_output(present, value)
            else:
                self._binding.bind_output(present)
