"""Recipe: everything a conversion may be told, as one frozen value."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_bitnet import recipe_file
from onnx_bitnet.data.padding import USUAL
from onnx_bitnet.errors import RecipeError
from onnx_bitnet.granularity import block_size
from onnx_bitnet.kernels import strongest
from onnx_bitnet.recipe_values import (
    check_one_of,
    check_type,
    is_number,
    near,
    plain,
    rotation_size,
    to_scale,
    to_size,
)

MODES = ("auto", "lossless", "ternary")
FORMATS = ("auto", "i2s", "tl1", "tl2", "t5")
_TERNARY_FORMATS = FORMATS[2:]
# The instruction sets of ext/isa.inc, for those who convert on one machine and run on another.
TARGET_CPUS = (
    *("any", "native", "scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512vbmi", "amx"),
    *("neon", "dotprod", "i8mm"),
)
LAYOUTS = ("canonical", "panel")
ROUNDINGS = ("auto", "absmean", "twn", "mse", "weighted", "gptq")
MEASURED_ROUNDINGS = ROUNDINGS[4:]
# "dynamic": each row by its own peak; the others: one step for all rows, from calibration, see ranges.py.
ACTIVATION_SCALES = ("dynamic", "minmax", "percentile", "mse", "kl", "moving-average")
SCALE_TYPES = ("auto", "float32", "float16", "bfloat16")
ATTENTIONS = ("auto", "fused", "keep")
INTEGER_ACTIONS = ("int4", "int8")
FLOAT_ACTIONS = ("fp8e4m3", "fp8e5m2", "fp4e2m1")
ACTIONS = ("keep", *INTEGER_ACTIONS, *FLOAT_ACTIONS)
TARGETS = ("custom", "ort", "simulate", "float")
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "mode": MODES,
    "format": FORMATS,
    "rounding": ROUNDINGS,
    "planes": (1, 2, 3, 4),
    "levels": (3, 4, 9),
    "scale_type": SCALE_TYPES,
    "activation_bits": ("auto", 8, 16, 32),
    "activation_scale": ACTIVATION_SCALES,
}
_GOALS = ("min_cosine", "min_sqnr", "min_metric", "max_size")
_OVERRIDABLE = (
    "mode",
    "format",
    "granularity",
    "scale_type",
    "rounding",
    "planes",
    "levels",
    "activation_bits",
    "activation_scale",
    "rotation",
    "offset",
)


@dataclass(frozen=True)
class Rule:
    """What to do with the layers it matches; the first rule that matches a layer decides.

    A layer matches when every condition that is given holds.

    Args:
        match: glob on the layer name (`*attention*`), or a regular expression after `re:`.
        op_type: ONNX operator the layer was exported as, for example `Gemm`.
        min_size: smallest number of weights.
        action: `keep` leaves the layer float; `int4` and `int8` store 4- or 8-bit codes as planes of i2s;
            `fp8e4m3`, `fp8e5m2` and `fp4e2m1` round to such floats times scales (per output, fp4 in blocks of
            32): with target `simulate`, and 8 bits with `ort`, whose MatMul then computes in float.
        overrides: recipe fields for these layers: mode, format, granularity, scale_type, rounding, planes,
            levels, activation_bits, activation_scale, rotation, offset.
        scale: step between two codes in place of one that is fitted: a positive number for the weight,
            or one for each output. The layers are packed in one plane, or as integers by the action; for
            these it is rounded to 16 significant bits.
    """

    match: str = "*"
    op_type: str | None = None
    min_size: int = 0
    action: str | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    scale: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _make_plain(self)
        check_type("match of a rule", self.match, str)
        check_type(f"rule {self.match!r}: op_type", self.op_type, (str, type(None)))
        check_type(f"rule {self.match!r}: min_size", self.min_size, int)
        check_type(f"rule {self.match!r}: overrides", self.overrides, Mapping)
        overrides = {key: plain(value) for key, value in self.overrides.items()}
        object.__setattr__(self, "overrides", overrides)
        object.__setattr__(self, "scale", to_scale(self.match, self.scale))
        if self.scale is not None and (self.action == "keep" or "granularity" in self.overrides):
            raise RecipeError(f"rule {self.match!r}: a scale goes with neither keep nor a granularity")
        if self.scale is not None and self.action in FLOAT_ACTIONS:
            raise RecipeError(f"rule {self.match!r}: a scale goes with int4 and int8, not with {self.action}")
        if self.action is not None and self.action not in ACTIONS:
            raise RecipeError(
                f"rule {self.match!r}: unknown action {self.action!r}; use one of {', '.join(ACTIONS)}"
            )
        if self.action in INTEGER_ACTIONS:
            check_layer_fields({"levels": 4, "format": self.overrides.get("format", "i2s")})
        for key in self.overrides:
            if key not in _OVERRIDABLE:
                raise RecipeError(f"rule {self.match!r}: cannot override {key!r}{near(key, _OVERRIDABLE)}")
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise RecipeError(f"rule {self.match!r}: not a regular expression: {error}") from None

    def fits(self, name: str, op_type: str, size: int) -> bool:
        """Whether a layer of this name, operator and number of weights is meant."""
        if self.op_type not in (None, op_type) or size < self.min_size:
            return False
        if self.match.startswith("re:"):
            return re.search(self.match[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.match)

    @classmethod
    def parse(cls, value: Rule | Mapping[str, Any] | Sequence[Any]) -> Rule:
        """Read a rule from a dict, or from a pair (match, "keep" | overrides)."""
        if isinstance(value, Rule):
            return value
        if isinstance(value, Mapping):
            known = {f.name for f in dataclasses.fields(cls)}
            given = dict(value)
            keep = given.pop("keep", False)
            check_type("keep of a rule", keep, bool)
            if keep:
                given["action"] = "keep"
            overrides = given.pop("overrides", {})
            check_type("overrides of a rule", overrides, Mapping)
            overrides = {**overrides, **{key: given.pop(key) for key in [*given] if key in _OVERRIDABLE}}
            for key in given:
                if key not in known:
                    raise RecipeError(
                        f"unknown key {key!r} in a rule{near(key, [*known, *_OVERRIDABLE, 'keep'])}"
                    )
            return cls(**given, overrides=overrides)
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            match, what = value
            return cls(match=match, **{"action" if isinstance(what, str) else "overrides": what})
        raise RecipeError(f"cannot read the rule {value!r}; write {{match = '*head*', action = 'keep'}}")


@dataclass(frozen=True)
class Recipe:
    """How a model is converted. Every field has a sensible default; unknown fields are errors.

    Args:
        mode: `auto` converts exactly ternary layers and keeps the others (the report says so);
            `lossless` does the same and nothing else, whatever later versions of `auto` do;
            `ternary` converts every layer, whatever it costs.
        format: canonical weight format in the file. `i2s` loads fastest; `tl2` and `t5` are smaller, `tl1` is
            not, and the three hold ternary codes only. Results are the same. `auto` is i2s, but t5 for layers
            that run better so on the target_cpu, see quantization/format_choice.py.
        target_cpu: the strongest instruction set of the CPU that will run the model, `any` where that is
            open, or `native` for this one's, which the recipe then names. The file runs everywhere.
        layout: `panel` stores i2s codes in the order in which kernels read them, which they then do where the
            file is mapped: a session starts at once and keeps no copy, but runs slower from small pages.
        granularity: what shares a scale: `tensor`, `channel`, `block:128`, or `auto`; in `block:2x16` two
            outputs share what `block:16` has for each, which saves no bytes: the ops have scales by output.
        scale_type: `float32`, `float16` or `bfloat16`; codes are chosen for scales so rounded, which are
            stored as float32, or as float16 where they fit it. `auto` is float16 for blocks, float32
            otherwise. Where a scale is no normal number of the type, or a weight is exactly ternary and a
            scale is not the same in it, all of the layer's are float32.
        rounding: how codes and scales are chosen for weights that are not ternary:
            `absmean` (BitNet b1.58), `twn` (Ternary Weight Networks), `mse` (exact optimum); with calibration
            data also `weighted` (the optimum weighted by how large each input is) and `gptq` (codes make good
            the errors of others, and of earlier layers, as far as the layer's outputs go; the bias their
            mean). `auto` is `gptq` with data and `mse` without.
        planes: 1 to 4 planes of codes, each quantizing what the ones before left over.
        levels: 3 (ternary), 4 (all codes of two bits: -1, 0, 1, 2 times a scale of either sign), or 9 (two
            planes 3 T1 + T2 of one scale).
        activation_bits: 8, 16, 32 (none) or `auto`.
        activation_scale: `dynamic` quantizes each row of activations by its own peak; `minmax`, `percentile`,
            `mse`, `kl` and `moving-average` find one step for all rows from calibration data, see ranges.py.
            32-bit activations have no step.
        rotation: `none`, or `hadamard:B` to store weights in the basis of a Walsh-Hadamard transform in
            blocks of B (a power of two) or what fits: few levels suit that better; it takes one more op for
            each value that layers read.
        offset: levels need not be about 0: each block has a zero point of its own. Four levels, gptq or
            weighted.
        rules: exceptions by layer, see `Rule`; a rule that matches no layer is an error.
        keep_first: leave the first linear layer float.
        keep_last: leave the last linear layer float.
        fuse: let layers that read the same activations, such as q, k and v, be one op and a Split. Results
            are the same bits; docs/speed.md says what it gains.
        attention: `fused` makes the attention of many heads one op in float32, which is faster and holds no
            scores in memory; `keep` leaves the graph's nodes. `auto` is fused where a layer is converted at
            a loss: what is exact keeps the bits of the graph, as far as onnxruntime does.
        mask: the input (batch, sequence) of the model that is 0 where a batch of data is filled up: rows of
            activations there are not calibrated by. `none` counts all rows.
        target: `custom` writes packed ops; `ort` writes the same weights in ops of stock onnxruntime, and
            keeps layers for which it has none; `simulate` writes float weights, quantized and dequantized;
            `float` makes such a model from one that is packed. In the last two, `auto` leaves activations
            float where they are not 8 bits by the model's own will; with `ort` it is 8.
        min_cosine: smallest cosine of every float output to the float model's, from 0 to 1.
        min_sqnr: smallest signal-to-noise ratio of every float output in dB.
        min_metric: smallest value of the user's own metric, which `convert`, `plan` and `sensitivity` take.
        max_size: largest size of the files in bytes, or for example `"200MB"`. With one of these goals,
            mode `auto` chooses what reaches it in the fewest bytes or with the least error.

    >>> Recipe(mode="ternary", granularity="block:128").mode
    'ternary'
    """

    mode: str = "auto"
    format: str = "auto"
    target_cpu: str = "any"
    layout: str = "canonical"
    granularity: str = "auto"
    scale_type: str = "auto"
    rounding: str = "auto"
    planes: int = 1
    levels: int = 3
    activation_bits: int | str = "auto"
    activation_scale: str = "dynamic"
    rotation: str = "none"
    offset: bool = False
    rules: tuple[Rule, ...] = ()
    keep_first: bool = False
    keep_last: bool = False
    fuse: bool = False
    attention: str = "auto"
    mask: str = USUAL
    target: str = "custom"
    min_cosine: float | None = None
    min_sqnr: float | None = None
    min_metric: float | None = None
    max_size: int | str | None = None

    def __post_init__(self) -> None:
        _make_plain(self)
        object.__setattr__(self, "max_size", to_size(self.max_size))
        self._check_goals()
        check_type("rules", self.rules, (list, tuple))
        object.__setattr__(self, "rules", tuple(Rule.parse(rule) for rule in self.rules))
        for field in ("keep_first", "keep_last", "fuse"):
            check_type(field, getattr(self, field), bool)
        check_layer_fields(dataclasses.asdict(self))
        check_one_of("target", self.target, TARGETS)
        check_one_of("layout", self.layout, LAYOUTS)
        check_one_of("attention", self.attention, ATTENTIONS)
        check_one_of("target_cpu", self.target_cpu, TARGET_CPUS)
        if self.target_cpu == "native":
            object.__setattr__(self, "target_cpu", strongest())
        formats = {self.format, *(rule.overrides.get("format") for rule in self.rules)}
        if self.layout == "panel" and formats & set(_TERNARY_FORMATS):
            raise RecipeError("layout 'panel' holds i2s codes only; leave it out, or use format 'i2s'")
        if not isinstance(self.mask, str):
            raise RecipeError(f"mask = {self.mask!r} is no name of an input; use 'none' for none")
        if self.target != "custom" and (self.fuse or self.layout == "panel" or self.attention == "fused"):
            raise RecipeError(f"target {self.target!r} has no ops of ours to fuse or lay out")
        for rule in self.rules:
            check_layer_fields(rule.overrides)
        scales = [self.activation_scale, *(rule.overrides.get("activation_scale") for rule in self.rules)]
        if self.target == "ort" and any(scale not in (None, "dynamic") for scale in scales):
            raise RecipeError("target 'ort' has no static activation scales; leave activation_scale dynamic")
        for rule in self.rules:
            self._check_floats(rule)
            changes = rule.action in (*INTEGER_ACTIONS, *FLOAT_ACTIONS) or "mode" in rule.overrides
            if self.mode == "lossless" and changes:
                raise RecipeError(
                    f"rule {rule.match!r}: mode 'lossless' changes no value; use mode 'auto' with this rule"
                )

    def _check_floats(self, rule: Rule) -> None:
        """Refuse floats for which there is no kernel."""
        if rule.action not in FLOAT_ACTIONS:
            return
        if self.target == "custom":
            raise RecipeError(
                f"rule {rule.match!r}: the packed ops hold no {rule.action}; use int8 or int4, or target "
                "'simulate' or 'ort'"
            )
        if self.target == "ort" and rule.action == "fp4e2m1":
            raise RecipeError(
                f"rule {rule.match!r}: onnxruntime (up to 1.31) has no CPU kernel for fp4e2m1; use int4, or "
                "target 'simulate'"
            )

    def _check_goals(self) -> None:
        for name, most in (("min_cosine", 1.0), ("min_sqnr", math.inf)):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value <= most):
                raise RecipeError(f"{name} = {value!r} is no number above 0{' up to 1' if most == 1 else ''}")
        if self.min_metric is not None and not is_number(self.min_metric):
            raise RecipeError(f"min_metric = {self.min_metric!r} is no number")
        if self.has_goals and self.mode != "auto":
            raise RecipeError(f"mode {self.mode!r} has nothing to choose; use 'auto' with goals")
        if self.has_goals and self.target == "float":
            raise RecipeError(f"target 'float' has nothing to choose; leave out {', '.join(_GOALS)}")

    @property
    def has_goals(self) -> bool:
        """Whether there is something for the planner to reach."""
        return any(getattr(self, goal) is not None for goal in _GOALS)

    def without_goals(self) -> Recipe:
        """Return a copy that only says what to do."""
        return self.replace(**dict.fromkeys(_GOALS))

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values; `Recipe.parse` reads them back to an equal recipe."""
        return dataclasses.asdict(self) | {
            "rules": [dataclasses.asdict(rule) for rule in self.rules],
        }

    @classmethod
    def parse(cls, value: Recipe | Mapping[str, Any] | str | Path | None) -> Recipe:
        """Read a recipe from a dict, or from a `.toml` or `.json` file.

        Raises:
            RecipeError: the file is missing or not TOML/JSON, or a key or value is unknown.
        """
        if value is None:
            return cls()
        if isinstance(value, Recipe):
            return value
        if isinstance(value, (str, Path)):
            value = recipe_file.read(Path(value))
        check_type("the recipe", value, Mapping)
        known = [field.name for field in dataclasses.fields(cls)]
        for key in value:
            if key not in known:
                raise RecipeError(f"unknown recipe key {key!r}{near(str(key), known)}")
        return cls(**value)


def _make_plain(value: Rule | Recipe) -> None:
    """Put Python's own numbers in the place of NumPy's, which no file could hold."""
    for field in dataclasses.fields(value):
        object.__setattr__(value, field.name, plain(getattr(value, field.name)))


def check_layer_fields(fields: Mapping[str, Any]) -> None:
    """Raise RecipeError unless the values of the per-layer fields present are legal."""
    for field, allowed in _CHOICES.items():
        if field in fields:
            check_one_of(field, fields[field], allowed)
    four = fields.get("levels") == 4 or fields.get("offset") is True
    if four and fields.get("format") in _TERNARY_FORMATS:
        raise RecipeError(f"format {fields['format']!r} holds three levels; use i2s for four, int4 and int8")
    planes = fields.get("planes", 1)
    if (fields.get("offset") is True and planes > 1) or (fields.get("levels") == 9 and planes > 2):
        raise RecipeError("levels = 9 are two planes already, and offset is for one; leave planes out")
    if "rotation" in fields:
        rotation_size(fields["rotation"])
    if "offset" in fields:
        check_type("offset", fields["offset"], bool)
    if "granularity" in fields:
        block_size(fields["granularity"])
