#!/usr/bin/env bash
# Builds the wheel and the sdist into a folder, and checks descriptions and content.
#
#   bash scripts/package.sh dist
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$(mkdir -p "${1:-$root/dist}" && cd "${1:-$root/dist}" && pwd)"
tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT

"${PYTHON:-python3}" -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install -q build twine
# The wheel is built of the sdist: what that lacks is missed here.
"$tools/venv/bin/python" -m build --outdir "$out" "$root"
"$tools/venv/bin/python" -m twine check --strict "$out"/*

"$tools/venv/bin/python" -m pip install -q --no-deps --target "$tools/m2l" "$out"/*.whl
for file in gin_configs/experiments/demo.gin tasks/microworld/vocabulary.model reporting/page.html.jinja; do
    if [[ ! -s "$tools/m2l/m2l/$file" ]]; then
        echo "the wheel lacks m2l/$file" >&2
        exit 1
    fi
done
ls -l "$out"
