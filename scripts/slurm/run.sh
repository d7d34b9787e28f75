#!/usr/bin/env bash
# Rate, train, score and filter on a SLURM cluster: bash scripts/slurm/run.sh; or some of it: run.sh score filter.
# Run it again after whatever went wrong: what is done is skipped, what is recorded is not asked again.
set -euo pipefail

# ---- three lines to edit --------------------------------------------------------------------------------------------
where="--partition=gpu --account=mine"   # 1. what your cluster wants of every job, as options of sbatch
environment=.venv/bin/activate           # 2. a file to source that puts gristmill on the PATH; it may load modules too
recipe=mine.yaml                         # 3. the recipe; rate.sh gives each of its teachers one GPU
# ---------------------------------------------------------------------------------------------------------------------
where=${WHERE:-$where} environment=${ENVIRONMENT:-$environment} recipe=${RECIPE:-$recipe} parts=${PARTS:-8}
export environment recipe parts

cd "$(dirname "$0")/../.."
# shellcheck source=/dev/null
. "$environment"
folder=$(gristmill run "$recipe" --dry-run | sed -n 's/^run_folder: //p')
mkdir -p "$folder/slurm"

last=""
submit() { # submit STAGE OPTION...: a job after the last one
  local stage=$1 after=()
  shift
  [ -z "$last" ] || after=("--dependency=afterok:$last" --kill-on-invalid-dep=yes)
  # shellcheck disable=SC2086  # several options
  last=$(sbatch --parsable $where "${after[@]}" "$@" "scripts/slurm/$stage.sh")
  last=${last%%;*}
  echo "$stage $*: job $last"
}

[ $# -gt 0 ] || set -- rate train score filter
for stage in "$@"; do
  if [ "$stage" != train ]; then
    submit "$stage" --array="1-$parts${AT_ONCE:+%$AT_ONCE}" --output="$folder/slurm/%x-%a-%A.log"
  fi
  submit "$stage" --output="$folder/slurm/%x-%j.log" # puts the parts together
done
