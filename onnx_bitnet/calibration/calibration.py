"""Calibration: the statistics of what each linear layer reads, in memory and in a file."""

from __future__ import annotations

import json
import uuid
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnx_bitnet import outputs
from onnx_bitnet.calibration.activations import LayerStatistics
from onnx_bitnet.errors import DataError, OutputError, one_line
from onnx_bitnet.report import named

SCHEMA = "onnx_bitnet.calibration/2"

_SCALARS = (
    "rows",
    "k",
    "min",
    "max",
    "absmax",
    "mean",
    "variance",
    "kurtosis",
    "row_peak",
    "rotated_row_peak",
    "moving_absmax",
    "histogram_range",
)
_ARRAYS = ("histogram", "channel_mean", "channel_absmean", "second_moment")


@dataclass(frozen=True)
class Calibration:
    """What the linear layers of a model read, by layer.

    Args:
        source: path of the float model.
        data: where the feeds came from.
        random_data: no data was given; random feeds tell nothing about real activations.
        samples: number of samples run: rows along the first axis of the first input.
        layers: statistics by layer name, as in the report; layers that read the same value share one object.
        notes: sentences the user should read, such as which layers are out of reach.
    """

    source: str
    data: str
    random_data: bool
    samples: int
    layers: Mapping[str, LayerStatistics] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def warning(self) -> str:
        """A sentence for those who convert by statistics of random feeds; empty if they are of data."""
        said = "these statistics say nothing about real activations; calibrate on data"
        return f"the calibration is one of random feeds: {said}" if self.random_data else ""

    def of(self, layer: str, k: int) -> LayerStatistics | None:
        """Return what is known of a layer that has K inputs, None if nothing.

        Raises:
            DataError: the statistics are those of another K, and so of another model.
        """
        found = self.layers.get(layer)
        if found is not None and found.k != k:
            raise DataError(
                f"layer {layer!r} has {k} inputs, {found.k} in the calibration of {self.source}; "
                "calibrate this model"
            )
        return found

    def check(self, layers: Sequence[str]) -> None:
        """Raise DataError if there are no statistics of any of these layers, and so none of their model."""
        if layers and not any(name in self.layers for name in layers):
            raise DataError(
                f"the calibration of {self.source} has no statistics of {named(layers)}; calibrate this model"
            )

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write everything to an `.npz` file, whole or not at all; an existing calibration is replaced.

        Args:
            path: where to write.
            force: replace an existing file that is no calibration, too, unless it is part of the model.

        Raises:
            OutputError: the file cannot be written, or must not be replaced.
        """
        path = Path(path)
        replaceable = force or not path.exists() or is_calibration(path)
        outputs.check_free(path, force=replaceable, models=(self.source,))
        unique = list({id(item): item for item in self.layers.values()}.values())
        index = {id(item): number for number, item in enumerate(unique)}
        header = {
            "schema": SCHEMA,
            "source": self.source,
            "data": self.data,
            "random_data": self.random_data,
            "samples": self.samples,
            "notes": self.notes,
            "layers": {name: index[id(item)] for name, item in self.layers.items()},
            "statistics": [{name: getattr(item, name) for name in _SCALARS} for item in unique],
        }
        arrays = {
            f"{number}.{name}": getattr(item, name)
            for number, item in enumerate(unique)
            for name in _ARRAYS
            if getattr(item, name) is not None
        }
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        try:
            with temporary.open("wb") as file:
                np.savez(file, header=np.array(json.dumps(header)), **arrays)
            temporary.replace(path)
        except OSError as error:
            raise OutputError(f"{path}: cannot write the calibration: {one_line(error)}") from None
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            DataError: there is no such file, or it is no calibration.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
                header = json.loads(str(archive["header"]))
                if header["schema"] != SCHEMA:
                    raise ValueError(f"its schema is {header['schema']!r}")
                unique = [
                    LayerStatistics(**scalars, **_arrays(archive, number))
                    for number, scalars in enumerate(header["statistics"])
                ]
                layers = {name: unique[number] for name, number in header["layers"].items()}
        except (
            *(OSError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError),
            *(MemoryError, zipfile.BadZipFile, zlib.error),
        ) as error:
            raise DataError(
                f"{path}: cannot be read as a calibration: {one_line(error)}; make it with bn.calibrate"
            ) from None
        return cls(
            header["source"],
            header["data"],
            header["random_data"],
            header["samples"],
            layers,
            tuple(header["notes"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the scalars as one JSON-able document."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "data": self.data,
            "random_data": self.random_data,
            "samples": self.samples,
            "notes": list(self.notes),
            "layers": [
                {"name": name} | {key: getattr(item, key) for key in _SCALARS}
                for name, item in self.layers.items()
            ],
        }


def is_calibration(path: Path) -> bool:
    """Return whether a file looks like one that `Calibration.save` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "header.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _arrays(archive: Mapping[str, np.ndarray], number: int) -> dict[str, Any]:
    keys = {name: f"{number}.{name}" for name in _ARRAYS}
    return {name: archive[key] for name, key in keys.items() if key in archive}
