#!/usr/bin/env bash
# Millions of tiny documents through sample, score and filter: memory over time, time per document, resume after a
# kill. load.sh [DOCUMENTS [FOLDER]]; two million take some GB of disk, which is given back unless FOLDER is given.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev .venv-dev
folder=${2:-$(mktemp -d)}
[ -n "${2:-}" ] || trap 'rm -rf "$folder"' EXIT
python scripts/load.py "$folder" "${1:-2000000}"
