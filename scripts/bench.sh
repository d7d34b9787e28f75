#!/usr/bin/env bash
# Measurements; the last line of each is one JSON object.
#   bench.sh train [FILE TEXT_COLUMN LABEL_COLUMN]   60 epochs through a frozen encoder beside gristmill train
#   bench.sh student FOLDER [--sets NAME ...]        a frozen encoder beside TF-IDF, on graded corpora
#   bench.sh next FILE TEXT_COLUMN LABEL_COLUMN ...  two rounds of ratings beside one
#   bench.sh teacher FOLDER [--sample N]             a teacher beside people, on corpora they judged
#   bench.sh vllm FILE                               the vLLM engine beside the transformers engine
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  train | student | next | teacher)
    . scripts/venv.sh dev .venv-dev
    python "scripts/bench_$1.py" "${@:2}"
    ;;
  vllm)
    . scripts/venv_vllm.sh
    python scripts/bench_vllm.py "$VLLM_TEST_MODEL" "${@:2}"
    ;;
  *)
    echo "bench.sh: give what to measure: train [FILE TEXT LABEL], student FOLDER, next FILE TEXT LABEL, teacher FOLDER or vllm FILE" >&2
    exit 2
    ;;
esac
