# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# debs.sh: Debian's packages by name, unpacked where they are wanted, never installed.
#
# A caller may set apt_options (an array) first, to ask another archive than the computer's own.

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# fetch_debs FOLDER PACKAGE...: fetches packages into FOLDER. Lists of an older day name versions
# that the archive no longer has; then they are fetched anew.
fetch_debs() {
  mkdir -p "$1"
  try_debs "$@" 2>/dev/null || {
    as_root apt-get "${apt_options[@]}" update -q >/dev/null
    try_debs "$@"
  }
}
try_debs() {
  local folder=$1
  shift
  (cd "$folder" && apt-get "${apt_options[@]}" download -q -o APT::Sandbox::User=root \
    "$@" >/dev/null)
}

# unpack_debs FOLDER DIR PACKAGE...: fetches packages into FOLDER, unpacks them into DIR.
unpack_debs() {
  local folder=$1 dir=$2 package
  shift 2
  fetch_debs "$folder" "$@"
  mkdir -p "$dir"
  for package; do
    dpkg -x "$folder/${package}"_*.deb "$dir"
  done
}

if ! declare -p apt_options >/dev/null 2>&1; then apt_options=(); fi
