# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# common.sh: what the measurements of this folder share.

# need TOOL...: ends if one is missing.
need() {
  local tool
  for tool; do
    command -v "$tool" >/dev/null || { echo "bench: $tool is missing" >&2; exit 1; }
  done
}

wait_for_socket() {
  local tries=0
  until [ -S "$1" ]; do
    tries=$((tries + 1))
    [ $tries -lt 200 ] || { echo "bench: $1 did not appear" >&2; exit 1; }
    sleep 0.05
  done
}

# Microseconds of processor time that a process has used.
cpu_time() {
  local tick
  tick=$((1000000 / $(getconf CLK_TCK)))
  awk -v tick="$tick" '{ print ($14 + $15) * tick }' "/proc/$1/stat"
}

# The most KiB that a process has had resident.
peak_memory() { awk '$1 == "VmHWM:" { print $2 }' "/proc/$1/status"; }

median() { # of a column of results
  printf '%s' "$1" | awk -v column="$2" '{ print $column }' | sort -g |
    awk '{ value[NR] = $1 } END { print value[int((NR + 1) / 2)] }'
}

ratio() { awk -v a="$1" -v b="$2" 'BEGIN { print a / b }'; }
