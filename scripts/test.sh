#!/usr/bin/env bash
# Installs m2l where it is not yet, then lints and tests it, a file of tests a core, at most four at a
# time; `--fast` for the files of tests/fast.txt alone. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
# What tests start would compile m2l's modules to bytecode again, every time.
unset PYTHONDONTWRITEBYTECODE

run() {
    .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 \
        --dist loadscope --no-loadscope-reorder "$@"
}

# XLA compiles in half the time; what is compared to the bit with other codebases' results is
# compiled as users do: merges and checkpoints.
quickly() {
    XLA_FLAGS="${XLA_FLAGS---xla_backend_optimization_level=0}" run "$@"
}

bash scripts/install.sh
bash scripts/lint.sh
if [[ "${1:-}" == --fast ]]; then
    exact='^tests/(checkpoints|merging)/' status=0
    mapfile -t files < <(grep -Ev "$exact" tests/fast.txt)
    quickly "${files[@]}" "${@:2}" || status=$?
    mapfile -t files < <(grep -E "$exact" tests/fast.txt)
    run "${files[@]}" "${@:2}" || status=$?
    exit "$status"
elif (($#)); then
    run "$@"
else
    status=0
    quickly --ignore tests/checkpoints --ignore tests/merging || status=$?
    run tests/checkpoints tests/merging || status=$?
    exit "$status"
fi
