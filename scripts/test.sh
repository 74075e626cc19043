#!/usr/bin/env bash
# Installs m2l where it is not yet, then lints and tests it, a file of tests a core, at most four at a
# time; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

bash scripts/install.sh
bash scripts/lint.sh
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 \
    --dist loadscope --no-loadscope-reorder "$@"
