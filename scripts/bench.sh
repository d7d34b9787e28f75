#!/usr/bin/env bash
# Measurements. bench.sh vllm FILE: the vLLM engine beside the transformers engine on the documents of a parquet file.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  vllm)
    . scripts/venv_vllm.sh
    python scripts/bench_vllm.py "$VLLM_TEST_MODEL" "${@:2}"
    ;;
  *)
    echo "bench.sh: give what to measure: vllm FILE" >&2
    exit 2
    ;;
esac
