#!/usr/bin/env bash
# Train the guided arm and its controls with DeepSpeed, one task a GPU (or a core), over any number of nodes.
#   sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 slurm/refine.sh CONFIG.yaml [section.key=value ...]
# A requeued job, or the same submission again, goes on from the last finished epoch.
#SBATCH --job-name=hpcguard-refine
#SBATCH --output=slurm-%x-%j.out
#SBATCH --requeue
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node must not meet
export MASTER_ADDR MASTER_PORT
# shellcheck disable=SC2016  # expanded in each task, not here
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec python -m hpcguard.refine "$@"' refine "$@"
