"""Writes little GGUF files and the few-bit layouts in them, element by element as they are documented."""

from __future__ import annotations

import struct

import numpy as np

KINDS = {"F32": 0, "F16": 1, "TQ1_0": 34, "TQ2_0": 35, "I2_S": 36, "TL1": 38, "Q2_0": 42, "PQ2_0": 142}


def write(path, tensors, metadata=None, version=3, alignment=32):
    """Write a file.

    Args:
        path: of the file.
        tensors: by name: (kind, shape in NumPy's order, bytes).
        metadata: strings and whole numbers by key.
        version: in the header.
        alignment: of tensors.
    """
    pairs = {"general.architecture": "bitnet", **(metadata or {})}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    for key, value in pairs.items():
        head += _string(key)
        if isinstance(value, str):
            head += struct.pack("<I", 8) + _string(value)
        elif isinstance(value, list):
            head += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        else:
            head += struct.pack("<IQ", 10, value)
    body = b""
    for name, (kind, shape, data) in tensors.items():
        body += b"\0" * (-len(body) % alignment)
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", KINDS.get(kind, kind), len(body))
        body += data
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + body)
    return path


def _string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def i2_s(trits, scale):
    """Blocks of 128 elements in 32 bytes, the first quarter in the top bits; then the scale and padding."""
    data = bytearray(trits.size // 4)
    for index, trit in enumerate(trits.reshape(-1)):
        block, element = divmod(index, 128)
        data[32 * block + element % 32] |= int(trit + 1) << 6 - 2 * (element // 32)
    return bytes(data) + struct.pack("<f", scale) + bytes(28)


def tq2_0(codes, scales):
    """Codes (N, K) with a float16 scale for each 256: 64 bytes of codes, then the scale."""
    blocks = []
    for block, scale in zip(codes.reshape(-1, 256), scales.reshape(-1), strict=True):
        data = bytearray(64)
        for element, code in enumerate(block):
            half, rest = divmod(element, 128)
            data[32 * half + rest % 32] |= int(code) << 2 * (rest // 32)
        blocks.append(bytes(data) + np.float16(scale).tobytes())
    return b"".join(blocks)


def tq1_0(codes, scales):
    """Codes (N, K) with a float16 scale for each 256: 48 + 4 bytes of five and four trits, then the scale."""
    blocks = []
    for block, scale in zip(codes.reshape(-1, 256).tolist(), scales.reshape(-1), strict=True):
        fives = [[block[m + 32 * n] for n in range(5)] for m in range(32)]
        fives += [[block[160 + m + 16 * n] for n in range(5)] for m in range(16)]
        fives += [[block[240 + m + 4 * n] for n in range(4)] + [0] for m in range(4)]
        numbers = [sum(code * 3 ** (4 - place) for place, code in enumerate(five)) for five in fives]
        blocks.append(bytes(-(-number * 256 // 243) for number in numbers) + np.float16(scale).tobytes())
    return b"".join(blocks)


def q2_0(codes, scales, size):
    """Codes (N, K) with a float16 scale for each `size`: the scale, then four codes to a byte."""
    blocks = []
    for block, scale in zip(codes.reshape(-1, size), scales.reshape(-1), strict=True):
        data = bytearray(size // 4)
        for element, code in enumerate(block):
            data[element // 4] |= int(code) << 2 * (element % 4)
        blocks.append(np.float16(scale).tobytes() + bytes(data))
    return b"".join(blocks)
