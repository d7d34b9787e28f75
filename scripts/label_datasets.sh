#!/usr/bin/env bash
# Label each corpus of a list: a path (from here: the repository) or Hub name a line, then, if need be, a tab and its
# text column; # begins a comment.
# bash scripts/label_datasets.sh FILE [flags of gristmill label]; RECIPE names another recipe than configs/label-es.yaml.
set -euo pipefail
if [ ! -f "${1:-}" ]; then
  echo "usage: bash scripts/label_datasets.sh FILE [flags of gristmill label]" >&2
  exit 2
fi
list=$(realpath "$1")
recipe=$(realpath "${RECIPE:-$(dirname "$0")/../configs/label-es.yaml}")
shift
offline=${HF_HUB_OFFLINE:-0}  # the corpora may be on the Hub
cd "$(dirname "$0")/.."
. scripts/venv.sh torch,openai,datasets,plots .venv-label
HF_HUB_OFFLINE=$offline gristmill label "$recipe" --datasets "$list" --table "$@"
