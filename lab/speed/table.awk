# SPDX-License-Identifier: Apache-2.0
# table.awk: lines PART|what|device|figure into one table, each row against its yardstick.
#
# mapped: against dm-linear, at least 0.95. first: against dm-snapshot, at least 1. small: against
# dm-snapshot with chunks of 64 KiB. mixed: against dm-linear. pools: qcow2 against dscow. files:
# against a sparse file. copy: against the loop device, time, at most 1.5. Rows of which
# nothing is asked are there to be read.
# Exits with 1 when a row misses what is asked of it.

function wanted(part, what, device) {
  if (part == "mapped" && device != "dm-linear") return ">= 0.95"
  if (part == "first" && device == "dmu" && what == "first write") return ">= 1.00"
  if (part == "copy" && device == "dmu") return "<= 1.50"
  return ""
}

function ok(ratio, limit,    words) {
  split(limit, words, " ")
  return words[1] == ">=" ? ratio >= words[2] : ratio <= words[2]
}

BEGIN {
  yard["mapped"] = "dm-linear"
  yard["first"] = "dm-snapshot"
  yard["small"] = "dm-snapshot 64K"
  yard["mixed"] = "dm-linear"
  yard["pools"] = "dscow 64K in a file"
  yard["files"] = "loop, direct"
  yard["copy"] = "loop"
  printf "%-38s %-16s %12s %7s  %s\n", "", "device", "figure", "ratio", "wanted"
}

NF == 4 {
  if ($3 == yard[$1]) base[$1, $2] = $4
  row[++rows] = $0
  if (!(($1, $2) in seen)) { seen[$1, $2] = ++groups; group[groups] = $1 "|" $2 }
}

END {
  for (g = 1; g <= groups; g++) for (r = 1; r <= rows; r++) {
    split(row[r], f, "|")
    if (f[1] "|" f[2] != group[g]) continue
    if (!base[f[1], f[2]]) { print f[2] ": nothing to compare with"; bad++; continue }
    ratio = f[4] / base[f[1], f[2]]
    limit = wanted(f[1], f[2], f[3])
    verdict = limit == "" ? "" : limit (ok(ratio, limit) ? "  ok" : "  MISSED")
    if (verdict ~ /MISSED/) bad++
    printf "%-38s %-16s %12s %7.3f  %s\n", (f[2] == last ? "" : f[2]), f[3], f[4], ratio, verdict
    last = f[2]
  }
  exit bad > 0
}
