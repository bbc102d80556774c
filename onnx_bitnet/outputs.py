"""What may be written where: never what is read, nor without force what is there."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from onnx_bitnet.errors import OutputError
from onnx_bitnet.files import ModelFile, data_path, parts


def check_output(source: ModelFile, output: Path, *, force: bool) -> None:
    """Raise OutputError if writing `output` would overwrite something it must not, or cannot work."""
    for target in (output, data_path(output)):
        _check_apart(target, (source.path, *source.data_files), "model")
        check_free(target, force=force)
    try:
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise OutputError(
            f"{output}: cannot write into its folder: {error.strerror}; choose another"
        ) from None


def check_free(
    target: Path, *, force: bool, models: Iterable[str | Path] = (), others: Iterable[object] = ()
) -> None:
    """Raise OutputError if a file of this name must not be overwritten, or cannot be.

    Args:
        target: the file.
        force: it may be, unless it is read itself.
        models: models that are read; their data files are, too.
        others: what else is: files and folders of feeds. What is no path is skipped.
    """
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; give the name of a file")
    check_regular(target)
    check_inputs(target, models=models, others=others)
    if target.exists() and not force:
        raise OutputError(f"{target}: exists already; choose another name, or overwrite it with --force")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the folder {str(target.parent)!r} does not exist; create it first")


def check_inputs(target: Path, *, models: Iterable[str | Path] = (), others: Iterable[object] = ()) -> None:
    """Raise OutputError if a file is one of those that are read, see `check_free`."""
    if not target.exists():
        return
    for model in models:
        _check_apart(target, parts(Path(model)), "model")
    for other in others:
        if isinstance(other, (str, Path)):
            _check_apart(target, _feed_files(Path(other)), repr(str(other)))


def check_regular(target: Path) -> None:
    """Raise OutputError if the name is that of a device, pipe or socket, which writing would replace."""
    if target.exists() and not target.is_file():
        raise OutputError(f"{target}: is no regular file; choose another output name")


def check_folder(folder: Path, source: Path) -> None:
    """Raise OutputError if replacing a folder would remove the file or folder that is read."""
    if source.exists() and source.resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"{folder}: holds the input {str(source)!r}; choose another output name")


def _check_apart(target: Path, inputs: Iterable[Path], what: str) -> None:
    if any(target.resolve() == file.resolve() or _same(target, file) for file in inputs):
        raise OutputError(f"{target}: is part of the input {what}; choose another output name")


def _same(target: Path, file: Path) -> bool:
    """Whether both names are there and mean one file, as on disks that ignore case."""
    return target.exists() and file.exists() and target.samefile(file)


def _feed_files(path: Path) -> Iterator[Path]:
    """Yield a file, or those of a folder that are or belong to feeds, see data/feeds.py."""
    yield path
    for folder in (path, *path.glob("test_data_set_*")):
        yield from (file for file in folder.glob("*") if file.suffix in (".npz", ".pb"))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, in the place of an older one.

    Raises:
        OutputError: it cannot be written, or is no regular file.
    """
    check_regular(path)
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        staging.unlink(missing_ok=True)
