"""Commands about language models: write one, and let it write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnx_bitnet import interrupts, outputs
from onnx_bitnet.cli import tables
from onnx_bitnet.cli.common import (
    AsJson,
    Threads,
    err,
    errors,
    finding_room,
    out,
    show,
    shown_progress,
)
from onnx_bitnet.decoder import GEOMETRIES, Generator, Options, Sampling
from onnx_bitnet.decoder import build as build_decoder
from onnx_bitnet.decoder.folder import named_architecture
from onnx_bitnet.errors import RecipeError


def build(
    source: Annotated[
        str, typer.Argument(help="folder of a checkpoint; with --random a geometry", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(help="to write", show_default=False)],
    random: Annotated[
        bool, typer.Option("--random", help="random ternary weights; SOURCE is bitnet-2b4t or a config.json")
    ] = False,
    head: Annotated[str, typer.Option(help="float, int8, int4, packed8 or packed4")] = Options.head,
    embedding: Annotated[str, typer.Option(help="float, int8 or int4")] = Options.embedding,
    format: Annotated[str, typer.Option(help="of ternary weights: i2s, tl1, tl2 or t5")] = Options.format,
    all_logits: Annotated[
        bool, typer.Option("--all-logits", help="logits of every position, not only of the last")
    ] = False,
    attention: Annotated[
        str, typer.Option(help="gqa; or standard, for any runtime: a prompt of 512 takes 16-24 % longer")
    ] = Options.attention,
    layout: Annotated[
        str, typer.Option(help="canonical; or panel, of i2s: opens at once, in mapped memory, for some speed")
    ] = Options.layout,
    linear_class: Annotated[
        str | None, typer.Option(help="bitlinear or autobitlinear, if config.json does not say it")
    ] = None,
    seed: Annotated[int, typer.Option(help="of random weights")] = 0,
    force: Annotated[bool, typer.Option("--force", help="replace the folder")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a ternary language model, ready to generate text, from a Hugging Face checkpoint."""
    with errors(), shown_progress("building") as progress:
        if random and source not in GEOMETRIES:  # a config.json; where a checkpoint is, `build_decoder` looks
            outputs.check_folder(folder, Path(source))
        built = build_decoder(
            named_architecture(source) if random else source,
            folder,
            Options(head, embedding, format, all_logits, attention, layout),
            seed=seed,
            linear_class=linear_class,
            force=force,
            progress=progress,
        )
    show(tables.built_document(built) if as_json else tables.built(built))


def generate(
    model: Annotated[Path, typer.Argument(help="a folder that build has written", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="text to continue")] = None,
    tokens: Annotated[str | None, typer.Option(help="numbers of tokens to continue, instead of text")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="--prompt is a message: answer it, by the model's chat template")
    ] = False,
    count: Annotated[int, typer.Option(help="tokens to generate at most")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time")] = 0.0,
    top_k: Annotated[int, typer.Option(help="draw from so many tokens; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest that have this share")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a text as it comes; the speed goes to stderr."""
    with errors():
        if (prompt is None) == (tokens is None):
            raise RecipeError("give either --prompt or --tokens")
        if chat and prompt is None:
            raise RecipeError("--chat answers a text; give it with --prompt instead of --tokens")
        sampling = Sampling(temperature, top_k, top_p, seed)
        generator = Generator(model, threads)
        if prompt is not None:
            pieces = generator.text(prompt, count, sampling, chat=chat)
        else:
            numbers = _numbers(str(tokens))
            pieces = (f"{token} " for token in generator.tokens(numbers, count, sampling))
        text, interrupted = "", None
        try:
            for piece in pieces:
                text += piece
                if not as_json:
                    with finding_room():
                        out.file.write(piece)
                        out.file.flush()
        except interrupts.Interrupted as signal:
            interrupted = signal
    show(tables.generated_document(text, generator.times) if as_json else [""])
    if interrupted is not None:
        err.print(
            "interrupted; what was generated is above" if text else "interrupted before the first token"
        )
    if not as_json:
        err.print(generator.times.summary(), highlight=False)
    if interrupted is not None:
        interrupted.told = True
        raise interrupted


def _numbers(given: str) -> list[int]:
    try:
        return [int(number) for number in given.replace(",", " ").split()]
    except ValueError:
        raise RecipeError(f"--tokens {given!r}: write whole numbers, for example --tokens '1 2 3'") from None
