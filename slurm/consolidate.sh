#!/usr/bin/env bash
# Verify all shards and publish one store over them. Jobs of slurm/attribute.sh do this by themselves when they are done.
#   sbatch [--nodes 2 --ntasks-per-node 8] slurm/consolidate.sh CONFIG.yaml [section.key=value ...]
# One rank a task where Slurm and the MPI under mpi4py know each other by PMIx, else one process.
#SBATCH --job-name=hpcguard-consolidate
#SBATCH --output=slurm-%x-%j.out
#SBATCH --nodes=1
#SBATCH --time=60
#SBATCH --requeue
set -euo pipefail
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    exec srun --mpi=pmix --kill-on-bad-exit=1 python -m hpcguard.consolidate "$@"
fi
exec python -m hpcguard.consolidate "$@"
