#!/usr/bin/env bash
# The tests, offline. Further arguments go to pytest; GRISTMILL_RAY=1 adds those on a Ray cluster, which take minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev .venv-dev
python -m pytest "$@"
