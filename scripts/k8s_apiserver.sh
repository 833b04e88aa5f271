#!/usr/bin/env bash
# Build a real Kubernetes API server for tests, once: custom resources with their validation, and nothing else.
#
#     scripts/k8s_apiserver.sh [FOLDER]        default: $NEMO_UPCYCLE_K8S, else .cache/k8s
#
# Leaves FOLDER/apiserver and FOLDER/etcd. Needs Debian, 5 GB of disk while it builds, and 3 to 6 minutes on two cores.
# Nothing is installed: packages of Debian sid, which alone has the server's source, are unpacked into a folder that is
# removed at the end.
set -euo pipefail

target=${1:-${NEMO_UPCYCLE_K8S:-$(dirname "$0")/../.cache/k8s}}
mkdir -p "$target"
target=$(cd "$target" && pwd)
if [ -x "$target/apiserver" ] && [ -x "$target/etcd" ]; then
    echo "already built: $target"
    exit 0
fi
for tool in apt-get dpkg-deb tar; do
    command -v "$tool" >/dev/null || { echo "$0: needs $tool, of Debian" >&2; exit 1; }
done

work=$target/build
rm -rf "$work"
mkdir -p "$work"/{sources,lists/partial,archives/partial,root}
: >"$work/status" # as if nothing were installed, so that the list of packages is complete
# From where this machine takes Debian's packages.
mirror=$(apt-get indextargets --format '$(ORIGIN)|$(REPO_URI)|$(SIGNED_BY)' 'Created-By: Packages' 'Component: main' |
    grep -m 1 '^Debian|' || true)
if [ -z "$mirror" ]; then
    echo "$0: found no Debian mirror; run 'apt-get update', on Debian" >&2
    exit 1
fi
IFS='|' read -r _ uri key <<<"$mirror"
cat >"$work/sources/sid.sources" <<EOF
Types: deb
URIs: $uri
Suites: sid
Components: main
Signed-By: ${key:-/usr/share/keyrings/debian-archive-keyring.gpg}
EOF
options=(
    -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/sources" -o Dir::Etc::preferencesparts=/dev/null
    -o "Dir::State::status=$work/status" -o "Dir::State::lists=$work/lists"
    -o "Dir::Cache::archives=$work/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
    -o APT::Sandbox::User=root
)
apt-get "${options[@]}" -qq update
# Of what the source package depends on, Go's compiler and source packages are enough.
wanted=$(apt-get "${options[@]}" install --print-uris --no-install-recommends -y -qq \
    golang-k8s-apiextensions-apiserver-dev golang-1.26-go etcd-server | grep -o "[^/]*_[^_]*_[a-z0-9]*\.deb" |
    sed 's/_.*//' | grep -E '^(golang-|etcd-server$)' | sort -u)
(cd "$work/archives" && apt-get "${options[@]}" -qq download $wanted)
for package in "$work"/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$work/root" --exclude='./usr/share/doc' --exclude='./usr/share/man'
done

export GO111MODULE=off GOPROXY=off GOTOOLCHAIN=local CGO_ENABLED=0
export GOROOT=$work/root/usr/lib/go-1.26 GOPATH=$work/root/usr/share/gocode GOCACHE=$work/cache GOTMPDIR=$work
nice -n 10 "$GOROOT/bin/go" build -trimpath -ldflags='-s -w' -o "$work/apiserver" k8s.io/apiextensions-apiserver
install "$work/root/usr/bin/etcd" "$target/etcd"
install "$work/apiserver" "$target/apiserver"
chmod -R u+w "$work"
rm -rf "$work"
echo "built: $target"
