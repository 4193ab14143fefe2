#!/usr/bin/env bash
# Attack every trained arm on the test images, and write the report; or, as an array, do a share of the batches each.
#   sbatch [sbatch options] slurm/evaluate.sh CONFIG.yaml [section.key=value ...]
#   sbatch --array=0-15 slurm/evaluate.sh CONFIG.yaml      # then: sbatch -d afterok:JOB slurm/evaluate.sh CONFIG.yaml
# One worker a GPU, or a CPU core where there is none. What is measured already is not measured again.
#SBATCH --job-name=hpcguard-evaluate
#SBATCH --output=slurm-%x-%j.out
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
set -euo pipefail
workers=${SLURM_GPUS_ON_NODE:-${SLURM_CPUS_ON_NODE:-1}}
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    share=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP))/$SLURM_ARRAY_TASK_COUNT
    exec python -m hpcguard.evaluate "$@" --share "$share" evaluation.workers="$workers"
fi
python -m hpcguard.evaluate "$@" evaluation.workers="$workers"
python -m hpcguard.report "$@"
