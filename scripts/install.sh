#!/usr/bin/env bash
# Makes .venv and installs into it what requirements.lock pins, then m2l itself (editable).
# A second run finds the stamp of the first and does nothing. PYTHON=... names the interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/m2l-installed"
source "$root/scripts/env.sh"

wanted="$(echo "$root" | cat - "$root"/{requirements.lock,setup.py,m2l/version.py,scripts/install.sh} | sha256sum)"
found="$(cat "$stamp" 2>/dev/null || true)"
if [[ "$found" == "$wanted" && -x "$venv/bin/python" ]]; then
    exit 0
fi

# The lock is resolved for these.
is_supported() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
}

# An interrupted pip can leave a package half-written that it later takes for installed: such an
# environment is made anew.
if [[ "$found" == unfinished ]] || ! is_supported "$venv/bin/python" ||
    ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
        if is_supported "$candidate"; then
            python="$candidate"
            break
        fi
    done
    if [[ -z "$python" ]]; then
        echo "requirements.lock is for Python 3.11 and 3.12, and none of" \
            "${PYTHON:+$PYTHON, }python3.11, python3.12 and python3 is one:" \
            "install one, or name it with PYTHON=/path/to/python" >&2
        exit 2
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$python cannot make virtual environments:" \
            "on Debian and Ubuntu run 'apt-get install python3-venv' first" >&2
        exit 2
    fi
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
echo unfinished >"$stamp"

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
pip_install=("$venv/bin/python" -m pip install -qq --no-deps)
echo "installing $(grep -c == "$root/requirements.lock") packages from requirements.lock (2.9 GB on disk; a minute or two)"
# The two that build the others come first, so that what has no wheel is built by what is pinned.
"${pip_install[@]}" $(grep -E '^(setuptools|wheel)==' "$root/requirements.lock")
"${pip_install[@]}" --no-build-isolation --requirement "$root/requirements.lock"
echo "installing m2l from $root (editable)"
"${pip_install[@]}" --no-build-isolation --editable "$root"

# In the folder that contains the clone, Python takes the clone for the package m2l, unless it finds
# the package itself on its path.
site_packages="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
echo "$root" >"$site_packages/m2l.pth"

echo "$wanted" >"$stamp.new"
mv "$stamp.new" "$stamp"
