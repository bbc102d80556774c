"""The binary interface: ext/ops/ort.h against recorded facts, and what the library shows to the world."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_bitnet.runtime import library_path

HEADER = Path(__file__).parents[1] / "ext" / "ops" / "ort.h"

# Word indices in OrtApi, counted in the headers of API 17 to 29.
SLOTS = {
    "CreateStatus": 0,
    "GetErrorCode": 1,
    "GetErrorMessage": 2,
    "CreateCustomOpDomain": 26,
    "CustomOpDomain_Add": 27,
    "AddCustomOpDomain": 28,
    "GetTensorMutableData": 51,
    "CastTypeInfoToTensorInfo": 55,
    "CreateTensorTypeAndShapeInfo": 57,
    "SetTensorElementType": 58,
    "SetDimensions": 59,
    "GetTensorElementType": 60,
    "GetDimensionsCount": 61,
    "GetDimensions": 62,
    "GetSymbolicDimensions": 63,
    "GetTensorShapeElementCount": 64,
    "GetTensorTypeAndShape": 65,
    "KernelInfoGetAttribute_float": 85,
    "KernelInfoGetAttribute_int64": 86,
    "KernelContext_GetInput": 90,
    "KernelContext_GetOutput": 91,
    "ReleaseStatus": 93,
    "ReleaseTypeInfo": 98,
    "ReleaseTensorTypeAndShapeInfo": 99,
    "ReleaseCustomOpDomain": 101,
    "KernelInfo_GetInputTypeInfo": 234,
    "KernelInfo_GetNodeName": 244,
    "KernelInfo_GetLogger": 245,
    "Logger_LogMessage": 247,
    "KernelInfoGetConstantInput_tensor": 249,
    "ShapeInferContext_GetInputTypeShape": 268,
    "ShapeInferContext_GetAttribute": 269,
    "ShapeInferContext_SetOutputTypeShape": 270,
    "SetSymbolicDimensions": 271,
    "ReadOpAttr": 272,
    "KernelContext_ParallelFor": 274,
}

# Fields of OrtCustomOp by word, up to the last that API 17 has.
OP_FIELDS = [
    "version",
    "CreateKernel",
    "GetName",
    "GetExecutionProviderType",
    "GetInputType",
    "GetInputTypeCount",
    "GetOutputType",
    "GetOutputTypeCount",
    "KernelCompute",
    "KernelDestroy",
    "GetInputCharacteristic",
    "GetOutputCharacteristic",
    "GetInputMemoryType",
    "GetVariadicInputMinArity",
    "GetVariadicInputHomogeneity",
    "GetVariadicOutputMinArity",
    "GetVariadicOutputHomogeneity",
    "CreateKernelV2",
    "KernelComputeV2",
    "InferOutputShapeFn",
    "GetStartVersion",
    "GetEndVersion",
]


@pytest.fixture(scope="module")
def header() -> str:
    return HEADER.read_text()


def test_slots_are_the_recorded_ones(header: str):
    rows = re.findall(r"^ORT_FUNCTION\((\d+), (\w+),", header, re.M)
    assert {name: int(slot) for slot, name in rows} == SLOTS
    assert len(rows) == len(SLOTS)


def test_every_slot_is_used():
    sources = "".join(path.read_text() for path in HEADER.parent.glob("*.c"))
    assert [name for name in SLOTS if f"ort_{name}(" not in sources] == []


def test_fields_of_the_op_are_the_recorded_ones(header: str):
    body = re.search(r"struct ort_custom_op \{(.*?)\n\};", header, re.S)
    assert body is not None
    fields = re.findall(r"uint32_t (\w+);|\(ORT_CALL \*(\w+)\)", body[1])
    assert ["".join(field) for field in fields] == OP_FIELDS


def test_op_reads_its_words_at_the_recorded_places(tmp_path: Path):
    """The compiler must agree with the list: word i of the struct is field i."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    lines = [
        f"_Static_assert(offsetof(ort_custom_op, {field}) == {word} * sizeof(void *), {field!r});"
        for word, field in enumerate(OP_FIELDS)
    ]
    lines.append(f'_Static_assert(sizeof(ort_custom_op) == {len(OP_FIELDS)} * sizeof(void *), "size");')
    source = tmp_path / "words.c"
    source.write_text(f'#include "{HEADER}"\n' + "\n".join(lines).replace("'", '"') + "\n")
    subprocess.run([compiler, "-std=c11", "-fsyntax-only", str(source)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="nm and ldd of Linux")
def test_library_exports_one_symbol_and_needs_only_the_c_library():
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(library_path())], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["RegisterCustomOps"]
    needed = subprocess.run(["ldd", str(library_path())], capture_output=True, text=True, check=True).stdout
    names = {Path(line.split()[0]).name.split(".")[0] for line in needed.splitlines()}
    assert names <= {"linux-vdso", "libc", "libm", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}


# A host of our own: a table of functions that does what an old or a strange onnxruntime would do.

CREATE_STATUS = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
GET_ERROR_CODE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
GET_ERROR_MESSAGE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
RELEASE_STATUS = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
GET_API = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
GET_VERSION = ctypes.CFUNCTYPE(ctypes.c_void_p)


class Host:
    """Has API 1 to `newest`; its statuses are numbers, and `code` is what it says of each of them."""

    def __init__(self, newest: int, code: int | None = None) -> None:
        self.statuses: list[tuple[int, bytes]] = []
        self.released: list[int] = []
        self._version = ctypes.create_string_buffer(b"1.2.3")
        self._messages: list[ctypes.Array[ctypes.c_char]] = []
        self._functions = {
            0: CREATE_STATUS(self._create),
            1: GET_ERROR_CODE(lambda status: self.statuses[status - 1][0] if code is None else code),
            2: GET_ERROR_MESSAGE(lambda status: ctypes.addressof(self._messages[status - 1])),
            93: RELEASE_STATUS(self.released.append),
        }
        self._table = (ctypes.c_void_p * 300)()
        for slot, function in self._functions.items():
            self._table[slot] = ctypes.cast(function, ctypes.c_void_p)
        self._base_functions = (
            GET_API(lambda version: ctypes.addressof(self._table) if version <= newest else None),
            GET_VERSION(lambda: ctypes.addressof(self._version)),
        )
        self.base = (ctypes.c_void_p * 2)(
            *(ctypes.cast(f, ctypes.c_void_p).value for f in self._base_functions)
        )

    def _create(self, code: int, message: bytes) -> int:
        self.statuses.append((code, message))
        self._messages.append(ctypes.create_string_buffer(message))
        return len(self.statuses)


def register(host: Host) -> tuple[int, bytes]:
    """Call the entry point; return the code and message of the status that it gives back."""
    entry = ctypes.CDLL(str(library_path())).RegisterCustomOps
    entry.restype = ctypes.c_void_p
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    status = entry(None, ctypes.addressof(host.base))
    assert status is not None
    return host.statuses[status - 1]


def test_onnxruntime_without_api_17_is_told_what_is_missing():
    assert register(Host(newest=16)) == (
        9,
        b"onnx_bitnet needs onnxruntime 1.17 or newer, but this is onnxruntime 1.2.3",
    )


def test_strange_table_of_functions_is_refused():
    host = Host(newest=17, code=3)
    code, message = register(host)
    assert code == 1
    assert message == b"onnx_bitnet: this onnxruntime's table of functions is not the known one"
    assert host.released == [1]  # the probe
