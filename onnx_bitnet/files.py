"""Model files: the input checked before it is used, the output there whole or not at all; see outputs.py."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.serde import SerdeError

from onnx_bitnet import graphs
from onnx_bitnet.errors import ModelError, OutputError, one_line
from onnx_bitnet.spill import give_back

# Weights of more bytes than this go to a file of their own, which onnxruntime maps instead of copying.
INLINE_LIMIT = 1 << 20
_PAGE = 4096
# Smaller tensors stay in the model file; the others start on a page, so that they can be mapped.
_EXTERNAL_FROM = 4096
_TENSORS = (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)


@dataclass(frozen=True)
class ModelFile:
    """A model as it was read.

    Args:
        path: the file.
        model: its graph; tensors are mapped from the files when they are asked for.
        data_files: the external data files it refers to.
        nbytes: size of all these files.
        external: the tensors whose bytes are in data files, also those that have left the model since.
    """

    path: Path
    model: ir.Model
    data_files: frozenset[Path]
    nbytes: int
    external: tuple[ir.ExternalTensor, ...] = ()

    def release(self) -> None:
        """Give the memory of mapped tensors back to the system; they are read again where they are used."""
        for tensor in self.external:
            if tensor.raw is not None:
                give_back(tensor.raw)


def read(path: str | Path) -> ModelFile:
    """Read an ONNX model and check that all of its external data is there.

    Raises:
        ModelError: no such file, no ONNX model, or external data missing, truncated or outside the folder.
    """
    path = Path(path)
    try:
        proto = onnx.load(path, load_external_data=False)
        graphs.check_proto(path, proto)
        folder = _data_folder(path, proto)
        with _muted("onnx_ir.serde"):
            model = ir.from_proto(proto)
    except OSError as error:
        raise ModelError(f"{path}: cannot read the model: {one_line(error)}") from None
    except (DecodeError, ValueError, TypeError, KeyError, NotImplementedError, SerdeError) as error:
        raise ModelError(f"{path}: not a valid ONNX model: {one_line(error)}") from None
    for root in graphs.roots(model):
        ir.external_data.set_base_dir(root, folder)
    if model.ir_version == 0 or not model.opset_imports:
        raise ModelError(f"{path}: not an ONNX model: it has no IR version or no opset; export it again")
    graphs.check(path, model)
    external = tuple(external_tensors(model))
    data_files = frozenset(_check_external(path, folder, tensor) for tensor in external)
    nbytes = sum(file.stat().st_size for file in {path, *data_files})
    return ModelFile(path, model, data_files, nbytes, external)


def _data_folder(path: Path, proto: onnx.ModelProto) -> Path:
    """Return the folder that the model's data files are in.

    It is the model's own, but where all are links into another one, as in the cache of Hugging Face, it is
    that, and the model names the files as they are called there.
    """
    folder, store = path.parent.resolve(), path.resolve().parent
    entries = [
        entry for tensor in graphs.tensors(proto) for entry in tensor.external_data if entry.key == "location"
    ]
    files = [(folder / entry.value).resolve() for entry in entries]
    if folder == store or not all(file.is_relative_to(store) for file in files):
        return folder
    for entry, file in zip(entries, files, strict=True):
        entry.value = str(file.relative_to(store))
    return store


@contextmanager
def _muted(name: str) -> Iterator[None]:
    """Keep the warnings of a library to itself, where an error tells the same."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield every tensor of the model, in whatever graph, function or attribute, that is in another file."""
    for graph in _graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for _, attribute in _tensor_attributes(graph):
            yield from (tensor for tensor in _held(attribute) if isinstance(tensor, ir.ExternalTensor))


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    for root in graphs.roots(model):
        yield root
        yield from root.subgraphs()


def _tensor_attributes(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Attr]]:
    for node in graph:
        for attribute in list(node.attributes.values()):
            if attribute.type in _TENSORS and not attribute.is_ref():
                yield node, attribute


def _held(attribute: ir.Attr) -> tuple[ir.TensorProtocol, ...]:
    return (attribute.as_tensor(),) if attribute.type == _TENSORS[0] else tuple(attribute.as_tensors())


def _bring_in(model: ir.Model) -> None:
    """Hold in the model itself what onnx_ir leaves in data files: tensors of attributes and in functions."""
    main = {model.graph, *model.graph.subgraphs()}
    for graph in _graphs(model):
        for value in () if graph in main else graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _in_memory(value.const_value)
        for node, attribute in _tensor_attributes(graph):
            tensors = [_in_memory(tensor) for tensor in _held(attribute)]
            one = attribute.type == _TENSORS[0]
            node.attributes.add(ir.Attr(attribute.name, attribute.type, tensors[0] if one else tensors))


def _in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)


def _check_external(path: Path, folder: Path, tensor: ir.ExternalTensor) -> Path:
    where = f"{path}: tensor {tensor.name!r}"
    file = folder / tensor.location
    if not file.resolve().is_relative_to(folder):
        raise ModelError(f"{where}: its data file {str(tensor.location)!r} is outside the model's folder")
    if not file.is_file():
        raise ModelError(f"{where}: its data file {str(file)!r} is missing; put it beside the model")
    length = tensor.length if tensor.length is not None else tensor.nbytes
    end = (tensor.offset or 0) + length
    status = file.stat()
    if status.st_nlink > 1:
        raise ModelError(
            f"{where}: its data file {str(file)!r} has several hard links, which onnx refuses as a possible "
            "way to read other files; copy it"
        )
    if length != tensor.nbytes:
        raise ModelError(
            f"{where}: {length} bytes of data recorded, its shape {list(tensor.shape)} needs {tensor.nbytes}"
        )
    if end > status.st_size:
        raise ModelError(
            f"{where}: its data file {str(file)!r} is truncated: {status.st_size} bytes, {end} are needed; "
            "copy it again"
        )
    return file


def parts(path: Path) -> Iterator[Path]:
    """Yield a model and its data files, as far as it can be read."""
    yield path
    try:
        proto = onnx.load(path, load_external_data=False)
        folder = _data_folder(path, proto)
    except (OSError, DecodeError, ValueError):
        return
    for tensor in graphs.tensors(proto):
        yield from (folder / entry.value for entry in tensor.external_data if entry.key == "location")


def data_path(output: Path) -> Path:
    """Return the path of the data file that belongs to a model file."""
    return output.with_name(output.name + ".data")


@contextmanager
def staged(model: ir.Model, output: Path, *, between: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Write the model beside its destination, let the caller check it, then move it into place.

    Yields the path of the written model. If the body raises, or the process is interrupted, neither the model
    file nor its data file appears and what was there before stays.

    Args:
        model: to be written; tensors are loaded one at a time.
        output: where to.
        between: called before each tensor that goes to the data file.

    Raises:
        OutputError: the files cannot be written, for instance because the disk is full.
    """
    folder = output.with_name(f".{output.name}.{uuid.uuid4().hex[:12]}")
    try:
        staging = folder / output.name
        _write(model, staging, output, between)
        yield staging
        install(staging, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(staging: Path, output: Path) -> None:
    """Move model and data into place together: if that is interrupted, what was there before comes back."""
    targets = {data_path(staging): data_path(output), staging: output}
    old = staging.parent / "old"
    old.mkdir()
    placed = []
    try:
        for target in targets.values():
            if target.exists():
                target.replace(old / target.name)
        for file, target in targets.items():
            if file.exists():
                placed.append(target)
                file.replace(target)
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        for file in old.iterdir():
            file.replace(output.with_name(file.name))
        raise


def size_of(model: ir.Model, output: Path) -> int:
    """Return how many bytes `staged` would write; the model's tensors become references to nothing."""
    _bring_in(model)
    end, outside = 0, _external(model)
    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or value not in outside:
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.tensor(tensor.numpy(), name=tensor.name)
            continue
        offset = -(-end // _PAGE) * _PAGE
        end = offset + tensor.nbytes
        value.const_value = ir.ExternalTensor(
            data_path(output).name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
        )
    return end + int(ir.to_proto(model).ByteSize())


def _external(model: ir.Model) -> set[ir.Value]:
    """Return the initializers that go to the data file; none if all weights are small."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    sizes = [(value, value.const_value.nbytes) for value in values if value.const_value is not None]
    if sum(nbytes for _, nbytes in sizes) <= INLINE_LIMIT and not any(external_tensors(model)):
        return set()
    return {value for value, nbytes in sizes if nbytes > _EXTERNAL_FROM}


def _write(model: ir.Model, staging: Path, output: Path, between: Callable[[], None]) -> None:
    _bring_in(model)
    external = bool(_external(model)) or any(external_tensors(model))
    try:
        staging.parent.mkdir()
        ir.save(
            model,
            staging,
            format="protobuf",
            external_data=data_path(staging).name if external else None,
            size_threshold_bytes=_EXTERNAL_FROM,
            alignment=_PAGE,
            align_threshold=_EXTERNAL_FROM,
            callback=lambda _tensor, _info: between(),
        )
        for file in staging.parent.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    except OSError as error:
        raise OutputError(f"{output}: cannot write the model: {error.strerror or error}") from None
