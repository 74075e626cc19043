#!/usr/bin/env bash
# Runs m2l on a TPU slice of its own, which it requests as a queued resource and requests anew when
# it is preempted, until the work is finished; then it deletes the slice.
#
#   NAME=sentiment ZONE=us-east5-a TYPE=v5p-128 RUNTIME=v2-alpha-tpuv5 \
#   IMAGE=us-east5-docker.pkg.dev/my-project/m2l/m2l:1 scripts/launch/tpu.sh \
#       train --distributed --gin_file runs/expert.gin \
#       --init gs://bucket/base --mixture sentiment --out gs://bucket/runs/sentiment
#
# The arguments are those of m2l, the same on every worker. Each worker runs IMAGE (scripts/launch/
# Dockerfile) as a detached container, so that nothing ends with this script or its connection:
# started again with the same NAME, it follows what runs. FLAGS go to `queued-resources create`
# (default --spot; the service account must be able to read IMAGE and to write the bucket).
#
# Exits with 0 when the work is finished, 2 at bad input, 1 after more than RETRIES (default 3)
# crashes or failed requests in a row. KEEP=1 leaves the slice. POLL: seconds between looks.
set -uo pipefail

: "${NAME:?of the slice and the queued resource}" "${ZONE:?of the slice}" "${IMAGE:?of m2l}"
: "${TYPE:?of the slice, such as v5p-128}" "${RUNTIME:?version of the TPU software}"
read -ra flags <<<"${FLAGS---spot}"
poll="${POLL:-30}" retries="${RETRIES:-3}" failures=0 unreached=0
printf -v command '%q ' "$@"

log() { echo "tpu.sh: $*" >&2; }

request() { gcloud compute tpus queued-resources "$1" "$NAME" --zone "$ZONE" --quiet "${@:2}"; }

# On all workers, or those that WORKER names.
workers() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --quiet \
    --worker="${WORKER:-all}" --command "$1"
}

# ABSENT, UNKNOWN where gcloud fails otherwise, or what the queued resource is said to be.
state() {
  local text
  if text="$(request describe --format='value(state.state)' 2>&1)"; then
    tail -n 1 <<<"$text"
  elif grep -qE "NOT_FOUND|was not found" <<<"$text"; then
    echo ABSENT
  else
    log "$text"
    echo UNKNOWN
  fi
}

delete() { request delete --force; }

finish() {
  log "$2"
  if [ -z "${KEEP:-}" ]; then
    delete || log "could not delete $NAME in $ZONE: it may cost money"
  fi
  exit "$1"
}

failed() {
  failures=$((failures + 1))
  if [ "$failures" -gt "$retries" ]; then
    finish 1 "$1; $failures failures in a row"
  fi
  log "$1; failure $failures of at most $retries, going on"
}

# A container of before is left as it is: it runs, or its exit code is still to be read.
start="sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet 2>/dev/null;
sudo docker inspect m2l >/dev/null 2>&1 || sudo docker run --detach --name m2l --privileged \
--net=host --stop-timeout 600 --log-opt max-size=100m $IMAGE $command"
follow="sudo docker logs --follow --tail 20 m2l"
status="sudo docker inspect --format 'm2l {{.State.Status}} {{.State.ExitCode}}' m2l"
remove="sudo docker rm --force m2l"

while true; do
  case "$(state)" in
  ABSENT)
    log "requesting $TYPE in $ZONE"
    if ! request create --node-id "$NAME" --accelerator-type "$TYPE" \
      --runtime-version "$RUNTIME" "${flags[@]}"; then
      failed "the request was refused"
    fi
    ;;
  SUSPENDED)
    log "the slice was preempted: requesting it anew"
    delete || failed "could not delete the request"
    continue
    ;;
  FAILED)
    delete || log "could not delete the request"
    failed "the slice was not to be had"
    ;;
  ACTIVE)
    # Not reached are a slice that is new and one that is being preempted, but not for long.
    if ! workers "$start" >/dev/null; then
      unreached=$((unreached + 1))
      if [ "$unreached" -gt 20 ]; then
        unreached=0
        delete || log "could not delete the request"
        failed "m2l could not be started on all workers"
      fi
    else
      unreached=0 codes=
      WORKER=0 workers "$follow"
      text="$(workers "$status" 2>/dev/null)" && codes="$(awk '$1 == "m2l"' <<<"$text")"
      if [ -z "$codes" ] || grep -qv '^m2l exited ' <<<"$codes"; then
        :  # The connection was lost, or workers are about to end.
      elif grep -q ' 2$' <<<"$codes"; then
        finish 2 "bad input; see the log above"
      elif ! grep -qv ' 0$' <<<"$codes"; then
        finish 0 "finished"
      else
        if grep -qvE ' (0|75)$' <<<"$codes"; then
          failed "a worker crashed ($(sort <<<"$codes" | uniq -c | xargs))"
        else
          failures=0
          log "saved, to go on"
          sleep "$poll"  # It is told to stop before the slice goes.
        fi
        workers "$remove" >/dev/null
        continue
      fi
    fi
    ;;
  esac
  sleep "$poll"
done
