#!/usr/bin/env bash
# Prints the base image to build on. On Debian 12 as root it first installs what is missing for that, podman and the
# tools it needs, and makes the base from Debian's packages; elsewhere the base is the published one.
set -euo pipefail
base=localhost/rfdetr-base:bookworm
published=docker.io/library/python:3.11-slim-bookworm

if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "$published"
  exit
fi
tool=${CONTAINER_TOOL:-}
for candidate in docker podman; do
  if [ -z "$tool" ] && command -v "$candidate" > /dev/null && "$candidate" info > /dev/null 2>&1; then tool=$candidate; fi
done
packages=
[ -n "$tool" ] || { packages="podman runc"; tool=podman; }
command -v debootstrap > /dev/null || packages="$packages debootstrap"
if [ -n "$packages" ]; then
  echo "installing $packages" >&2
  { apt-get --quiet update &&
    DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes install --no-install-recommends $packages; } < /dev/null >&2
fi
CONTAINER_TOOL=$tool
export CONTAINER_TOOL
if ! "$tool" image inspect "$base" > /dev/null 2>&1; then
  echo "making $base" >&2
  "$(dirname "$0")/bootstrap-base.sh" "$base" >&2
fi
echo "$base"
