"""Feeds: whatever holds data becomes batches of {input name: array} that are known to fit the model."""

from __future__ import annotations

import dataclasses
import operator
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnx_bitnet.arguments import check_whole
from onnx_bitnet.data.inputs import Batch, Input, check_batch, model_inputs
from onnx_bitnet.data.random_feeds import BATCHES, random_feeds
from onnx_bitnet.errors import DataError, one_line

_WAYS = "give an .npz, a folder of them, ONNX test_data_set_* folders, or an iterable of {input name: array}"


@dataclass(frozen=True)
class Feeds:
    """Batches for a model, read and checked one at a time.

    Iterating again starts from the first batch if the data can be read again: files, lists, random feeds and
    readers with `rewind()` can, generators cannot.

    Args:
        description: a phrase that says where the data comes from.
        random: no data was given, the feeds are random numbers.
        count: number of batches, 0 if it is not known.
        inputs: what the model expects.
        rereadable: iterating again starts from the first batch.
        source: opens the data and yields each batch as it is there, with a label for error messages.
    """

    description: str
    random: bool
    count: int
    inputs: tuple[Input, ...]
    rereadable: bool
    source: Callable[[], Iterator[tuple[str, object]]]

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; see `labelled`."""
        return (batch for _, batch in self.labelled())

    def labelled(self) -> Iterator[tuple[str, Batch]]:
        """Yield the batches, each with its label for error messages.

        Raises:
            DataError: a batch cannot be read or does not fit the model's inputs, or there is none.
        """
        empty = True
        for label, batch in self.source():
            empty = False
            yield label, check_batch(batch, self.inputs, label)
        if empty:
            raise DataError(f"{self.description}: no batches; a generator that was used before has none left")


def open_feeds(
    model: ir.Model, data: object = None, *, seed: int = 0, dims: Mapping[str, int] | None = None
) -> Feeds:
    """Find out what `data` is and prepare to read it.

    Args:
        model: the model to feed.
        data: path of an `.npz` (one batch, its keys are the input names); path of a folder of such files, of
            an ONNX test data set (`input_0.pb`, ... in the order of the model's inputs) or of several
            `test_data_set_*`; a dict (one batch); an iterable of dicts; an object with `get_next()` that
            returns a dict, and None at the end; Feeds; or None for random feeds.
        seed: of the random feeds, which are the same for the same model, seed and dims.
        dims: sizes of symbolic dimensions in random feeds, by name.

    Raises:
        DataError: there is no such file, it is of no known kind, or no random feeds can be made.
        RecipeError: the seed is no whole number from 0 on.
    """
    check_whole("seed", seed, 0)
    inputs = model_inputs(model)
    if isinstance(data, Feeds):
        return dataclasses.replace(data, inputs=inputs)
    if data is None:
        description, batches = random_feeds(model.graph, inputs, seed, dims or {})
        return Feeds(description, True, BATCHES, inputs, True, lambda: _labelled("random feeds", batches()))
    if dims:
        raise DataError(f"dims {sorted(dims)} are sizes for random feeds, but data is given; leave one out")
    description, count, source = _open(data, inputs)
    return Feeds(description, False, count, inputs, _rereadable(data), source)


def _rereadable(data: object) -> bool:
    if callable(getattr(data, "get_next", None)):
        return callable(getattr(data, "rewind", None))
    return isinstance(data, (str, Path, Mapping)) or iter(data) is not data  # type: ignore[call-overload]


_Source = tuple[str, int, Callable[[], Iterator[tuple[str, object]]]]


def _open(data: object, inputs: tuple[Input, ...]) -> _Source:
    if isinstance(data, (str, Path)):
        return _open_path(Path(data), inputs)
    if isinstance(data, Mapping):
        return "one batch given", 1, lambda: iter([("data", data)])
    if callable(getattr(data, "get_next", None)):
        return f"a {type(data).__name__}", 0, lambda: _labelled("data", _read_all(data))
    if isinstance(data, Iterable):
        count = operator.length_hint(data)
        return f"a {type(data).__name__} of batches", count, lambda: _labelled("data", data)
    raise DataError(f"data: a {type(data).__name__} holds no feeds; {_WAYS}")


def _labelled(name: str, batches: Iterable[object]) -> Iterator[tuple[str, object]]:
    for index, batch in enumerate(batches):
        yield f"{name}, batch {index}", batch


def _read_all(reader: Any) -> Iterator[object]:
    if callable(getattr(reader, "rewind", None)):
        reader.rewind()
    while (batch := reader.get_next()) is not None:
        yield batch


def _open_path(path: Path, inputs: tuple[Input, ...]) -> _Source:
    if path.is_file():
        return f"{path}", 1, lambda: iter([(str(path), _read_npz(path))])
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; {_WAYS}")
    sets = [path] if any(path.glob("input_*.pb")) else sorted(path.glob("test_data_set_*"), key=_natural)
    if sets:
        description = f"{len(sets)} ONNX test data set{'s' * (len(sets) > 1)} of {path}"
        return description, len(sets), lambda: ((str(part), _read_set(part, inputs)) for part in sets)
    files = sorted(path.glob("*.npz"), key=_natural)
    if not files:
        raise DataError(f"{path}: the folder has neither .npz files nor ONNX test data sets; {_WAYS}")
    return f"{len(files)} .npz of {path}", len(files), lambda: ((str(f), _read_npz(f)) for f in files)


def _natural(path: Path) -> list[str | int]:
    """Sort key that puts part_10 after part_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _read_npz(path: Path) -> Batch:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        reason = (
            "it is none" if "pickled" in str(error) else one_line(error)
        )  # np.load's word for any other file
        raise DataError(f"{path}: cannot be read as .npz: {reason}; write it with np.savez") from None
    raise DataError(f"{path}: a single array, not an .npz; save it with np.savez(path, input_name=array)")


def _read_set(folder: Path, inputs: tuple[Input, ...]) -> Batch:
    ordered = sorted(inputs, key=lambda item: not item.required)  # stable: initializers go last
    batch = {}
    for path in sorted(folder.glob("input_*.pb"), key=_natural):
        number = path.stem.removeprefix("input_")
        if not number.isdigit() or int(number) >= len(ordered):
            raise DataError(
                f"{path}: the model has no input number {number}, it has {len(ordered)}; remove the file"
            )
        batch[ordered[int(number)].name] = _read_tensor(path)
    return batch


def _read_tensor(path: Path) -> np.ndarray:
    try:
        tensor = onnx.TensorProto.FromString(path.read_bytes())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("its data is in another file")
        array: np.ndarray = onnx.numpy_helper.to_array(tensor)
        return array
    except (OSError, DecodeError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a tensor in ONNX format: {one_line(error)}; write it again") from None
