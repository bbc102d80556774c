"""What can go wrong, said in one line each: what, where, why, and the way out."""

from __future__ import annotations


class BitNetError(Exception):
    """Base of all errors that this package raises on purpose. The message is one line."""

    exit_code = 1


class RecipeError(BitNetError):
    """The recipe or the command line asks for something that does not exist or matches nothing."""

    exit_code = 2


class ModelError(BitNetError):
    """The model file, its external data or one of its weights cannot be used."""


class EvaluationError(ModelError):
    """The constant subgraph that makes a weight cannot be computed."""


class NotFinite(ModelError):
    """Few bits in one layer make a later one's input NaN or infinite."""


class DataError(BitNetError):
    """The feeds do not fit the model's inputs, or the data file cannot be read."""


class OutputError(BitNetError):
    """The output cannot be written, or would overwrite a file."""


class RuntimeMissing(BitNetError):
    """A package that this needs is absent or too old, or onnxruntime cannot load the custom-op library."""


class Refused(BitNetError):
    """A strict conversion met a layer that it cannot pack."""

    exit_code = 4


def one_line(error: BaseException) -> str:
    """Return the message of someone else's error in one line that is not too long."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:300] or type(error).__name__
