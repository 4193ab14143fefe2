#!/usr/bin/env bash
# Plan and submit the attribution of all training images: Slurm arrays, then consolidation, then cluster.slurm.then.
#   sbatch [sbatch options] slurm/attribute.sh CONFIG.yaml [section.key=value ...]
# Submit from the folder and the virtual environment that you work in. This job itself ends within a minute or two; what
# the arrays ask for stands in CONFIG.yaml under cluster.slurm. The same from a login node, or to see it first:
#   python -m hpcguard.attribute CONFIG.yaml cluster.executor=slurm [--dry-run]
#SBATCH --job-name=hpcguard-plan
#SBATCH --output=slurm-%x-%j.out
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=30
#SBATCH --requeue
set -euo pipefail
exec python -m hpcguard.attribute "$@" cluster.executor=slurm
