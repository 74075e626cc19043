#!/usr/bin/env bash
# Runs `m2l train` on all workers of a TPU pod slice, with the arguments given to this script.
#
#   TPU=my-v5p-128 ZONE=us-east5-a scripts/launch/tpu_pod.sh \
#       --init /mnt/shared/base --mixture sentiment --out /mnt/shared/runs/sentiment \
#       --gin.FSDP=64
#
# m2l must be installed on every worker (with jax[tpu]), and all must see the folders (Filestore, or
# a bucket by gcsfuse). JAX finds the other workers from the slice's own metadata. A preempted slice
# is sent SIGTERM, at which the run saves; the same command goes on.
set -euo pipefail

: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
printf -v arguments '%q ' "$@"
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command \
  "LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=98304 \
   m2l train --distributed --gin_file runs/expert.gin $arguments"
