"""Run a model that was changed in memory, its external data still in the folder it came from."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir

from onnx_bitnet import files, graphs, runtime
from onnx_bitnet.arguments import check_threads
from onnx_bitnet.data.inputs import Batch
from onnx_bitnet.errors import ModelError

_FOLDER = "session.model_external_initializers_file_folder_path"
_SPINNING = "session.intra_op.allow_spinning"
_PROVIDERS = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class Runner:
    """A model in a session, and its path for error messages."""

    path: Path
    session: Any

    def run(self, names: Sequence[str], batch: Batch, label: str, hint: str = "") -> dict[str, Any]:
        """Return the outputs called `names` for one batch.

        Raises:
            ModelError: onnxruntime fails; `label` says on what and `hint` what to do.
        """
        try:
            outputs = self.session.run(list(names), batch)
        except Exception as error:  # onnxruntime's exceptions have no other base
            raise ModelError(
                f"{self.path}: onnxruntime fails on {label}: {runtime.ort_message(error)}{hint}"
            ) from None
        return dict(zip(names, outputs, strict=True))

    def inputs(self) -> list[str]:
        """Return the names of all that can be fed."""
        return [end.name for end in self.session.get_inputs()]

    def types(self) -> dict[str, ir.DataType]:
        """Return the element types of all tensors that go in and come out."""
        ends = (*self.session.get_inputs(), *self.session.get_outputs())
        named = ((end.name, re.fullmatch(r"tensor\((\w+)\)", end.type)) for end in ends)
        return {name: ir.DataType[match[1].upper()] for name, match in named if match}


def start(model: ir.Model, path: Path, threads: int = 0) -> Runner:
    """Load a model into onnxruntime, for runs with other work between them.

    External data is mapped by onnxruntime, never read here. Its threads sleep when they have nothing to do:
    if they spun, products of small matrices between two runs would wait for a core, 20 times what they take.

    Args:
        model: the model as it was read from `path`, perhaps with other outputs.
        path: the file it came from.
        threads: 0 for as many as onnxruntime finds right.

    Raises:
        ModelError: onnxruntime does not accept the model.
        RuntimeMissing: the custom-op library cannot be loaded.
        RecipeError: threads make no sense.
    """
    check_threads(threads)
    ort = runtime.import_onnxruntime()
    options = runtime.quiet_options()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(_SPINNING, "0")
    runtime.register(options)
    folder = next((Path(tensor.base_dir) for tensor in files.external_tensors(model)), path.parent)
    try:
        session = _open(ort, ir.to_proto(model), options, folder.resolve())
    except Exception as error:  # onnxruntime's exceptions have no other base
        raise ModelError(f"{path}: onnxruntime cannot open it: {runtime.ort_message(error)}") from None
    return Runner(path, session)


def start_part(
    model: ir.Model,
    path: Path,
    names: Sequence[str],
    threads: int,
    given: Mapping[str, ir.DataType] = MappingProxyType({}),
) -> Runner | None:
    """Return the part of a model that computes some values in a session; None if they all are fed.

    Args:
        model: the model.
        path: the file that it came from.
        names: the values.
        threads: for onnxruntime, 0 for its own choice.
        given: other tensors that are fed, and their types.
    """
    fed = [str(value.name) for value in model.graph.inputs] + [*given]
    wanted = [name for name in dict.fromkeys(names) if name not in fed]
    if not wanted:
        return None
    graph = ir.convenience.extract(model.graph, fed, wanted)
    for value in graph.inputs:  # an input with a default keeps it
        if value.name in given:
            value.type = ir.TensorType(given[str(value.name)])
            value.shape = None
        default = model.graph.initializers.get(str(value.name))
        if default is not None and str(value.name) not in graph.initializers:
            value.const_value = default.const_value
            graph.initializers.add(value)
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    return start(part, path, threads)


def _open(ort: Any, proto: onnx.ModelProto, options: Any, folder: Path) -> Any:
    if not ort.__version__.startswith("1.20."):
        options.add_session_config_entry(_FOLDER, str(folder))
        return ort.InferenceSession(proto.SerializeToString(), options, providers=_PROVIDERS)
    # This version ignores the entry. It takes absolute paths, from a file; later ones refuse them.
    for tensor in graphs.tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(folder / entry.value)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "model.onnx")
        file.write_bytes(proto.SerializeToString())
        return ort.InferenceSession(str(file), options, providers=_PROVIDERS)
