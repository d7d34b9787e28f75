#!/usr/bin/env bash
# The whole flow on embedded parts: no hub, no account. Further arguments go to gristmill run.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh demo .venv
python scripts/demo_corpus.py data/demo
gristmill run configs/demo.yaml --table "$@"
