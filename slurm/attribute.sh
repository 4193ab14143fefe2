#!/usr/bin/env bash
# Explain all training images of a configuration on one node, then consolidate.
#   sbatch [sbatch options] slurm/attribute.sh CONFIG.yaml [section.key=value ...]
# Submit from the folder and the virtual environment that you work in. One worker a GPU, or a CPU core where there is
# none. Pre-empted, timed out or requeued, the job goes on with the shards that are missing; submit it again for the rest.
#SBATCH --job-name=hpcguard-attribute
#SBATCH --output=slurm-%x-%j.out
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
set -euo pipefail
workers=${SLURM_GPUS_ON_NODE:-${SLURM_CPUS_ON_NODE:-1}}
python -m hpcguard.attribute "$@" cluster.workers="$workers"
python -m hpcguard.consolidate "$@"
