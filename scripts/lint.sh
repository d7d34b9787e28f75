#!/usr/bin/env bash
# Lint, format and types.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev .venv-dev
ruff check .
ruff format --check .
mypy
