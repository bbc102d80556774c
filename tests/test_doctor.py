"""The doctor finds an installation sound, and says what is not."""

from __future__ import annotations

import pytest

from onnx_bitnet import cache, doctor, runtime
from onnx_bitnet.errors import RuntimeMissing


def by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine()}


def test_this_installation_is_sound():
    assert [check for check in doctor.examine() if not check.ok] == []


def test_a_missing_library_is_reported_beside_the_rest(monkeypatch):
    def missing():
        raise RuntimeMissing("the custom-op library is missing; reinstall onnx-bitnet")

    monkeypatch.setattr(runtime, "library_path", missing)
    checks = by_name()
    assert not checks["op library"].ok
    assert "reinstall" in checks["op library"].found
    assert checks["kernels scalar"].ok


def test_a_wrong_kernel_is_found(monkeypatch):
    matmul = doctor._native.matmul
    monkeypatch.setattr(
        doctor._native,
        "matmul",
        lambda *args, isa, **rest: matmul(*args, isa=isa, **rest) + (isa == "scalar"),
    )
    check = by_name()["kernels scalar"]
    assert not check.ok
    assert "differ from the oracle" in check.found


@pytest.mark.parametrize("text", ["always [madvise] never", "always madvise [never]"])
def test_the_huge_page_setting_is_read(monkeypatch, tmp_path, text):
    (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(doctor, "_HUGE_PAGES", tmp_path / "enabled")
    found = by_name()["huge pages"].found
    assert ("stream faster" in found) is ("[never]" in text)


def test_the_cache_is_named(tmp_path, monkeypatch):
    assert by_name()["cache"].found.startswith("off")
    monkeypatch.setenv("ONNX_BITNET_CACHE", str(tmp_path))
    cache.keep("k", 1)
    assert by_name()["cache"].found.startswith(f"{tmp_path}: 1 measurements")
