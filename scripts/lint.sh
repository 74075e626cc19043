#!/usr/bin/env bash
# Lints: style (ruff), names and docstrings (check_names.py), types (pyrefly).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python scripts/check_names.py
.venv/bin/pyrefly check --python-interpreter-path .venv/bin/python --output-format min-text
