"""Build a decoder into a folder that this package, plain onnxruntime and onnxruntime-genai can run."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_bitnet.arguments import check_whole
from onnx_bitnet.decoder.architecture import GEOMETRIES, Architecture
from onnx_bitnet.decoder.build import ATTENTION, LAYOUTS, Options, write_model
from onnx_bitnet.decoder.source import Checkpoint, Random, Source
from onnx_bitnet.decoder.tokens import BITS, PACKED
from onnx_bitnet.errors import ModelError, OutputError, RecipeError, one_line
from onnx_bitnet.formats import FORMATS
from onnx_bitnet.outputs import check_folder
from onnx_bitnet.report import Progress
from onnx_bitnet.runtime import library_path
from onnx_bitnet.weights import load_weights
from onnx_bitnet.weights.checkpoint import read_config

MODEL, CONFIG = "model.onnx", "genai_config.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Built:
    """What was written.

    Args:
        folder: where.
        architecture: of the model.
        options: it was built with.
        nbytes: of the model and its weights.
        tokenizer: whether the checkpoint had one.
    """

    folder: Path
    architecture: Architecture
    options: Options
    nbytes: int
    tokenizer: bool


def build(
    source: str | Path | Architecture,
    folder: str | Path,
    options: Options | None = None,
    *,
    seed: int = 0,
    linear_class: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Write a text-generation model, its configuration, the op library and the tokenizer to a new folder.

    The folder appears whole or not at all. Memory holds one layer at a time, however large the model is.

    Args:
        source: folder of a Hugging Face checkpoint; or an Architecture, which gets random ternary weights.
        folder: where to write.
        options: what its checkpoint does not say; None for the defaults.
        seed: of random weights.
        linear_class: see load_weights.
        force: replace the folder if it exists.
        progress: called as progress(done, total, what).

    Raises:
        RecipeError: an option does not exist.
        ModelError: the checkpoint is damaged, incomplete, or of an architecture that is not built.
        OutputError: the folder exists, holds the checkpoint, or cannot be written.
    """
    folder, options = Path(folder), options or Options()
    _check(options)
    check_whole("seed", seed, 0)
    if not isinstance(source, Architecture):
        check_folder(folder, Path(source))
    architecture, tensors, files = (
        (source, Random(seed), [])
        if isinstance(source, Architecture)
        else _checkpoint(Path(source), linear_class)
    )
    with _staged(folder, force=force) as staging:
        write_model(staging / MODEL, architecture, tensors, options, progress)
        shutil.copy(library_path(), staging)
        for file in files:
            shutil.copy(file, staging)
        (staging / CONFIG).write_text(json.dumps(_config(architecture, options), indent=2) + "\n")
    nbytes = sum(file.stat().st_size for file in folder.glob(f"{MODEL}*"))
    return Built(folder, architecture, options, nbytes, bool(files))


def named_architecture(name: str) -> Architecture:
    """Return one of GEOMETRIES, or what a config.json describes.

    Raises:
        ModelError: there is neither.
    """
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    path = Path(name)
    config = read_config(path if path.is_dir() else path.parent) if path.exists() else {}
    if not config:
        raise ModelError(f"{name}: neither one of {', '.join(GEOMETRIES)} nor a config.json")
    return Architecture.of(config, name)


def _check(options: Options) -> None:
    for what, chosen, known in (
        ("head", options.head, {**BITS, **PACKED}),
        ("embedding", options.embedding, BITS),
        ("format", options.format, FORMATS),
        ("attention", options.attention, ATTENTION),
        ("layout", options.layout, LAYOUTS),
    ):
        if chosen not in known:
            raise RecipeError(f"{what} {chosen!r} does not exist; use {', '.join(known)}")
    if options.layout == "panel" and options.format != "i2s":
        raise RecipeError(f"layout 'panel' stores i2s codes; leave out format {options.format!r}")
    for what, chosen in (("head", options.head), ("embedding", options.embedding)):
        if options.attention == "standard" and BITS.get(chosen):
            raise RecipeError(
                f"{what} {chosen!r} is an op of onnxruntime's own, which attention 'standard' rules out; use "
                f"float{' or packed8' if what == 'head' else ''}"
            )


def _checkpoint(path: Path, linear_class: str | None) -> tuple[Architecture, Source, list[Path]]:
    weights = load_weights(path, linear_class=linear_class)
    config = weights.metadata
    if not config:
        raise ModelError(f"{path}: has no config.json, which says how the model is built; add it")
    home = path if path.is_dir() else path.parent
    ends = read_config(home, "generation_config.json").get("eos_token_id")  # also those that end an answer
    architecture = Architecture.of(config if ends is None else {**config, "eos_token_id": ends}, str(path))
    master = "quantization_config" in config or config["model_type"] == "bitnet"
    files = [home / name for name in _TOKENIZER if (home / name).is_file()]
    return architecture, Checkpoint(weights, master=master), files


def _config(architecture: Architecture, options: Options) -> dict[str, Any]:
    """Return what onnxruntime-genai wants to know."""
    of = architecture
    decoder = {
        "session_options": {"custom_ops_library": library_path().name, "provider_options": []},
        "filename": MODEL,
        "head_size": of.head_size,
        "hidden_size": of.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": of.heads,
        "num_hidden_layers": of.layers,
        "num_key_value_heads": of.kv_heads,
    }
    # genai ends a text at pad_token_id where there is no eos_token_id
    eos = list(of.eos) if len(of.eos) != 1 else of.eos[0]
    model = {
        "type": "llama",
        "context_length": of.positions,
        "vocab_size": of.vocabulary,
        "bos_token_id": of.bos if of.bos is not None else 0,
        "eos_token_id": eos,
        "pad_token_id": of.eos[0] if of.eos else 0,
        "decoder": decoder,
    }
    in_place = options.attention == "gqa"
    return {
        "model": model,
        "search": {"max_length": of.positions, "past_present_share_buffer": in_place, "do_sample": False},
    }


@contextmanager
def _staged(folder: Path, *, force: bool) -> Iterator[Path]:
    """Give a new folder beside the destination, and move it there if all goes well."""
    if folder.exists() and not force:
        raise OutputError(f"{folder}: exists already; choose another name, or replace it with --force")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give the name of a folder")
    unique = uuid.uuid4().hex[:12]
    staging, old = (folder.with_name(f".{folder.name}.{unique}.{part}") for part in ("new", "old"))
    try:
        staging.mkdir(parents=True)
        yield staging
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write the model: {one_line(error)}") from None
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
