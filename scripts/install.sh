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
pip_install=("$venv/bin/python" -m pip install --no-deps --progress-bar off)
site_packages="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
packages="$(grep -c == "$root/requirements.lock")"
log="$venv/install.log"
echo "installing $packages packages from requirements.lock (2.9 GB on disk; pip's own words are in $log)"

clock() {
    printf '%d:%02d' $(($1 / 60)) $(($1 % 60))
}

# Prints how many packages are there, on a terminal in one line, elsewhere one line each 20 seconds.
show_progress() {
    local fetched installed elapsed left=
    fetched="$(grep -cE '^(Collecting|Processing) ' "$log" || true)"
    installed="$(find "$site_packages" -maxdepth 1 -name '*.dist-info' | wc -l)"
    elapsed=$((SECONDS - start))
    if ((before < 0)) && grep -q '^Installing collected' "$log"; then
        unpacking=$SECONDS before=$installed
    elif ((before >= 0 && installed - before >= 10)); then
        left=$(((packages - installed) * (SECONDS - unpacking) / (installed - before)))
        left=", about $(clock "$left") left"
    fi
    line="$fetched of $packages packages fetched, $installed installed, $(clock $elapsed)$left"
    if [[ -t 1 ]]; then
        printf '\r\033[2K%s' "$line"
    elif ((elapsed - shown >= 20)); then
        shown=$elapsed
        echo "$line"
    fi
}

# Runs pip, which says nothing on a terminal for minutes, and shows how far it is.
install_locked() {
    local start=$SECONDS shown=0 unpacking=0 before=-1 pip line=
    "${pip_install[@]}" "$@" >>"$log" 2>&1 &
    pip=$!
    trap 'kill "$pip" 2>/dev/null; wait "$pip"; exit 130' INT TERM
    while kill -0 "$pip" 2>/dev/null; do
        show_progress
        sleep 1
    done
    trap - INT TERM
    if [[ -t 1 ]]; then echo; fi
    if ! wait "$pip"; then
        tail -n 15 "$log" >&2
        echo "pip failed; all that it said is in $log" >&2
        exit 1
    fi
}

# The two that build the others come first, so that what has no wheel is built by what is pinned.
: >"$log"
"${pip_install[@]}" -qq $(grep -E '^(setuptools|wheel)==' "$root/requirements.lock")
install_locked --no-build-isolation --requirement "$root/requirements.lock"
echo "installing m2l from $root (editable)"
"${pip_install[@]}" -qq --no-build-isolation --editable "$root"

# In the folder that contains the clone, Python takes the clone for the package m2l, unless it finds
# the package itself on its path.
echo "$root" >"$site_packages/m2l.pth"

echo "$wanted" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "done: $(du -sh "$venv" | cut -f 1) in $venv; source $venv/bin/activate makes m2l a command"
