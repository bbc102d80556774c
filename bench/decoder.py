"""Times a ternary language model beside llama.cpp on one of the same geometry, both with random weights.

    python bench/decoder.py [--geometry bitnet-2b4t] [--threads 1 2] [--prefill 128 512] [--rounds 3]

In every round each program in turn, in a process of its own, opens its model, reads the longest prompt once,
which brings memory and the rows of the embedding, then a prompt of each length, and generates. The table has
the best round. CPU seconds are those of the whole process: with one thread they are near the time that the
work would take on an idle machine; more threads also spend them on waiting.
llama.cpp is the one in the wheel `xllamacpp`; its files, which the wheel `gguf` writes, have a head of 4 bits
(Q4_0), ours that of --head. The last table says where our time goes, by onnxruntime's profiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import llama_files
import machine
import numpy as np
from timing import print_row, print_table_head

from onnx_bitnet import runtime
from onnx_bitnet.decoder import Generator, Options, build
from onnx_bitnet.decoder.folder import named_architecture

Work = Callable[[int, int], None]


def ours(path: Path, threads: int) -> Work:
    """Open one of our models; the result reads a prompt of n tokens and generates more."""
    generator = Generator(path, threads)
    vocabulary = generator.session.get_outputs()[0].shape[-1]

    def work(n: int, count: int) -> None:
        prompt = np.random.default_rng(n).integers(0, vocabulary, n).tolist()
        for _ in generator.tokens(prompt, count):
            pass

    return work


def llama(path: Path, threads: int) -> Work:
    """The same for a GGUF file, in llama.cpp."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 2048, 1, -1
    server = xllamacpp.Server(parameters)

    def work(n: int, count: int) -> None:
        prompt = [300 + index % 1000 for index in range(n)]
        request = {"prompt": prompt, "n_predict": count, "ignore_eos": True, "cache_prompt": False}
        server.handle_completions(request, lambda _: None)

    return work


def measure(program: str, path: Path, threads: int, prefill: list[int], decode: int) -> dict[str, Any]:
    """Return wall and CPU seconds of the start, of a token of each prompt, and of a generated token."""
    start, cpu = time.perf_counter(), time.process_time()
    work = {"ours": ours, "llama.cpp": llama}[program](path, threads)
    result: dict[str, Any] = {"start": _since(start, cpu)}
    work(max(prefill), 2)
    for n in prefill:
        start, cpu = time.perf_counter(), time.process_time()
        work(n, 1)
        result[f"prefill {n}"] = [seconds / n for seconds in _since(start, cpu)]
    start, cpu = time.perf_counter(), time.process_time()
    work(1, decode)
    result["decode"] = [seconds / decode for seconds in _since(start, cpu)]
    result["resident"] = resident_bytes()
    return result


def resident_bytes() -> int:
    """Return the memory of this process, mapped files included; 0 where the system does not say it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def _since(start: float, cpu: float) -> list[float]:
    return [time.perf_counter() - start, time.process_time() - cpu]


def in_a_process(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", json.dumps([*map(str, arguments[:2]), *arguments[2:]])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the least of each figure, of wall and CPU seconds each by itself."""
    return {name: np.min([run[name] for run in runs], axis=0).tolist() for name in runs[0]}


def where_time_goes(path: Path, prefill: int, decode: int) -> dict[str, tuple[float, Counter[str]]]:
    """Return the milliseconds of a prompt and of the fastest token after it, and those of their ops."""
    with tempfile.TemporaryDirectory() as folder:
        options = runtime.quiet_options()
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "profile"))
        generator = Generator(path, 1, options)
        list(generator.tokens([1] * prefill, decode + 1))
        events = json.loads(Path(generator.session.end_profiling()).read_bytes())
    prompt, *tokens = sorted(
        (event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"]
    )
    found = {}
    for what, run in (
        (f"prefill {prefill}", prompt),
        ("decode", min(tokens, key=lambda event: event["dur"])),
    ):
        spent: Counter[str] = Counter()
        for event in events:
            if event["name"].endswith("_kernel_time") and 0 <= event["ts"] - run["ts"] <= run["dur"]:
                spent[event["args"]["op_name"]] += event["dur"] / 1e3
        found[what] = run["dur"] / 1e3, spent
    return found


def show(results: dict[tuple[str, int], dict[str, Any]]) -> None:
    rows = [name for name in next(iter(results.values())) if name not in ("start", "resident")]
    columns = (f"{name}, tokens/s (per CPU s)" for name in rows)
    print_table_head("program", "threads", "start, s (CPU)", *columns, "MB resident")
    for (program, threads), result in results.items():
        speeds = (f"{1 / result[name][0]:.1f} ({1 / result[name][1]:.1f})" for name in rows)
        print_row(
            program,
            threads,
            f"{result['start'][0]:.1f} ({result['start'][1]:.1f})",
            *speeds,
            round(result["resident"] / 1e6),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", default="bitnet-2b4t", help="a name or a config.json, as for build")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", nargs="+", default=["i2s", "t5"], help="of our packed layers")
    parser.add_argument("--head", nargs="+", default=["packed8", "packed4"])
    parser.add_argument(
        "--types",
        nargs="*",
        choices=list(llama_files.TYPES),
        default=["TQ2_0", "Q4_0"],
        help="of llama.cpp's",
    )
    parser.add_argument("--folder", type=Path, help="where models are kept; default: a temporary one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        program, path, *rest = json.loads(arguments.measure)
        print(json.dumps(measure(program, Path(path), *rest)))
        return

    machine.print_header(machine.describe(arguments.threads))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        models = _models(arguments, folder)
        runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for _ in range(arguments.rounds):
            for threads in arguments.threads:
                for name, (program, path) in models.items():
                    result = in_a_process(program, path, threads, arguments.prefill, arguments.decode)
                    runs.setdefault((name, threads), []).append(result)
        show({key: best(results) for key, results in runs.items()})
        _, first = next(iter(models.values()))
        spent = where_time_goes(first, arguments.prefill[0], 8)
    print()
    print_table_head("op", *(f"{what}: {total:.1f} ms" for what, (total, _) in spent.items()))
    for name, _ in max(spent.values(), key=lambda item: item[0])[1].most_common(8):
        print_row(name, *(f"{ops[name] / total:.1%}" for total, ops in spent.values()))


def _models(arguments: argparse.Namespace, folder: Path) -> dict[str, tuple[str, Path]]:
    """Write what is not there yet; return program and file by name, ours first."""
    architecture = named_architecture(arguments.geometry)
    models = {}
    for form, head in product(arguments.format, arguments.head):
        path = folder / f"{architecture.name}-{form}-{head}"
        if not path.exists():
            build(architecture, path, Options(head=head, format=form))
        models[f"ours, {form}, head {head}"] = "ours", path
    if not (importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("gguf")):
        print("llama.cpp is left out: pip install xllamacpp gguf", file=sys.stderr)
        return models
    for kind in arguments.types:
        path = folder / f"{architecture.name}-{kind}.gguf"
        if not path.exists():
            llama_files.write(path, architecture, kind)
        models[f"llama.cpp {kind}"] = "llama.cpp", path
    return models


if __name__ == "__main__":
    main()
