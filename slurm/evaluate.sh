#!/usr/bin/env bash
# Attack every trained arm on the test images, and write the report.
#   sbatch [sbatch options] slurm/evaluate.sh CONFIG.yaml [section.key=value ...]
# One model a GPU, or a CPU core where there is none. Models that are measured already are not measured again.
#SBATCH --job-name=hpcguard-evaluate
#SBATCH --output=slurm-%x-%j.out
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
set -euo pipefail
workers=${SLURM_GPUS_ON_NODE:-${SLURM_CPUS_ON_NODE:-1}}
python -m hpcguard.evaluate "$@" evaluation.workers="$workers"
python -m hpcguard.report "$@"
