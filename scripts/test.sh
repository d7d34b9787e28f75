#!/usr/bin/env bash
# The tests, offline. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev .venv-dev
python -m pytest "$@"
