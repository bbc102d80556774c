"""Few-bit neural networks in ONNX Runtime on CPUs: convert, run, validate."""
