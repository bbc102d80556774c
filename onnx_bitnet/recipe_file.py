"""Recipes as TOML and JSON files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx_bitnet.errors import RecipeError


def read(path: Path) -> dict[str, Any]:
    """Read the fields of a recipe from a `.json` file, or else a TOML file.

    Raises:
        RecipeError: the file is missing, or no such table of fields.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if _is_json(path) else tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a valid recipe file: it is no UTF-8 text") from None
    except ValueError as error:
        raise RecipeError(f"{path}: not a valid recipe file: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: a recipe is a table of fields, this is a {type(value).__name__}")
    return value


def text(fields: Mapping[str, Any], path: Path) -> str:
    """Return what `read` would read back from a file of that name; TOML leaves out what is None."""
    if _is_json(path):
        return json.dumps(fields, indent=2) + "\n"
    return "".join(f"{key} = {_toml(value)}\n" for key, value in fields.items() if value is not None)


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{key} = {_toml(item)}" for key, item in value.items() if item is not None)
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return "[\n" + "".join(f"    {_toml(item)},\n" for item in value) + "]"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    # strings, numbers and truth values are written alike, but for the one control character that JSON allows
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
