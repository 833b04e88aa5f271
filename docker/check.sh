#!/usr/bin/env bash
# Builds Dockerfile.nemo and Dockerfile.bridge on stand-ins for NVIDIA's containers, which take 20 GB and an account:
# pip must change no file of theirs, and doctor must be content. Needs a network; a few minutes.
#
#   docker/check.sh [OPTION...]    BUILDER=podman or "buildah"; options go to each `build`
set -euo pipefail
cd "$(dirname "$0")/.."

build() { "${BUILDER:-docker}" build "${options[@]}" "$@"; }
options=("$@")
for trainer in nemo bridge; do
    name=nemo-upcycle-check
    build -f docker/Dockerfile.standin --build-arg "TRAINER=$trainer" -t "$name:standin" .
    build -f "docker/Dockerfile.$trainer" --build-arg "BASE=$name:standin" -t "$name:$trainer" .
    build -f - -t "$name:checked" docker <<END
FROM $name:$trainer
RUN sha256sum --quiet -c /root/own.sha256 && nemo-upcycle doctor \\
    && python -c "from megatron.core import package_info as core; print('Megatron-Core', core.__version__)"
END
done
