#!/usr/bin/env bash
# Runs the default tests under each supported Python that this machine has, each in an environment of its own
# (.venv-py310, .venv-py311, .venv-py312), and ends with a line for each.
#
#   scripts/test_pythons.sh       (`make test-pythons`; PYTEST_ADDOPTS="tests/unit" runs a part)
#
# Looks for python3.N on PATH, then among pyenv's. Fails where tests fail, and where no Python is found.
set -euo pipefail
cd "$(dirname "$0")/.."

# Prints the path of a Python that runs and makes environments: pyenv has a python3.N on PATH even for what is not
# switched on, and Debian one without ensurepip.
find_python() {
    local python
    for python in "$(command -v "python$1")" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/"python$1"; do
        if "$python" -c "import ensurepip, venv" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    return 1
}

lines=()
status=1
for version in 3.10 3.11 3.12; do
    if ! python=$(find_python "$version"); then
        lines+=("Python $version: not found")
    elif "${MAKE:-make}" test "PYTHON=$python" "VENV=.venv-py${version/./}"; then
        lines+=("$("$python" --version): passed")
        [ "$status" = 2 ] || status=0
    else
        lines+=("$("$python" --version): FAILED")
        status=2
    fi
done
printf '%s\n' "${lines[@]}"
exit "$status"
