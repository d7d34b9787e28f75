#!/usr/bin/env bash
#SBATCH --job-name=score
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# Stage 3: each task scores its shards on its own GPU.
. scripts/slurm/task.sh score
