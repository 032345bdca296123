#!/usr/bin/env bash
# What only a GPU can show, in three parts of a few minutes each, the most telling first:
#
#     bash benchmarks/gpu_check.sh kernels   # the tests that need a GPU: kernels by their names, and what they compute
#     bash benchmarks/gpu_check.sh speed     # a Qwen3-1.7B's shape: training, search, reading and writing, memory
#     bash benchmarks/gpu_check.sh demo      # the demo on CUDA, beside the committed figures of a CPU
#
# GPU names the card in `flashmorph estimate` (default h100), PYTHON the interpreter, OUTPUT where results go (default
# benchmarks/results). Without CUDA `speed` runs at toy size and measures nothing, and the others' tests are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
output=${OUTPUT:-benchmarks/results}

case "${1:-}" in
    kernels) "$python" -m pytest -m gpu -k "not demo" tests/test_gpu.py ;;
    speed) "$python" benchmarks/gpu.py --gpu "${GPU:-h100}" --output "$output/gpu.json" ;;
    demo) FLASHMORPH_GPU_RESULTS="$output" "$python" -m pytest -m gpu -k demo tests/test_gpu.py ;;
    *) sed -n 's/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
