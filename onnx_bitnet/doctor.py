"""Examine an installation: the first thing to run, and to attach to a bug report."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_bitnet import _native, cache, reference, runtime
from onnx_bitnet.errors import BitNetError, RuntimeMissing
from onnx_bitnet.rewrite.functions import DOMAIN, FUNCTIONS, VERSION

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_OPSET = 18


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Args:
        name: what it is.
        ok: whether it is as it should be.
        found: what was seen, or what is wrong and the way out.
    """

    name: str
    ok: bool
    found: str


@dataclass(frozen=True)
class _Sample:
    """A small layer with ragged edges: float32 x (5, K), its packed weight and what must come out."""

    x: np.ndarray
    weight: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bias: np.ndarray
    k: int
    block_size: int
    activation_bits: int

    @property
    def expected(self) -> np.ndarray:
        return reference.matmul(
            self.x,
            self.weight,
            self.scale,
            self.zero_point,
            self.bias,
            k=self.k,
            block_size=self.block_size,
            activation_bits=self.activation_bits,
        )


def examine() -> list[Check]:
    """Look at everything that has to work; one failure does not hide the others."""
    isas = [name for name, runs_here in _native.isas() if runs_here]
    return [
        Check("versions", True, _versions()),
        Check("machine", True, f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"),
        _check("instruction sets", _instruction_sets),
        _check("self-check", _self_check),
        *(_check(f"kernels {isa}", partial(_kernels, isa)) for isa in isas),
        _check("op library", lambda: str(runtime.library_path())),
        _check("op in onnxruntime", _session),
        Check("huge pages", True, _huge_pages()),
        Check("cache", True, _cache()),
    ]


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (BitNetError, ValueError) as error:
        return Check(name, False, str(error))


def _versions() -> str:
    packages = ("onnx-bitnet", "onnxruntime", "onnx", "onnx-ir", "numpy")
    return ", ".join(f"{name} {version(name)}" for name in packages)


def _instruction_sets() -> str:
    compiled = ", ".join(f"{name}{'' if here else ' (not here)'}" for name, here in _native.isas())
    return f"compiled: {compiled}; used up to {_native.allowed_isas()[-1]}"


def _self_check() -> str:
    wrong = _native.wrong_isas()
    if wrong:
        raise ValueError(
            f"wrong results from {', '.join(wrong)}, which is not used; please report this machine"
        )
    return "all instruction sets equal the scalar code"


def _samples() -> list[_Sample]:
    rng = np.random.default_rng(0)
    n, k, block_size, planes = 70, 200, 64, 2
    groups = -(-k // block_size)
    codes = rng.integers(0, 4, (planes, n, k), dtype=np.uint8)
    return [
        _Sample(
            x=rng.standard_normal((5, k), dtype=np.float32),
            weight=reference.pack_i2s(codes),
            scale=rng.standard_normal((planes, n, groups), dtype=np.float32),
            zero_point=np.full((planes, n, groups), 1.5, np.float32),
            bias=rng.standard_normal(n, dtype=np.float32),
            k=k,
            block_size=block_size,
            activation_bits=bits,
        )
        for bits in (8, 16)
    ]


def _kernels(isa: str) -> str:
    for sample in _samples():
        got = _native.matmul(
            sample.x,
            sample.weight,
            sample.scale,
            sample.zero_point,
            sample.bias,
            k=sample.k,
            block_size=sample.block_size,
            activation_bits=sample.activation_bits,
            isa=isa,
        )
        if not np.array_equal(got, sample.expected):
            raise ValueError(
                f"results differ from the oracle; set ONNX_BITNET_ISA to a weaker one than {isa}"
            )
    return "bit for bit equal to the oracle"


def _session() -> str:
    ort = runtime.import_onnxruntime()
    options = runtime.quiet_options()
    runtime.register(options)
    for sample in _samples():
        try:
            session = ort.InferenceSession(_model(sample), options, providers=["CPUExecutionProvider"])
            (got,) = session.run(None, {"x": sample.x})
        except Exception as error:
            raise RuntimeMissing(f"onnxruntime {ort.__version__}: {runtime.ort_message(error)}") from error
        if not np.array_equal(got, sample.expected):
            raise ValueError("results differ from the oracle")
    return f"onnxruntime {ort.__version__}: bit for bit equal to the oracle"


def _model(sample: _Sample) -> bytes:
    """Return a model that is nothing but the sample's layer."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["M", sample.k])
    constants = []
    for name in ("weight", "scale", "zero_point", "bias"):
        tensor = ir.tensor(getattr(sample, name), name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        constants.append(ir.Value(name=name, type=kind, shape=shape, const_value=tensor))
    attributes = {
        "K": sample.k,
        "N": sample.weight.shape[1],
        "block_size": sample.block_size,
        "activation_bits": sample.activation_bits,
        "activation_scale": 0.0,
    }
    node = ir.node("MatMulI2S", [x, *constants], attributes, domain=DOMAIN)
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x],
        [y],
        nodes=[node],
        initializers=constants,
        opset_imports={"": _OPSET, DOMAIN: VERSION},
        name="sample",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=8, functions=[FUNCTIONS["MatMulI2S"](_OPSET)]))
    return bytes(model.SerializeToString())


def _huge_pages() -> str:
    if not _HUGE_PAGES.exists():
        return "not known on this system"
    setting = _HUGE_PAGES.read_text(encoding="ascii").split("[")[-1].split("]")[0]
    advice = "; weights stream faster with madvise or always" if setting == "never" else ""
    return f"transparent huge pages: {setting}{advice}"


def _cache() -> str:
    place = cache.folder()
    if place is None:
        return "off: what planning measures is not kept"
    sizes = [file.stat().st_size for file in place.glob("*.json")]
    return f"{place}: {len(sizes)} measurements of planning in {sum(sizes) / 1e6:.1f} MB; may be deleted"
