"""Run packed models in onnxruntime: find the custom-op library, register it, open sessions."""

from __future__ import annotations

import re
import sys
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_bitnet.arguments import check_threads
from onnx_bitnet.errors import ModelError, RuntimeMissing

if TYPE_CHECKING:
    import onnxruntime

OLDEST = (1, 20)
"""First onnxruntime that is tested; older ones lack NumPy 2 or IR version 10."""

_REGISTERED = "onnx_bitnet.registered"
_SUFFIXES = {"win32": ".dll", "darwin": ".dylib"}
_FATAL = 4
_NOISE = (
    r"\[ONNXRuntimeError\] : \d+ : \w+ : ",
    r"^Load model from .* failed: ?",
    r"^This is an invalid model\. ",
    r"Exception during initialization: ",
    r"/onnxruntime_src/\S+:\d+ ",
)


def library_path() -> Path:
    """Return the custom-op library, for `RegisterCustomOpsLibrary` and its kin in any language.

    Raises:
        RuntimeMissing: the library was not built or not installed.
    """
    path = Path(__file__).with_name(f"libonnx_bitnet{_SUFFIXES.get(sys.platform, '.so')}")
    if not path.is_file():
        raise RuntimeMissing(f"{path}: the custom-op library is missing; reinstall onnx-bitnet")
    return path


def register(options: onnxruntime.SessionOptions) -> None:
    """Make the packed ops known to sessions that are created from these options.

    Registering the same options again does nothing: the options themselves remember it.

    Raises:
        RuntimeMissing: onnxruntime is absent or too old, or it cannot load the library.
    """
    import_onnxruntime()
    if _is_registered(options):
        return
    path = library_path()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:
        raise RuntimeMissing(f"{path}: onnxruntime cannot load it: {ort_message(error)}") from error
    options.add_session_config_entry(_REGISTERED, "1")


def session(
    path: str | PathLike[str],
    threads: int = 0,
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """Open a model on the CPU, packed or not, with the packed ops registered.

    Args:
        path: the model file.
        threads: threads of one operator; 0 leaves it to onnxruntime (one per core) or to `options`.
        options: what else to ask of onnxruntime; the ops are registered on it. Without, onnxruntime
            logs nothing: what goes wrong is raised.

    Raises:
        RuntimeMissing: onnxruntime is absent or too old, or it cannot load the library.
        ModelError: there is no such file, or onnxruntime refuses it.
        RecipeError: threads are no whole number from 0 on.
    """
    check_threads(threads)
    ort = import_onnxruntime()
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file")
    if options is None:
        options = quiet_options()
    if threads:
        options.intra_op_num_threads = threads
    register(options)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"{path}: onnxruntime cannot open it: {ort_message(error)}") from error


def quiet_options() -> onnxruntime.SessionOptions:
    """Return options with which onnxruntime logs nothing: what goes wrong is raised.

    Raises:
        RuntimeMissing: onnxruntime is absent or too old.
    """
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = _FATAL
    return options


def ort_message(error: Exception) -> str:
    """Return what onnxruntime says of an error, without its tags, source positions and line breaks."""
    text = " ".join(str(error).split())
    for noise in _NOISE:
        text = re.sub(noise, "", text)
    return text or type(error).__name__


def import_onnxruntime() -> Any:
    """Return the module, or raise RuntimeMissing if it is absent or too old."""
    oldest = ".".join(map(str, OLDEST))
    way_out = f'pip install "onnxruntime>={oldest}"'
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing(f"onnxruntime cannot be imported ({ort_message(error)}); {way_out}") from error
    version = tuple(int(number) for number in re.findall(r"\d+", onnxruntime.__version__)[:2])
    if version < OLDEST:
        raise RuntimeMissing(f"onnxruntime {onnxruntime.__version__} is older than {oldest}; {way_out}")
    return onnxruntime


def _is_registered(options: onnxruntime.SessionOptions) -> bool:
    try:
        return bool(options.get_session_config_entry(_REGISTERED) == "1")
    except RuntimeError:  # there is no such entry
        return False
