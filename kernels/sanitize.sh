#!/usr/bin/env bash
# Runs the kernels' GPU tests under compute-sanitizer (CUDA toolkit): out-of-bounds and misaligned accesses, races in
# shared memory, reads of uninitialised memory, misused barriers. Slow: minutes per tool.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
command -v compute-sanitizer >/dev/null || { echo "error: compute-sanitizer is not on PATH (CUDA toolkit)" >&2; exit 2; }
for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=kernel \
        "$python" -m pytest -m gpu -p no:cacheprovider -o timeout=0 tests/kernels/test_gpu.py \
        -k "test_hidden_sizes and (bfloat16 or float16) and (37 or 196 or 784)"
done
