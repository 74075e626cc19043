#!/usr/bin/env bash
# Trains an expert on several nodes of a Slurm cluster, one process for each GPU.
#
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 scripts/launch/slurm.sh \
#       --init /shared/base --mixture sentiment --out /shared/runs/sentiment
#
# The arguments are those of `m2l train`; every node must see its folders. Slurm sends SIGTERM to all
# processes two minutes before the time is up (--signal): they save at a common step and end with 0,
# and the job queues itself again until the run is finished, which `m2l train` then says at once.
#SBATCH --job-name=m2l
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --cpus-per-task=8
set -euo pipefail

out=
for argument in "$@"; do
  [ "${previous:-}" = --out ] && out=$argument
  previous=$argument
done

export XLA_PYTHON_CLIENT_MEM_FRACTION=.92 JAX_OPTIMIZATION_LEVEL=O1

# srun, and not only sbatch: without it JAX finds Slurm's variables, and waits for no one.
srun --kill-on-bad-exit=1 m2l train --distributed --gin_file runs/expert.gin "$@"

[ -e "$out/finished.json" ] || scontrol requeue "$SLURM_JOB_ID"
