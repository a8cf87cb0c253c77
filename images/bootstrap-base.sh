#!/usr/bin/env bash
# Makes a base image from Debian's own packages, for where no container registry can be reached:
#
#     images/bootstrap-base.sh [NAME]        NAME: localhost/rfdetr-base:bookworm
#     make images BASE_IMAGE=localhost/rfdetr-base:bookworm
#
# Needs root, debootstrap, and docker, podman or buildah. Debian 12 ("bookworm") because its Python is 3.11.
set -euo pipefail
name=${1:-localhost/rfdetr-base:bookworm}
suite=bookworm

fail() { echo "error: $1" >&2; exit 2; }

[ "$(id -u)" = 0 ] || fail "debootstrap needs root"
command -v debootstrap > /dev/null || fail "debootstrap is not installed (apt-get install debootstrap)"
for tool in ${CONTAINER_TOOL:-docker podman buildah} ''; do
  [ -n "$tool" ] || fail "neither docker nor podman nor buildah works here (apt-get install podman)"
  if command -v "$tool" > /dev/null && "$tool" info > /dev/null 2>&1; then break; fi
done

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root" # it becomes the image's own /
log=$(mktemp)

# With Debian's certificates: what is built on it talks to HTTPS. The mirror is debootstrap's own default.
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$root" > "$log" 2>&1 ||
  { tail -n 5 "$log" >&2; fail "debootstrap failed, see $log"; }

# A Debian host of the same suite knows where its security updates come from.
sources=/etc/apt/sources.list.d/debian.sources
if grep -qs "$suite-security" "$sources"; then
  cp "$sources" "$root/etc/apt/sources.list.d/"
  : > "$root/etc/apt/sources.list"
  { chroot "$root" apt-get --quiet update &&
    DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get --quiet --yes upgrade; } >> "$log" 2>&1 < /dev/null ||
    { tail -n 5 "$log" >&2; fail "Debian's updates could not be installed, see $log"; }
fi
rm "$log"
chroot "$root" apt-get clean
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/* "$root"/var/log/* "$root"/usr/share/doc/* \
  "$root"/usr/share/man/* "$root"/etc/resolv.conf "$root"/etc/hostname

if [ "$tool" = buildah ]; then
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$root" / > /dev/null
  buildah config --cmd /bin/bash "$container"
  buildah commit --quiet --rm "$container" "$name" > /dev/null
else
  tar --create --directory "$root" --one-file-system . | "$tool" import --change 'CMD ["/bin/bash"]' - "$name" > /dev/null 2>&1
fi
echo "made $name with $tool"
