"""Numbers that callers give: whole, and within their range."""

from __future__ import annotations

from numbers import Integral

from onnx_bitnet.errors import RecipeError

_MOST_THREADS = 4096


def is_whole(value: object, least: int, most: int | None = None) -> bool:
    """Whether a value is a whole number in a range, and no truth value."""
    return (
        isinstance(value, Integral)
        and not isinstance(value, bool)
        and least <= int(value)
        and (most is None or int(value) <= most)
    )


def check_whole(what: str, value: object, least: int, most: int | None = None) -> None:
    """Raise RecipeError unless a value is a whole number in a range."""
    if not is_whole(value, least, most):
        end = "on" if most is None else f"to {most}"
        raise RecipeError(f"{what} = {value!r}: give a whole number from {least} {end}")


def check_threads(threads: object) -> None:
    """Raise RecipeError unless onnxruntime can be given so many threads; 0 leaves them to it."""
    check_whole("threads", threads, 0, _MOST_THREADS)
