"""Write messages in the form that a model was trained to answer, by the template of its checkpoint."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_bitnet.errors import ModelError, one_line

_CONFIG, _FILE = "tokenizer_config.json", "chat_template.jinja"


def chat_prompt(folder: Path, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the text that an answer of the model continues; its special tokens are spelled out in it.

    Args:
        folder: of the model, with the files of its tokenizer.
        messages: `role` (system, user, assistant) and `content` of each so far.

    Raises:
        ModelError: the model has no template, it refuses the messages, or the package `jinja2` is missing.
    """
    config = _config(folder / _CONFIG)
    source = _template(folder, config)
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ModelError(
            f"{folder}: its chat template needs a package: pip install 'onnx-bitnet[text]'"
        ) from None
    # As transformers renders them, which templates are written for.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **given: json.dumps(value, ensure_ascii=False, **given)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    special = {name: _text(value) for name, value in config.items() if name.endswith("_token")}
    try:
        template = environment.from_string(source)
        return template.render(messages=list(messages), add_generation_prompt=True, **special)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: its chat template fails: {one_line(error)}") from None


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / _FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str):
        raise ModelError(
            f"{folder}: the model has no chat template (no {_FILE}, none in {_CONFIG}); it was not trained "
            "to chat, or its checkpoint lacks the file: leave out chat and give the whole text"
        )
    return template


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not JSON: {one_line(error)}; download it again") from None
    return config if isinstance(config, dict) else {}


def _text(token: Any) -> Any:
    """Return the text of a special token, which may be written with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _refuse(reason: str) -> None:
    raise ValueError(reason)


def _now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
