"""The command line: results on stdout, errors on stderr in one line, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
import onnx
import pytest
import typer
from chains import K, chain, ordinary, ternary
from commands import run

from onnx_bitnet.cli import app


@pytest.fixture
def model(tmp_path):
    return chain(tmp_path / "model.onnx", {"a": ternary(K), "b": ordinary(8)})


@pytest.fixture
def packed(model):
    assert run("convert", model).returncode == 0
    return model.with_name("model.bitnet.onnx")


def test_convert_names_its_output_and_sums_up(model):
    done = run("convert", model)
    assert done.returncode == 0
    assert model.with_name("model.bitnet.onnx").exists()
    assert "lossless: 1 of 2 linear layers packed" in done.stdout
    assert "[not-ternary]" in done.stdout
    assert done.stderr == ""


def test_json_is_one_document(model, packed):
    for arguments, schema in (
        (("plan", model), "report"),
        (("convert", model, "--force"), "report"),
        (("inspect", packed), "inspection"),
        (("validate", model, packed), "validation"),
        (("kernels",), "kernels"),
        (("doctor",), "doctor"),
    ):
        done = run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["schema"] == f"onnx_bitnet.{schema}/1"


def test_options_win_over_the_recipe_file(model, tmp_path):
    (tmp_path / "recipe.toml").write_text('mode = "ternary"\nplanes = 2\n')
    options = ("--planes", "3", "--activation-bits", "8", "--keep", "*.a", "--keep-last")
    done = run("plan", model, "--recipe", tmp_path / "recipe.toml", *options, "--json")
    recipe = json.loads(done.stdout)["recipe"]
    assert (recipe["mode"], recipe["planes"], recipe["activation_bits"]) == ("ternary", 3, 8)
    assert recipe["keep_last"]
    assert recipe["rules"][0]["match"] == "*.a"


def test_verbose_shows_every_layer(model):
    assert "layer.b" not in run("convert", model).stdout
    assert "layer.b" in run("convert", model, "--force", "-v").stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_results_that_find_no_room_are_one_error(model, options):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "onnx_bitnet", "plan", str(model), *options]
        env = os.environ | {"PYTHONUNBUFFERED": ""}  # as it is in most shells: Python itself flushes last
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=env)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the results: No space left on device\n"


def test_without_stdout_a_command_does_its_work(model):
    command = f"{sys.executable} -m onnx_bitnet convert {model} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert model.with_name("model.bitnet.onnx").exists()


def test_version():
    assert run("--version").stdout == f"{version('onnx-bitnet')}\n"


@pytest.mark.parametrize("name", ["recipe.toml", "recipe.json"])
def test_the_recipe_of_sensitivity_converts(model, tmp_path, name):
    recipe = tmp_path / name
    assert run("sensitivity", model, "-o", recipe).returncode == 0
    done = run("convert", model, "--recipe", recipe, "--json")
    assert json.loads(done.stdout)["converted"] == 2, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "model.onnx", "there"),
        ("calibrate", "model.onnx", "there"),
        ("sensitivity", "model.onnx", "-o", "there"),
        ("plan", "model.onnx", "--min-cosine", "0.9", "--plot", "there"),
        ("validate", "model.onnx", "model.onnx", "--html", "there"),
        ("validate", "model.onnx", "model.onnx", "--csv", "there"),
    ],
)
def test_what_is_there_is_overwritten_only_with_force(model, arguments):
    there = model.with_name("there")
    there.write_text("old")
    done = run(*arguments, cwd=model.parent)
    assert (done.returncode, done.stdout) == (1, "")
    assert "there: exists already" in done.stderr
    assert there.read_text() == "old"


# By command: what it writes over if it is let, and the file which that is.
OVER_INPUTS = {
    "convert": [
        ("model.onnx model.onnx", "model.onnx"),
        ("model.onnx feeds.npz --data feeds.npz", "feeds.npz"),
        ("model.onnx recipe.toml --recipe recipe.toml", "recipe.toml"),
        ("model.onnx metric.py --min-metric 1 --data feeds.npz --metric metric.py:count", "metric.py"),
        ("model.onnx feeds --data feeds.data", "feeds.data"),
    ],
    "plan": [
        ("model.onnx --max-size 1MB --plot drawn.svg --recipe drawn.svg", "drawn.svg"),
        ("model.onnx --max-size 1MB --plot model.onnx", "model.onnx"),
    ],
    "sensitivity": [
        ("model.onnx -o model.onnx", "model.onnx"),
        ("model.onnx -o folder/feeds.npz --data folder", "folder/feeds.npz"),
        ("model.onnx -o recipe.toml --recipe recipe.toml", "recipe.toml"),
        ("model.onnx -o metric.py --metric metric.py:count", "metric.py"),
    ],
    "calibrate": [
        ("model.onnx model.onnx", "model.onnx"),
        ("apart.onnx apart.weights", "apart.weights"),
        ("model.onnx feeds.npz --data feeds.npz", "feeds.npz"),
        ("model.onnx folder/feeds.npz --data folder", "folder/feeds.npz"),
    ],
    "validate": [
        ("model.onnx model.onnx --html model.onnx", "model.onnx"),
        ("model.onnx other.onnx --csv other.onnx", "other.onnx"),
        ("model.onnx apart.onnx --csv apart.weights", "apart.weights"),
        ("model.onnx model.onnx --data feeds.npz --csv feeds.npz", "feeds.npz"),
        ("model.onnx model.onnx --html page.html --frontier page.html", "page.html"),
        ("model.onnx model.onnx --metric metric.py:count --csv metric.py", "metric.py"),
    ],
    "build": [
        ("folder folder", "folder/feeds.npz"),
        ("folder/inner folder", "folder/feeds.npz"),
        ("--random folder/config.json folder", "folder/config.json"),
    ],
}


@pytest.fixture
def inputs(model):
    """A folder with everything that a command can read."""
    folder = model.parent
    (folder / "other.onnx").write_bytes(model.read_bytes())
    external = {"save_as_external_data": True, "location": "apart.weights", "size_threshold": 0}
    onnx.save(onnx.load(model), folder / "apart.onnx", **external)
    (folder / "folder" / "inner").mkdir(parents=True)
    for name in ("feeds.npz", "folder/feeds.npz"):
        np.savez(folder / name, x=np.ones((2, K), np.float32))
    (folder / "feeds.npz").with_suffix(".data").write_bytes((folder / "feeds.npz").read_bytes())
    (folder / "recipe.toml").write_text("")
    (folder / "drawn.svg").write_text("")
    (folder / "metric.py").write_text("def count(batches, outputs):\n    return len(batches)\n")
    (folder / "page.html").write_text('{"frontier": []}')
    for name in ("folder/config.json", "folder/inner/config.json"):
        (folder / name).write_text("{}")
    return folder


def test_every_command_that_writes_is_tried_on_its_inputs():
    commands = typer.main.get_command(app).commands.items()
    writing = {name for name, command in commands if any(item.name == "force" for item in command.params)}
    assert writing == set(OVER_INPUTS)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((command, *given.split()), name) for command, cases in OVER_INPUTS.items() for given, name in cases],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_inputs_are_not_overwritten_even_with_force(inputs, arguments, name):
    before = (inputs / name).read_bytes()
    done = run(*arguments, "--force", cwd=inputs)
    assert (done.returncode, done.stdout) == (1, "")
    said = "error: .*: (is part of|holds) the input .*; choose another output name\n"
    assert re.fullmatch(said, done.stderr), done.stderr
    assert (inputs / name).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("convert", "missing.onnx"), 1, "missing.onnx: cannot read the model"),
        (("convert", "model.onnx", "--mode", "fast"), 2, "mode = 'fast' is not known"),
        (("convert", "model.onnx", "--activation-bits", "many"), 2, "activation_bits = 'many'"),
        (("convert", "model.onnx", "--keep", "nothing"), 2, "rule 'nothing' matches no layer"),
        (("convert", "model.onnx", "--recipe", "no.toml"), 2, "no.toml: cannot read the recipe"),
        (("convert", "model.onnx", "model.onnx", "--force"), 1, "is part of the input model"),
        (("convert", "model.onnx", "--strict"), 4, "strict: 1 of 2 layers are refused"),
        (("inspect", "missing.onnx"), 1, "missing.onnx: cannot read the model"),
        (("calibrate", "model.onnx", "no/out.npz"), 1, "no/out.npz: the folder 'no' does not exist"),
        (("sensitivity", "model.onnx", "-o", "no/r.toml"), 1, "no/r.toml: the folder 'no' does not exist"),
        (("validate", "model.onnx", "missing.onnx"), 1, "missing.onnx: cannot read the model"),
        (("validate", "model.onnx", "model.onnx", "--data", "no.npz"), 1, "no.npz"),
        (("validate", "model.onnx", "model.onnx", "--dim", "batch"), 2, "write NAME=SIZE"),
        (("plan", "missing.onnx", "--max-size", "1MB", "--plot", "x.onnx"), 1, "a plot is .svg or .png"),
        (("plan", "missing.onnx", "--plot", "x.svg"), 2, "--plot draws the frontier of a goal"),
        (
            ("validate", *("missing.onnx",) * 2, "--frontier", "no.json"),
            1,
            "no.json: cannot be read as a rep",
        ),
        (("sensitivity", "model.onnx", "--method", "output"), 2, "did you mean 'outputs'?"),
        (("plan", "model.onnx", "--metric", "metric.py"), 1, "'metric.py': names no function; write FILE"),
        (("plan", "model.onnx", "--max-size", "9" * 400), 2, "is no size"),
        (
            ("calibrate", "model.onnx", "--max-memory", "-5"),
            2,
            "--max-memory = -5: give a whole number from 1",
        ),
        (("calibrate", "model.onnx", "--max-samples", "-1"), 1, "max_samples is -1; give at least 1"),
        (("bench", "model.onnx", "--seconds", "inf"), 2, "seconds = inf"),
        *(
            ((*command, option, given), 2, f"{option[2:]} = {given}: give a whole number from 0")
            for command in (
                ("calibrate", "model.onnx"),
                ("validate", "model.onnx", "model.onnx"),
                ("bench", "model.onnx"),
            )
            for option, given in (("--seed", "-1"), ("--threads", "-1"), ("--threads", "99999999999"))
        ),
        *(
            (
                ("calibrate", "model.onnx", "--dim", f"M={size}"),
                1,
                "do not fit into memory; give smaller dims",
            )
            for size in (10**15, 10**17, 10**20)
        ),
    ],
)
def test_errors_are_one_line_and_an_exit_code(model, arguments, code, message):
    model.with_name("metric.py").write_text("")
    done = run(*arguments, cwd=model.parent)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_usage_exits_with_2():
    assert run("convert").returncode == 2
    assert run("nonsense").returncode == 2
    assert run("convert", "a", "--nonsense").returncode == 2


def test_gates_exit_with_3(model, packed, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((2, K), np.float32))
    command = ("validate", model, packed, "--data", tmp_path / "data.npz")
    assert run(*command, "--min-sqnr", "40", "--min-cosine", "0.99").returncode == 0
    failed = run(*command, "--min-sqnr", "300")
    assert failed.returncode == 3
    assert failed.stderr.startswith("gate failed: output 'b.y': SQNR")


def test_an_unknown_instruction_set_is_said(monkeypatch):
    monkeypatch.setenv("ONNX_BITNET_ISA", "mmx")
    done = run("kernels")
    assert done.returncode == 2
    assert "ONNX_BITNET_ISA=mmx: not an instruction set that runs here; use scalar" in done.stderr
    assert run("doctor").returncode == 1


def test_an_interrupt_leaves_nothing(tmp_path):
    source = chain(tmp_path / "in.onnx", {f"w{i}": ordinary(1024, 1024, seed=i) for i in range(24)})
    command = [
        sys.executable,
        "-m",
        "onnx_bitnet",
        "convert",
        source,
        tmp_path / "out.onnx",
        "--mode",
        "ternary",
    ]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        deadline = time.monotonic() + 60
        while (
            not list(tmp_path.glob(".out.onnx.*")) and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == code, error
        assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_an_interrupt_that_a_library_turned_into_an_error_is_still_one():
    program = f"""
import signal, sys
import onnx_bitnet
from onnx_bitnet import cli
def interrupted():
    try:
        signal.raise_signal({signal.SIGTERM})
    except BaseException:
        raise TypeError("as numpy's tofile says when a signal comes while it looks at its argument") from None
onnx_bitnet.kernels = interrupted
sys.argv = ["onnx-bitnet", "kernels"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "interrupted; nothing was written\n")
