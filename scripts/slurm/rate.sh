#!/usr/bin/env bash
#SBATCH --job-name=rate
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# Stage 1: each task starts the teacher of the recipe on its own GPU (engine: vllm), or asks one server (openai).
. scripts/slurm/task.sh rate
