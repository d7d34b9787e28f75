#!/usr/bin/env bash
# The tests of the vLLM engine against a real engine and a real server, on the CPU. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv_vllm.sh
python -m pytest tests/vllm_engine -rs "$@"
