# shellcheck shell=bash
# What every job does: a task of an array its part of the stage, a single job all that is left.
set -euo pipefail
# shellcheck source=/dev/null
. "${environment:?submit with scripts/slurm/run.sh, or export environment and recipe}"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
shard=()
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || shard=(--shard "$SLURM_ARRAY_TASK_ID/${parts:-$SLURM_ARRAY_TASK_COUNT}")
code=0
srun gristmill "$1" "${recipe:?}" "${shard[@]}" || code=$?
if [ "$code" -eq 143 ]; then # SIGTERM came before the time was up, and all that was done is kept: go on later
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
