#!/usr/bin/env bash
#SBATCH --job-name=filter
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# Stage 4: each task writes its shards of the kept corpus; no GPU.
. scripts/slurm/task.sh filter
