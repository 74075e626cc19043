#!/usr/bin/env bash
# Runs m2l on the nodes of a Slurm job, and queues the job again until the work is finished.
#
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 scripts/launch/slurm.sh \
#       train --distributed --gin_file runs/expert.gin \
#       --init /shared/base --mixture sentiment --out /shared/runs/sentiment
#
# The arguments are those of m2l. Submit it in the clone, with m2l on the PATH. Slurm sends SIGTERM
# to all processes before the time is up (--signal, in seconds; docs/pods.md computes how many): they
# save at a common step, and the job queues itself again. So it does when a process crashes, at most
# RETRIES times (default 3) without a save at a SIGTERM between. Bad input, exit code 2, ends the job.
#SBATCH --job-name=m2l
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --cpus-per-task=8
set -uo pipefail

root="${M2L_ROOT:-$SLURM_SUBMIT_DIR}"  # Slurm runs a copy of this file, from a folder of its own.
python="$(dirname "$(command -v m2l)")/python"
crash_count="$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID.crashes"
errors="$(mktemp)"
export XLA_PYTHON_CLIENT_MEM_FRACTION=.92 JAX_OPTIMIZATION_LEVEL=O1

# srun, and not only sbatch: without it JAX finds Slurm's variables, and waits for no one.
exec 3> >(tee "$errors" >&2)
tee=$!
srun --kill-on-bad-exit=1 m2l "$@" 2>&3
code=$?
exec 3>&-
wait "$tee"

# The code is the highest of all processes: of one that was killed, if another had bad input.
if grep -qE '^srun: error: .*: Exited with exit code 2$' "$errors"; then
  rm -f "$crash_count"
  exit 2
fi

if [ "$code" = 0 ]; then
  "$python" "$root/scripts/launch/is_finished.py" "$@"
  code=$?
fi
case $code in
0)
  rm -f "$crash_count"
  exit 0
  ;;
75) rm -f "$crash_count" ;;
*)
  crashes=$(($(cat "$crash_count" 2>/dev/null || echo 0) + 1))
  if [ "$crashes" -gt "${RETRIES:-3}" ]; then
    echo "slurm.sh: $crashes crashes in a row, the last with exit code $code; not queued again" >&2
    rm -f "$crash_count"
    exit "$code"
  fi
  echo "$crashes" >"$crash_count"
  echo "slurm.sh: crash $crashes of at most ${RETRIES:-3}, exit code $code; queued again" >&2
  ;;
esac
scontrol requeue "$SLURM_JOB_ID"
