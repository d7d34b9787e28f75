#!/usr/bin/env bash
# Fuzz for about SECONDS (120 without): half of it new examples for tests/test_fuzz.py, half a coverage-guided fuzzer on
# what reads a teacher's answer. What fails is printed; the fuzzer leaves it in .fuzz/ to be tried again. It needs a
# Python that the fuzzer (atheris) has a wheel for.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-120}
. scripts/venv.sh dev .venv-dev
[ -d .fuzz/lib ] || python -m pip install -qq --disable-pip-version-check --target .fuzz/lib "atheris>=3,<4"
end=$((SECONDS + seconds / 2))
until [ "$SECONDS" -ge "$end" ]; do
  FUZZ_EXAMPLES=$((seconds < 600 ? 200 : 1000)) python -m pytest tests/test_fuzz.py -x --timeout 0
done
cd .fuzz
PYTHONPATH=..:lib python ../scripts/fuzz_answers.py answers -max_total_time=$((seconds / 2)) -max_len=800 -timeout=10 \
  -print_final_stats=1
