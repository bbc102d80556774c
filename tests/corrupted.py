"""Ways to spoil a model whose first node is a custom op, and a process to open the spoilt ones in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Change = Callable[[onnx.ModelProto], None]


def attribute(**changes: Any) -> Change:
    """Change attributes of the node; None takes one away."""

    def change(model: onnx.ModelProto) -> None:
        node = model.graph.node[0]
        kept = {a.name: helper.get_attribute_value(a) for a in node.attribute} | changes
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(k, v) for k, v in kept.items() if v is not None)

    return change


def constant(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Put another array in the place of an initializer."""

    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(
                    numpy_helper.from_array(np.asarray(make(numpy_helper.to_array(tensor))), name)
                )

    return change


def as_graph_input(name: str, keep: bool) -> Change:
    """Make a constant something that the caller may give."""

    def change(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        if not keep:
            model.graph.initializer.remove(tensor)

    return change


def node_input(index: int, name: str | None) -> Change:
    """Rename an input of the node, or cut the inputs off from there."""

    def change(model: onnx.ModelProto) -> None:
        inputs = model.graph.node[0].input
        if name is None:
            del inputs[index:]
        else:
            inputs[index] = name

    return change


def truncate(name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        tensor.raw_data = tensor.raw_data[:-1]

    return change


def x_type(elem_type: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.elem_type = elem_type
        model.graph.output[0].type.tensor_type.elem_type = elem_type

    return change


def put(index: Any, number: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return an array's copy with one number changed."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = number
        return array

    return change


def x_last(length: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = length

    return change


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with the tests' helpers importable."""
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


LOAD_ALL = """
import json, sys
from onnx_bitnet import runtime
from onnx_bitnet.errors import ModelError
for path in sys.argv[1:]:
    print(json.dumps([path, "?"]), flush=True)
    try:
        runtime.session(path)
        print(json.dumps([path, None]), flush=True)
    except ModelError as error:
        print(json.dumps([path, str(error)]), flush=True)
"""


def load(models: Mapping[str, onnx.ModelProto], folder: Path) -> dict[str, str | None]:
    """Open each model in a process of its own, which would show a crash; return name -> error or None."""
    for name, model in models.items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    child = python("-c", LOAD_ALL, *(str(folder / f"{name}.onnx") for name in models))
    results = dict(json.loads(line) for line in child.stdout.splitlines())
    assert child.returncode == 0, f"crashed at {list(results)[-1:]}: {child.stderr[-2000:]}"
    assert child.stderr == ""
    return {Path(path).stem: error for path, error in results.items()}
