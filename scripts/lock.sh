#!/usr/bin/env bash
# Locks the versions of every dependency: writes uv.lock, and from it the constraints that env.sh gives to pip and to uv.
#
#   scripts/lock.sh              keeps the locked versions that still fit; run it after a change of dependencies
#   scripts/lock.sh --upgrade    takes the newest versions that the bounds allow
#
# Needs uv on PATH. Extras and groups that cannot be installed together have a file each. The constraints have no hashes:
# another build of a locked version fits, for example torch's for CPUs, which needs none of CUDA's libraries.
set -euo pipefail
cd "$(dirname "$0")/.."

uv lock "$@"

export_to() {
    {
        echo "# Made by scripts/lock.sh of uv.lock, sha256 $(sha256sum uv.lock | cut -d " " -f 1)"
        uv export --quiet --frozen --no-hashes --no-emit-project --no-annotate --no-header "${@:2}"
    } >"scripts/constraints/$1.txt"
}
export_to nemo --extra dev --extra gpu --group docs
export_to data --extra data --group test
export_to tf5 --group tf5

# uv.lock cannot hold Megatron-Bridge's environment, which installs Bridge without all that it asks for. The versions in
# the file are kept like those in uv.lock.
echo "torch==2.12.0" | uv pip compile --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_39 --no-header \
    --no-annotate --output-file scripts/constraints/bridge.txt "$@" scripts/bridge.txt -
