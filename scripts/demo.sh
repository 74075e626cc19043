#!/usr/bin/env bash
# Installs m2l where it is not yet, then runs `m2l demo` with the arguments given.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/env.sh"

bash "$root/scripts/install.sh"
exec "$root/.venv/bin/m2l" demo "$@"
