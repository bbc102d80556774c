"""The command line's options for a recipe, in one place for all commands that take one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from onnx_bitnet.recipe import Recipe

Given = dict[str, Any]

# The options of every command that takes a recipe: one for each of its fields, and shorthands.
RECIPE_OPTIONS: dict[str, Any] = {
    "recipe": Annotated[Path | None, typer.Option("--recipe", help=".toml or .json; the options below win")],
    "mode": Annotated[str | None, typer.Option(help="auto, lossless or ternary")],
    "format": Annotated[str | None, typer.Option(help="auto, i2s, tl1, tl2 or t5")],
    "target_cpu": Annotated[
        str | None, typer.Option(help="for format auto: any, native, or an instruction set of `kernels`")
    ],
    "layout": Annotated[str | None, typer.Option(help="canonical, or panel: read in place, for low memory")],
    "granularity": Annotated[str | None, typer.Option(help="auto, tensor, channel, block:B or block:RxB")],
    "scale_type": Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16")],
    "rounding": Annotated[
        str | None, typer.Option(help="auto, absmean, twn, mse; with --data weighted or gptq")
    ],
    "planes": Annotated[int | None, typer.Option(help="planes of codes, 1 to 4")],
    "levels": Annotated[int | None, typer.Option(help="3 (ternary), 4, or 9: two planes of one scale")],
    "activation_bits": Annotated[str | None, typer.Option(help="auto, 8, 16 or 32")],
    "rotation": Annotated[str | None, typer.Option(help="none or hadamard:B")],
    "offset": Annotated[bool | None, typer.Option("--offset", help="zero points of blocks are free")],
    "activation_scale": Annotated[
        str | None, typer.Option(help="dynamic, or from data: minmax, percentile, mse, kl, moving-average")
    ],
    "keep": Annotated[
        list[str] | None, typer.Option(help="layers to leave float: a glob, or re: and a regex")
    ],
    "keep_first": Annotated[bool | None, typer.Option("--keep-first", help="leave the first layer float")],
    "keep_last": Annotated[bool | None, typer.Option("--keep-last", help="leave the last layer float")],
    "fuse": Annotated[bool | None, typer.Option("--fuse", help="one op for layers with the same input")],
    "attention": Annotated[str | None, typer.Option(help="auto, fused: one op in float32, or keep")],
    "mask": Annotated[
        str | None,
        typer.Option(help="input that is 0 where --data is padding, which is left out; or none"),
    ],
    "target": Annotated[str | None, typer.Option(help="custom, ort, simulate or float")],
    "min_cosine": Annotated[
        float | None, typer.Option(help="goal: cosine of every output to the float model's")
    ],
    "min_sqnr": Annotated[float | None, typer.Option(help="goal: dB of every output")],
    "min_metric": Annotated[float | None, typer.Option(help="goal: value of --metric")],
    "max_size": Annotated[str | None, typer.Option(help="goal: bytes of the files, or for example 200MB")],
}


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command RECIPE_OPTIONS; what was given comes as its argument `recipe`."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        given = {name: options.pop(name) for name in RECIPE_OPTIONS}
        command(recipe=given, **options)

    own = inspect.signature(command, eval_str=True).parameters
    parameters = [parameter for name, parameter in own.items() if name != "recipe"]
    flags = [parameter for parameter in parameters if parameter.default is not parameter.empty]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in RECIPE_OPTIONS.items()
    ]
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in flags]
    first = [parameter for parameter in parameters if parameter not in flags]
    run.__signature__ = inspect.Signature([*first, *keyword, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *added)}
    return run


def to_recipe(options: Given) -> Recipe:
    """Make a recipe of what was given.

    Raises:
        RecipeError: a value is not legal, or the recipe file cannot be read.
    """
    fields = {field.name for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in options.items() if name in fields and value is not None}
    if str(given.get("activation_bits")).isdecimal():
        given["activation_bits"] = int(given["activation_bits"])
    base = Recipe.parse(options["recipe"])
    kept = tuple((match, "keep") for match in options["keep"] or ())
    return base.replace(rules=(*kept, *base.rules), **given)
