#!/usr/bin/env bash
# Installs m2l where it is not yet, then lints and tests it, a file of tests a core, at most four at a
# time; `--fast` for the files of tests/fast.txt alone. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

if [[ "${1:-}" == --fast ]]; then
    shift
    mapfile -t files <tests/fast.txt
    # Compiled in half the time; the whole suite compiles as users do, whose bits it tests.
    export XLA_FLAGS="${XLA_FLAGS---xla_backend_optimization_level=0}"
    set -- "${files[@]}" "$@"
fi
bash scripts/install.sh
bash scripts/lint.sh
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 \
    --dist loadscope --no-loadscope-reorder "$@"
