#!/usr/bin/env bash
# Fetch llama.cpp for tests, once: its converter from PyPI, its ready engine from npm. Nothing is built, nothing installed.
#
#     scripts/llama_cpp.sh [FOLDER]        default: $NEMO_UPCYCLE_LLAMA_CPP, else .cache/llama_cpp
#
# Leaves FOLDER/llama.cpp and FOLDER/node_modules, 0.5 GB. Needs pip, npm, and node 20 or newer.
set -euo pipefail

source_release=0.3.36 # of llama-cpp-python, whose sdist holds llama.cpp
engine_release=3.22.1 # of node-llama-cpp, with a ready engine for each platform
target=${1:-${NEMO_UPCYCLE_LLAMA_CPP:-$(dirname "$0")/../.cache/llama_cpp}}
mkdir -p "$target"
target=$(cd "$target" && pwd)
if [ -f "$target/.complete-$source_release-$engine_release" ]; then
    echo "already there: $target"
    exit 0
fi
for tool in npm node tar "${PIP:=pip}"; do
    command -v "$tool" >/dev/null || { echo "$0: needs $tool" >&2; exit 1; }
done

"$PIP" download --quiet --no-deps --no-binary :all: --dest "$target" "llama-cpp-python==$source_release"
archive=$target/llama_cpp_python-$source_release.tar.gz
rm -rf "$target/llama.cpp"
tar -xzf "$archive" -C "$target" --strip-components 2 "llama_cpp_python-$source_release/vendor/llama.cpp"
rm "$archive"
case $(uname -s)-$(uname -m) in
    Linux-x86_64) platform=linux-x64 ;;
    Linux-aarch64) platform=linux-arm64 ;;
    *) echo "$0: no engine for $(uname -s) on $(uname -m) is known here" >&2; exit 1 ;;
esac
cd "$target"
npm install --silent --no-fund --no-audit --ignore-scripts --omit=optional \
    "node-llama-cpp@$engine_release" "@node-llama-cpp/$platform@$engine_release"
touch ".complete-$source_release-$engine_release"
