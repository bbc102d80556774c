"""Models side by side: what is reported, and what is refused. Never how fast they are."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from chains import K, chain, ordinary, ternary
from commands import run

import onnx_bitnet as bn
from onnx_bitnet.errors import DataError, ModelError, RecipeError, RuntimeMissing
from onnx_bitnet.timing import memory, peers
from onnx_bitnet.timing.bench import bench, in_turns


@pytest.fixture
def model(tmp_path):
    return chain(tmp_path / "model.onnx", {"a": ternary(K), "b": ordinary(8)})


@pytest.fixture
def packed(model):
    path = model.with_name("packed.onnx")
    bn.convert(model, path)
    return path


def test_models_are_timed_and_packed_ops_named(model, packed):
    result = bench([model, packed], threads=1, seconds=0.01, dims={"M": 3})
    assert result.rows == 3
    assert [entry.name for entry in result.models] == [str(model), str(packed)]
    for entry in result.models:
        assert 0 < entry.min_ms <= entry.median_ms
        assert entry.runs >= 3
        assert entry.rows_per_second > 0
    plain, converted = result.models
    assert (plain.packed, plain.packed_share, plain.packed_gbps) == ((), None, None)
    (layer,) = converted.packed
    chosen = {kernel.isa for kernel in bn.kernels() if kernel.chosen and kernel.op == "dot"}
    assert (layer.name, layer.k, layer.m) == ("layer.a", K, result.rows)
    assert layer.isa in chosen
    assert 0 <= converted.packed_share <= 1
    assert converted.packed_gbps > 0
    assert result.read_gbps > 0


def test_the_document_is_complete(model, packed):
    done = run("bench", model, packed, "--json", "--seconds", "0.01", "--threads", "1")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "onnx_bitnet.bench/1"
    assert set(document) == {
        "schema", "cpu", "cpus", "threads", "onnxruntime", "data", "rows", "read_gbps", "models", "notes",
    }  # fmt: skip
    assert set(document["models"][1]) == {
        "name", "nbytes", "min_ms", "median_ms", "runs", "rows_per_second", "memory_bytes",
        "packed_share", "packed", "packed_gbps",
    }  # fmt: skip
    assert set(document["models"][1]["packed"][0]) == {
        "name", "n", "k", "m", "isa", "microseconds", "weight_bytes",
    }  # fmt: skip


def test_the_table_names_models_and_layers(model, packed):
    done = run("bench", model, packed, "--seconds", "0.01", "-v")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "against the first" in done.stdout
    assert "1 packed ops" in done.stdout
    assert "layer.a" in done.stdout


def test_data_decides_the_rows(model, tmp_path):
    np.savez(tmp_path / "data.npz", x=np.ones((7, K), np.float32))
    result = bench([model], tmp_path / "data.npz", threads=1, seconds=0.01)
    assert result.rows == 7
    assert "data.npz" in result.data
    assert result.read_gbps is None


def test_peers_are_made_and_timed(model):
    pytest.importorskip("onnxruntime.quantization")
    result = bench([model], threads=1, seconds=0.01, with_peers=True)
    assert len(result.models) + len(result.notes) == 1 + len(peers.PEERS)
    assert "ORT int8" in [entry.name for entry in result.models]


def test_a_peer_that_cannot_be_made_is_said(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(RuntimeMissing, match=r"ORT int8: onnxruntime\.quantization needs more"):
        peers.write("ORT int8", model, tmp_path / "int8.onnx")


def test_errors(model, tmp_path):
    with pytest.raises(ModelError, match=r"missing\.onnx: cannot read the model"):
        bench([tmp_path / "missing.onnx"])
    with pytest.raises(RecipeError, match="seconds = 0"):
        bench([model], seconds=0)
    other = chain(tmp_path / "other.onnx", {"a": ternary(4, 32)})
    with pytest.raises(DataError, match=r"other\.onnx"):
        bench([model, other], seconds=0.01)


def test_wrong_usage():
    assert run("bench").returncode == 2


def test_turns_are_taken():
    order = []
    times = in_turns([lambda: order.append("a"), lambda: order.append("b")], rounds=2, turn=0.0)
    assert order == ["a", "a", "b", "b"] * 2
    assert [entry.runs for entry in times] == [2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_memory_grows_with_the_batch(model):
    few, many = (memory.peak(model, {"x": np.ones((m, K), np.float32)}, 1) for m in (1, 1 << 18))
    assert many - few > (1 << 18) * K * 4 // 2
    assert memory.peak(model.with_name("missing.onnx"), {}, 1) is None
