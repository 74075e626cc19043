#!/usr/bin/env bash
# Installs m2l where it is not yet, then runs `m2l demo` with the arguments given.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
{ : <&0; } 2>/dev/null || exec </dev/null

bash "$root/scripts/install.sh"
# XLA on the CPU maps its temporaries anew at every step; huge pages make that cheap (glibc >= 2.35).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec "$root/.venv/bin/m2l" demo "$@"
