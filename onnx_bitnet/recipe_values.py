"""Values in recipes: checked, and read from what people write."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnx_bitnet.errors import RecipeError

_LEAST_SCALE, _LARGEST_SCALE = 1e-30, 1e30
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def to_size(value: int | str | None) -> int | None:
    """Read a number of bytes: 200000000, "200MB" or "190 MiB"."""
    if value is None:
        return None
    match = re.fullmatch(r"([\d.]+) *([KMG]I?)?B?", str(value).upper())
    try:
        if match is None:
            raise ValueError
        size = int(float(match[1]) * _UNITS[match[2] or ""])
        if size < 1:
            raise ValueError
        return size
    except (ValueError, OverflowError):
        raise RecipeError(f"max_size = {value!r} is no size; write bytes, or for example '200MB'") from None


def to_scale(match: str, value: Any) -> float | tuple[float, ...] | None:
    """Check the scale of a rule: a number, or some in a sequence or an array of one axis."""
    if value is None:
        return None
    value = plain(value)
    several = isinstance(value, Sequence) and not isinstance(value, str)
    numbers = [plain(number) for number in value] if several and value else (value,)
    for number in numbers:
        if not is_number(number) or not _LEAST_SCALE <= number <= _LARGEST_SCALE:
            raise RecipeError(f"rule {match!r}: scale {number!r} is no number from 1e-30 to 1e30")
    return tuple(map(float, numbers)) if several else float(value)


def rotation_size(rotation: str) -> int:
    """Return B of `hadamard:B`, and 0 for `none`."""
    if rotation == "none":
        return 0
    match = re.fullmatch(r"hadamard:(\d+)", str(rotation))
    size = int(match[1]) if match else 0
    if not 16 <= size <= 4096 or size & (size - 1):
        raise RecipeError(
            f"rotation {rotation!r} is neither none nor hadamard:B with B a power of two from 16 to 4096"
        )
    return size


_KINDS = {bool: "true or false", str: "a text", int: "a whole number", Mapping: "a table of fields"}


def check_type(what: str, value: object, types: Any) -> None:
    """Raise RecipeError unless a value has one of the types; bool is no int here."""
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        first = types[0] if isinstance(types, tuple) else types
        raise RecipeError(f"{what} = {value!r} is not known; use {_KINDS.get(first, 'a list')}")


def plain(value: Any) -> Any:
    """Return Python's own numbers for those of NumPy, and lists of them for arrays."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_one_of(field: str, value: object, allowed: Sequence[object]) -> None:
    """Raise RecipeError unless a value is one of those allowed."""
    if value not in allowed or isinstance(value, (bool, float)):
        raise RecipeError(
            f"{field} = {value!r} is not known{near(str(value), [str(a) for a in allowed])}; "
            f"use one of {', '.join(str(a) for a in allowed)}"
        )


def near(word: str, known: Sequence[str]) -> str:
    """Return a hint at the known word that is closest, if one is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def near_misses(pattern: str, names: Sequence[str]) -> str:
    """Return which layers come near a pattern that matches none, or how many there are if none does."""
    close = difflib.get_close_matches(pattern.removeprefix("re:").strip("*"), names, n=3, cutoff=0.3)
    return f"near misses: {', '.join(close)}" if close else f"the model has {len(names)} linear layers"
