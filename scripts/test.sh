#!/usr/bin/env bash
# Installs m2l where it is not yet, then lints and tests it; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
{ : <&0; } 2>/dev/null || exec </dev/null

bash scripts/install.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# XLA on the CPU maps its temporaries anew at every step; huge pages make that cheap (glibc >= 2.35).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec .venv/bin/python -m pytest "$@"
