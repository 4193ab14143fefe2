#!/usr/bin/env bash
# Train the guided arm and its controls with DeepSpeed, one task a GPU (or a core), over any number of nodes.
#   sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 slurm/refine.sh CONFIG.yaml [section.key=value ...]
# A requeued job, or the same submission again, goes on from the last checkpoint. 90 s before its time limit it saves one
# and asks to be requeued itself.
#SBATCH --job-name=hpcguard-refine
#SBATCH --output=slurm-%x-%j.out
#SBATCH --requeue
#SBATCH --signal=USR2@90
set -euo pipefail
exec srun --kill-on-bad-exit=1 python -m hpcguard.refine "$@"
