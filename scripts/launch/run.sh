#!/usr/bin/env bash
# Runs m2l with the arguments given, where exit code 0 would be taken for the end of the work:
# exits with 75 if `m2l train` or `m2l rounds` ended with 0 because it has saved to go on, so that the same command
# is started again; else with m2l's code. SIGTERM is passed on to m2l.
set -uo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

m2l "$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM
# A trapped signal ends `wait` although m2l goes on; its code is read when it has ended.
while kill -0 "$child" 2>/dev/null; do
  wait "$child"
done
wait "$child"
code=$?

if [ "$code" = 0 ]; then
  python "$here/is_finished.py" "$@"
  code=$?
fi
exit "$code"
