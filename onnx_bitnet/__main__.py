"""`python -m onnx_bitnet` is the command `onnx-bitnet`."""

from onnx_bitnet.cli import main

if __name__ == "__main__":
    main()
