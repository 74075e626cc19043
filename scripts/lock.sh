#!/usr/bin/env bash
# Writes requirements.lock anew from setup.py with uv (https://docs.astral.sh/uv): what is pinned
# stays as far as it can; `bash scripts/lock.sh --upgrade` moves everything to its newest release.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v uv >/dev/null; then
    echo "lock.sh needs uv, which is not found: pip install uv" >&2
    exit 2
fi

# The requirements on standard input are what pip cannot be told in setup.py: t5 (pyproject.toml
# drops what it drags in), the CPU build of TensorFlow in place of the other, and what builds m2l.
uv pip compile setup.py - \
    --extra docs --extra search --extra test --extra ui \
    --override <(echo "tensorflow ; sys_platform == 'never'") \
    --python-version 3.11 \
    --custom-compile-command "bash scripts/lock.sh" \
    --no-progress --quiet \
    --output-file requirements.lock "$@" <<END
setuptools
t5==0.9.4
tensorflow-cpu==2.21.*
wheel
END
rm -rf m2l.egg-info  # left by reading setup.py
