"""Recipe and Rule: what they accept, and one clear line for what they do not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from onnx_bitnet import recipe_file
from onnx_bitnet.errors import RecipeError
from onnx_bitnet.granularity import block_rows, block_size
from onnx_bitnet.kernels import strongest
from onnx_bitnet.recipe import TARGET_CPUS, Recipe, Rule


def test_defaults_are_those_of_the_design():
    assert Recipe() == Recipe(mode="auto", format="auto", granularity="auto", rounding="auto", planes=1)


def test_to_dict_and_parse_are_inverse():
    recipe = Recipe(
        mode="ternary",
        granularity="block:128",
        rules=[{"match": "*head*", "keep": True}, Rule("re:^enc", overrides={"planes": 2})],
    )
    assert Recipe.parse(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_target_cpu_is_an_instruction_set(monkeypatch):
    isas = Path(__file__).parents[1] / "ext" / "isa.inc"
    if isas.exists():
        names = re.findall(r"^BN_ISA\((\w+)", isas.read_text(), re.MULTILINE)
        assert list(TARGET_CPUS) == ["any", "native", *names]
    assert Recipe(target_cpu="native").target_cpu == strongest()
    monkeypatch.setenv("ONNX_BITNET_ISA", "scalar")
    assert Recipe.parse({"target_cpu": "native"}).to_dict()["target_cpu"] == "scalar"


@pytest.mark.parametrize(
    "written",
    [
        Rule("*head*", action="keep"),
        {"match": "*head*", "action": "keep"},
        {"match": "*head*", "keep": True},
        ("*head*", "keep"),
    ],
)
def test_a_rule_can_be_written_in_four_ways(written):
    assert Recipe(rules=[written]).rules == (Rule("*head*", action="keep"),)


def test_a_rule_takes_overrides_flat_or_nested():
    flat = Rule.parse({"match": "*", "planes": 2, "granularity": "channel"})
    assert flat == Rule.parse(("*", {"planes": 2, "granularity": "channel"}))
    assert flat.overrides == {"planes": 2, "granularity": "channel"}


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (Rule("*attention*"), True),
        (Rule("re:attention/q$"), True),
        (Rule("re:^attention"), False),
        (Rule("attention"), False),
        (Rule(op_type="MatMul"), True),
        (Rule(op_type="Gemm"), False),
        (Rule(min_size=100), True),
        (Rule(min_size=101), False),
        (Rule("*attention*", op_type="Gemm"), False),
    ],
)
def test_a_rule_fits_when_all_its_conditions_hold(rule, fits):
    assert rule.fits("layer.0/attention/q", "MatMul", 100) is fits


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_recipe_file_is_read(tmp_path, suffix):
    text = {
        ".toml": 'mode = "ternary"\nplanes = 2\n[[rules]]\nmatch = "*head*"\nkeep = true\n',
        ".json": '{"mode": "ternary", "planes": 2, "rules": [{"match": "*head*", "keep": true}]}',
    }
    path = tmp_path / f"recipe{suffix}"
    path.write_text(text[suffix])
    assert Recipe.parse(path) == Recipe(mode="ternary", planes=2, rules=[("*head*", "keep")])


def test_equal_recipes_are_one_key_of_a_dict():
    rules = [("*head*", {"planes": 2}), ("*", "int8")]
    assert {Recipe(rules=rules): 1} == {Recipe.parse({"rules": rules}): 1}


@pytest.mark.parametrize("name", ["recipe.toml", "recipe.JSON"])
def test_a_recipe_is_written_as_its_file_is_read(tmp_path, name):
    recipe = Recipe(
        activation_bits=8,
        min_cosine=0.99,
        keep_first=True,
        rules=[
            ('a "b" \\ \x7f \N{GREEK SMALL LETTER PI}\n', "keep"),
            {"match": "*", "op_type": "Gemm", "scale": [1e-5, 2.0]},
            ("*head*", {"planes": 2, "mode": "ternary"}),
            ("re:.*[0-9]", "int8"),
        ],
    )
    path = tmp_path / name
    path.write_text(recipe_file.text(recipe.to_dict(), path), encoding="utf-8")
    assert Recipe.parse(path) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mod": "auto"}, r"unknown recipe key 'mod' \(did you mean 'mode'\?\)"),
        ({"mode": "ternery"}, r"mode = 'ternery' is not known \(did you mean 'ternary'\?\)"),
        ({"format": "tl9"}, "format = 'tl9' is not known"),
        ({"granularity": "block:100"}, "multiple of 16"),
        ({"granularity": "row"}, "granularity 'row' is none of"),
        ({"granularity": "block:2x8"}, "granularity 'block:2x8' is none of"),
        ({"granularity": "block:0x16"}, "granularity 'block:0x16' is none of"),
        ({"granularity": "block:8192x16"}, "at most 65536 weights in a block"),
        ({"scale_type": "fp16"}, "scale_type = 'fp16' is not known"),
        ({"planes": 5}, "planes = 5 is not known.*use one of 1, 2, 3, 4"),
        ({"planes": True}, "planes = True"),
        ({"levels": 5}, "levels = 5"),
        ({"activation_bits": 4}, "activation_bits = 4"),
        ({"rules": [{"mach": "*"}]}, r"unknown key 'mach' in a rule \(did you mean 'match'\?\)"),
        ({"rules": [("*", "drop")]}, "unknown action 'drop'; use one of keep, int4, int8"),
        ({"rules": [("*", {"plans": 2})]}, r"cannot override 'plans' \(did you mean 'planes'\?\)"),
        ({"rules": [("re:(", "keep")]}, "not a regular expression"),
        ({"rules": ["head"]}, "cannot read the rule 'head'"),
        ({"rules": [("fc1", 5)]}, "rule 'fc1': overrides = 5 is not known; use a table of fields"),
        ({"rules": [("fc1", None)]}, "rule 'fc1': overrides = None is not known; use a table of fields"),
        ({"rules": [(5, "keep")]}, "match of a rule = 5 is not known; use a text"),
        ({"rules": [{"scale": [[0.5]]}]}, r"scale \[0.5\] is no number from 1e-30 to 1e30"),
        ({"rules": [{"scale": True}]}, "scale True is no number"),
        ({"max_size": "9" * 400}, "is no size"),
        ({"mode": "lossless", "rules": [("*", "int4")]}, "mode 'lossless' changes no value"),
        ({"target_cpu": "zen5"}, "target_cpu = 'zen5' is not known; use one of any, native, scalar, avx2"),
        ({"taget": "ort"}, "unknown recipe key 'taget' .did you mean 'target'"),
        ({"target": "web"}, "target = 'web' is not known"),
        ({"activation_bits": 8.0}, "activation_bits = 8.0 is not known"),
        ({"keep_first": "yes"}, "keep_first = 'yes' is not known; use true or false"),
        ({"rules": 5}, "rules = 5 is not known; use a list"),
        ({"rules": "*head*"}, r"rules = '\*head\*' is not known; use a list"),
        ({"rules": [{"match": 5, "keep": True}]}, "match of a rule = 5 is not known; use a text"),
        ({"rules": [{"op_type": 5, "keep": True}]}, "op_type = 5 is not known; use a text"),
        ({"rules": [{"min_size": "1k", "keep": True}]}, "min_size = '1k' is not known; use a whole number"),
        (
            {"rules": [{"match": "a", "keep": "yes"}]},
            "keep of a rule = 'yes' is not known; use true or false",
        ),
        ({"rules": [{"overrides": 5}]}, "overrides of a rule = 5 is not known; use a table of fields"),
        ({"min_sqnr": float("inf")}, "min_sqnr = inf is no number"),
        ({"min_metric": float("nan")}, "min_metric = nan is no number"),
        ({"max_size": "0MB"}, "max_size = '0MB' is no size"),
        ({5: 1}, "unknown recipe key 5"),
        (5, "the recipe = 5 is not known; use a table of fields"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fields, message):
    with pytest.raises(RecipeError, match=message) as error:
        Recipe.parse(fields)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.toml", None, "cannot read the recipe"),
        ("bad.toml", "mode = ", "not a valid recipe file"),
        ("bad.json", "[1, 2", "not a valid recipe file"),
        ("list.json", "[1, 2]", "a recipe is a table of fields, this is a list"),
        ("data.npz", "PK\xff\xfe", "it is no UTF-8 text"),
    ],
)
def test_a_bad_recipe_file_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(RecipeError, match=f"{name}: .*{message}"):
        Recipe.parse(tmp_path / name)


def test_numbers_of_numpy_are_numbers():
    rules = [
        {"match": "a", "scale": np.float32(0.5), "min_size": np.int64(8), "planes": np.int8(2)},
        {"match": "b", "scale": np.array([0.5, 2], np.float16)},
        {"match": "c", "scale": [np.float32(0.5), 2]},
        {"match": "d", "scale": np.array(0.5)},
    ]
    recipe = Recipe(
        planes=np.int64(2),
        min_cosine=np.float32(0.5),
        max_size=np.int64(7),
        offset=np.bool_(False),
        rules=rules,
    )
    assert Recipe.parse(json.loads(json.dumps(recipe.to_dict()))) == recipe
    plain = [
        {"match": "a", "scale": 0.5, "min_size": 8, "planes": 2},
        {"match": "b", "scale": (0.5, 2.0)},
        {"match": "c", "scale": (0.5, 2.0)},
        {"match": "d", "scale": 0.5},
    ]
    assert recipe == Recipe(planes=2, min_cosine=0.5, max_size=7, rules=plain)
    assert hash(recipe) == hash(Recipe(planes=2, min_cosine=0.5, max_size=7, rules=plain))
    with pytest.raises(RecipeError, match="rule 'a': scale nan is no number"):
        Rule("a", scale=np.array([1, np.nan]))


def test_block_size_reads_granularity():
    assert block_size("block:128") == 128
    assert block_size("channel") == 0
    assert (block_rows("block:2x16"), block_size("block:2x16")) == (2, 16)
    assert block_rows("block:32") == block_rows("tensor") == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "tl2", "levels": 4},
        {"rules": [("*", {"format": "t5", "levels": 4})]},
        {"rules": [{"match": "*", "action": "int4", "format": "tl1"}]},
    ],
)
def test_ternary_formats_hold_no_fourth_level(fields):
    with pytest.raises(RecipeError, match="holds three levels; use i2s for four, int4 and int8"):
        Recipe(**fields)
