"""What onnxruntime itself offers for a float model: its own quantized variants, made for comparison."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from onnx_bitnet.errors import RuntimeMissing, one_line

BLOCK = 128


def int8(source: Path, target: Path) -> None:
    """Write the model with dynamically quantized int8 products."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def two_bits(source: Path, target: Path) -> None:
    """Write the model with MatMulNBits of 2 bits and int8 activations."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=2, block_size=BLOCK, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


PEERS: dict[str, Callable[[Path, Path], None]] = {"ORT int8": int8, "ORT 2-bit": two_bits}


def write(name: str, source: Path, target: Path) -> None:
    """Write one of PEERS.

    Raises:
        RuntimeMissing: this onnxruntime cannot; the message says why.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # its quantizers' advice
    try:
        PEERS[name](source, target)
    except ImportError as error:
        raise RuntimeMissing(f"{name}: onnxruntime.quantization needs more: {one_line(error)}") from error
    except Exception as error:  # its quantizers raise anything
        raise RuntimeMissing(f"{name}: onnxruntime cannot make it: {one_line(error)}") from error
    finally:
        logging.disable(disabled)
