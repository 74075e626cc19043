#!/usr/bin/env bash
# Queues m2l on a GKE cluster with JobSet and Kueue, on one TPU slice or on several GPU nodes.
#
#   NAME=sentiment IMAGE=us-east5-docker.pkg.dev/my-project/m2l/m2l:1 scripts/launch/gke.sh \
#       train --distributed --gin_file runs/expert.gin \
#       --init gs://bucket/base --mixture sentiment --out gs://bucket/runs/sentiment
#
# The arguments are those of m2l, the same in every process. JOBSET=gpu takes jobset_gpu.yaml in
# place of jobset_tpu.yaml; edit these two for other slices and nodes, and kueue.yaml for quotas.
# DRY_RUN=1 prints what would be queued.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

: "${NAME:?of the JobSet}" "${IMAGE:?of m2l}"
arguments=
for argument in "$@"; do
  argument="${argument//\\/\\\\}"
  argument="${argument//\"/\\\"}"
  arguments+="\"$argument\", "
done

manifest="$(<"$here/jobset_${JOBSET:-tpu}.yaml")"
manifest="${manifest//\$NAME/"$NAME"}"
manifest="${manifest//\$IMAGE/"$IMAGE"}"
manifest="${manifest//\$ARGUMENTS/"$arguments"}"
if [ -n "${DRY_RUN:-}" ]; then
  printf '%s\n' "$manifest"
else
  kubectl apply --filename - <<<"$manifest"
fi
