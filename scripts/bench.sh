#!/usr/bin/env bash
# Measurements; the last line of each is one JSON object.
#   bench.sh train [FILE TEXT_COLUMN LABEL_COLUMN]   60 epochs through a frozen encoder beside gristmill train
#   bench.sh student FOLDER [--sets NAME ...]        a frozen encoder beside TF-IDF, on graded corpora
#   bench.sh score [FILE TEXT_COLUMN]                gristmill score beside other ways to score the same documents
#   bench.sh cascade FOLDER [--sample N]             what score.cascade_keep_share saves, beside hashed n-grams
#   bench.sh next FILE TEXT_COLUMN LABEL_COLUMN ...  two rounds of ratings beside one
#   bench.sh teacher FOLDER [--sample N]             a teacher beside people, on corpora they judged
#   bench.sh tune FOLDER                             what tuning a teacher gains on documents held out
#   bench.sh rate FILE                               the loop written by hand beside the three engines
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  train | student | score | cascade | next | teacher | tune)
    . scripts/venv.sh dev .venv-dev
    python "scripts/bench_$1.py" "${@:2}"
    ;;
  rate)
    . scripts/venv_vllm.sh
    python scripts/bench_rate.py "$VLLM_TEST_MODEL" "${@:2}"
    ;;
  *)
    echo "bench.sh: give what to measure: train [FILE TEXT LABEL], student FOLDER, score [FILE TEXT], cascade FOLDER, next FILE TEXT LABEL, teacher FOLDER, tune FOLDER or rate FILE" >&2
    exit 2
    ;;
esac
