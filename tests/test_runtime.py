"""Finding the library, registering it, opening sessions, and what is said when that fails."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import packed
import pytest

from onnx_bitnet import runtime
from onnx_bitnet.errors import ModelError, RecipeError, RuntimeMissing


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(packed.random_case(0, 8).model(with_function=False), path)
    return path


def test_library_path_is_a_file_beside_the_package():
    path = runtime.library_path()
    assert path.is_file()
    assert path.parent == Path(runtime.__file__).parent


def test_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    with pytest.raises(
        RuntimeMissing, match=r"libonnx_bitnet\S*: the custom-op library is missing; reinstall"
    ):
        runtime.register(ort.SessionOptions())


def test_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(runtime, "library_path", lambda: broken)
    with pytest.raises(RuntimeMissing, match=r"broken\.so: onnxruntime cannot load it: ") as caught:
        runtime.register(ort.SessionOptions())
    assert "\n" not in str(caught.value)


def test_register_twice_is_register_once(model: Path):
    options = ort.SessionOptions()
    runtime.register(options)
    runtime.register(options)
    ort.InferenceSession(str(model), options)
    runtime.register(options)
    ort.InferenceSession(str(model), options)


def test_registering_twice_by_hand_is_why_register_remembers(model: Path):
    options = runtime.quiet_options()
    options.register_custom_ops_library(str(runtime.library_path()))
    options.register_custom_ops_library(str(runtime.library_path()))
    with pytest.raises(Exception, match="already set in registry"):
        ort.InferenceSession(str(model), options)


def test_threads_may_register_at_the_same_time(model: Path):
    def work(_: int) -> list[str]:
        options = ort.SessionOptions()
        runtime.register(options)
        return [value.name for value in ort.InferenceSession(str(model), options).get_outputs()]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(32))) == [["y"]] * 32


def test_session_runs_packed_models(model: Path):
    layer = packed.random_case(0, 8)
    x = packed.rows(0, (3, layer.k))
    session = runtime.session(model, threads=2)
    assert session.get_session_options().intra_op_num_threads == 2
    assert session.get_providers() == ["CPUExecutionProvider"]
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], layer.expected(x))


def test_session_uses_the_options_it_is_given(model: Path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 3
    options.add_session_config_entry("some.key", "some value")
    for _ in range(2):
        session = runtime.session(model, options=options)
        assert session.get_session_options().intra_op_num_threads == 3
        assert session.get_session_options().get_session_config_entry("some.key") == "some value"


@pytest.mark.parametrize("threads", [-1, 1 << 40, "2"])
def test_threads_are_a_number(model: Path, threads):
    with pytest.raises(RecipeError, match=f"threads = {threads!r}: give a whole number from 0 to 4096"):
        runtime.session(model, threads)


def test_session_on_models_without_packed_ops(tmp_path: Path):
    path = tmp_path / "plain.onnx"
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17]> g (float[n] x) => (float[n] y) { y = Relu (x) }'
        ),
        path,
    )
    assert runtime.session(str(path)).run(None, {"x": np.array([-1, 2], np.float32)})[0].tolist() == [0, 2]


def test_file_that_does_not_exist(tmp_path: Path):
    for path in (tmp_path / "nothing.onnx", tmp_path):
        with pytest.raises(ModelError, match="there is no such file"):
            runtime.session(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a" + b"\xff" * 100, b"\0" * 4096])
def test_file_that_is_not_onnx_is_one_line_and_nothing_printed(content: bytes, tmp_path: Path, capfd):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx: onnxruntime cannot open it: ") as caught:
        runtime.session(path)
    assert "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_missing_external_data_is_named(tmp_path: Path):
    path = tmp_path / "model.onnx"
    model = packed.random_case(0, 8).model()
    onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    (tmp_path / "weights.data").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx: .*weights\.data"):
        runtime.session(path)


def test_absent_onnxruntime_says_what_to_install(monkeypatch: pytest.MonkeyPatch, model: Path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        RuntimeMissing, match=r'onnxruntime cannot be imported .*pip install "onnxruntime>=1\.20"'
    ):
        runtime.session(model)


@pytest.mark.parametrize(
    ("version", "old"), [("1.19.2", True), ("0.9", True), ("1.20.0", False), ("2.0.0rc1", False)]
)
def test_too_old_onnxruntime_is_named(version: str, old: bool, monkeypatch: pytest.MonkeyPatch):
    fake = ModuleType("onnxruntime")
    fake.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    if old:
        with pytest.raises(
            RuntimeMissing, match=rf'onnxruntime {version} is older than 1\.20; pip install "'
        ):
            runtime.import_onnxruntime()
    else:
        assert runtime.import_onnxruntime() is fake


def test_the_reason_alone_is_kept_of_an_onnxruntime_error():
    error = RuntimeError(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization:\n  a reason\nin lines"
    )
    assert runtime.ort_message(error) == "a reason in lines"
    assert runtime.ort_message(ValueError()) == "ValueError"
