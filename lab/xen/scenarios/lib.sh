# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# lib.sh: what a scenario may use. It runs in dom0; `. /share/scenarios/lib.sh` first,
# `finish` last. Every `ok` and `not_ok` is a result; `check TEXT COMMAND...` makes one of a
# command. Everything else that is printed goes into the scenario's log.
#
#   # deadline: SECONDS      in the head of a scenario: its own deadline (180)

scenario=$(basename "$0")
results=/share/out/results
[ -w "$results" ] || results=/dev/stdout
work=/var/tmp/lab/$scenario
kernel=/boot/vmlinux
initramfs=/boot/guest.cpio.gz
daemon_log=$work/dmu-xend.log
slow=$(cat /run/lab-slow 2>/dev/null || echo 1)
count=0
failures=0
mkdir -p "$work"

note() { echo "# $(cut -d ' ' -f 1 /proc/uptime) $*"; }

ok() {
  count=$((count + 1))
  echo "ok $scenario - $*" | tee -a "$results"
}

not_ok() {
  count=$((count + 1))
  failures=$((failures + 1))
  echo "not ok $scenario - $*" | tee -a "$results"
}

# check TEXT COMMAND...: a result from a command's exit status.
check() {
  local text=$1
  shift
  note "check: $*"
  if "$@"; then ok "$text"; else not_ok "$text"; fi
}

# need TEXT COMMAND...: as check, but without it there is no point in going on.
need() {
  local before=$failures
  check "$@"
  [ "$failures" = "$before" ] || finish
}

# finish: the plan, and on a failure what may explain it: more of that by a function `explain` of
# the scenario.
finish() {
  local file
  echo "plan $scenario $count" >>"$results"
  [ "$failures" != 0 ] || cat "$daemon_log"
  if [ "$failures" != 0 ]; then
    ! declare -F explain >/dev/null || explain
    xl list
    xenstore-ls -f /local/domain/0/backend/vbd 2>/dev/null
    for file in "$work"/*.log /var/log/xen/console/guest-"$scenario"*.log /var/log/xen/*.log; do
      [ -s "$file" ] && echo "# tail of $file" && tail -n 40 "$file"
    done
  fi
  exit 0
}

# until_true SECONDS COMMAND...: tries until it succeeds or the time is over.
until_true() {
  local end=$((SECONDS + $1 * slow))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.2
  done
}

# ---- disks ----

# make_base FILE MEGABYTES SEED: a base whose every sector is known.
make_base() {
  rm -f "$1"
  truncate -s "${2}M" "$1"
  labio "base:$1:$3:cached"
}

sum() { sha256sum <"$1" | cut -d ' ' -f 1; }

# line VDEV SPEC: the recommended disk line of a guest's configuration.
line() { echo "script=block-dmu,vdev=$1,access=rw,target=$2"; }

# ---- guests ----

# configure NAME TYPE ORDERS LINE...: writes NAME.cfg. TYPE is pv or pvh.
configure() {
  local name=$1 type=$2 orders=$3 disk disks=
  shift 3
  for disk; do disks="$disks'$disk', "; done
  cat >"$work/$name.cfg" <<END
name = "$name"
type = "$type"
kernel = "$kernel"
ramdisk = "$initramfs"
extra = "console=hvc0 quiet panic=-1 lab=$orders"
memory = 128
vcpus = 1
on_crash = "destroy"
disk = [ $disks]
END
}

console() { echo "/var/log/xen/console/guest-$1.log"; }

# create NAME [ARGUMENT...]: xl create of a configured guest, which begins a new console log. Of a
# line of 2006: xl=dmu-xl.
create() {
  local name=$1
  shift
  [ ! -e "$(console "$name")" ] || : >"$(console "$name")"
  timeout $((90 * slow)) "${xl:-xl}" create "$@" "$work/$name.cfg"
}

# said NAME PATTERN: whether the guest has printed a line like this.
said() { grep -qE -- "$2" "$(console "$1")"; }

# await NAME PATTERN [SECONDS]: waits until it has; a guest that reports a failure of an order
# is not waited for any longer.
await() {
  local end=$((SECONDS + ${3:-90} * slow))
  until said "$1" "$2"; do
    if [ $SECONDS -ge $end ] || said "$1" '^LAB fail'; then
      note "$1 did not print '$2'; its last words:"
      tail -n 20 "$(console "$1")"
      return 1
    fi
    sleep 0.3
  done
}

# order NAME ORDER: types an order on the console of a guest that is listening.
order() {
  await "$1" '^LAB listening' || return 1
  echo "$2" >"$(xenstore-read "/local/domain/$(xl domid "$1")/console/tty")"
}

# obeyed NAME ORDER [SECONDS]: orders, and waits until it is done well (this time).
obeyed() {
  local before
  before=$(times_done "$1" "$2")
  order "$1" "$2" && until_true "${3:-90}" is_done_since "$1" "$2" "$before" &&
    [ "$(times_done "$1" "$2")" -gt "$before" ]
}
times_done() { grep -cE "^LAB ok $2[[:space:]]" "$(console "$1")"; }
is_done_since() { [ "$(times_done "$1" "$2")" -gt "$3" ] || said "$1" '^LAB fail'; }

# no_trouble NAME: the guest has seen no error and no wrong sector.
no_trouble() {
  ! grep -aE '^LAB (fail|error|bad)|I/O error|blk_update_request' "$(console "$1")"
}

# gone NAME [SECONDS]: waits until the domain is no more.
gone() { until_true "${2:-40}" is_gone "$1"; }
is_gone() { ! xl domid "$1"; }

# end_guest NAME: orders it off and waits.
end_guest() { order "$1" poweroff && gone "$1"; }

# refused PATTERN COMMAND...: the command must fail and say something like this.
refused() {
  local pattern=$1 output
  shift
  if output=$("$@" 2>&1); then
    echo "$output"
    note "this should have been refused: $*"
    return 1
  fi
  echo "$output"
  grep -qE -- "$pattern" <<<"$output"
}

# forget: dom0's own disks that a failed attach leaves in xenstore. Node by node: dom0's xenbus does
# not hear of a device whose folder goes.
forget() {
  local vdev
  for vdev in $(xenstore-list /local/domain/0/device/vbd 2>/dev/null); do
    xenstore-rm "/local/domain/0/backend/vbd/0/$vdev" 2>/dev/null
    xenstore-rm "/local/domain/0/device/vbd/$vdev"
  done
  xenstore-rm /libxl/0/device/vbd 2>/dev/null
  until_true 20 no_frontends
}
no_frontends() { ! compgen -G '/sys/bus/xen/devices/vbd-*'; }

# ---- the programs ----

backend() { echo "/local/domain/0/backend/vbd/$(xl domid "$1")/$(vdev_number "$2")"; }

# vdev_number xvdX: 202 << 8 | disk << 4
vdev_number() {
  local letter
  letter=$(printf '%d' "'${1#xvd}")
  echo $((202 * 256 + (letter - 97) * 16))
}

# told NAME VDEV NODE: what the daemon writes about a disk.
told() { xenstore-read "$(backend "$1" "$2")/dmu/$3" 2>/dev/null; }
is_told() { [ "$(told "$1" "$2" "$3")" = "$4" ]; }
is_ready() { is_told "$1" "$2" state ready; }

start_daemon() {
  setsid dmu-xend >>"$daemon_log" 2>&1 </dev/null &
  until_true 30 dmu-xen status
}

# stop_daemon [SIGNAL]
stop_daemon() {
  local pid
  for pid in $(pidof dmu-xend); do kill "-${1:-TERM}" "$pid"; done
  until_true 20 daemon_is_gone
}
daemon_is_gone() { ! pidof dmu-xend; }

# field NAME VDEV FILTER: what `status --json` says of a disk, by a filter of jq.
field() { dmu-xen status --json "$1" | jq -r --arg vdev "$2" ".[] | select(.vdev == \$vdev) | $3"; }
# is_state STATE NAME VDEV
is_state() { [ "$(field "$2" "$3" .state)" = "$1" ]; }
# explains PATTERN NAME VDEV: whether status gives such a reason.
explains() { field "$2" "$3" .error | grep -E -- "$1"; }

# worker NAME VDEV: the process that serves a disk.
worker() { told "$1" "$2" worker; }
is_alive() { kill -0 "$1"; }
no_workers() { ! pidof cowd; }

# no_devices: no nbd device is attached, no device of the module and no loop device is there.
nbd_in_use() { find /sys/block/nbd*/pid 2>/dev/null | wc -l; }
# devices_in_use: how many devices the daemon has, by either way.
devices_in_use() { echo $(($(nbd_in_use) + $(dmsetup ls | grep -c '^dmu-'))); }
no_loops() { [ -z "$(losetup -n -l)" ]; }
no_devices() {
  [ "$(nbd_in_use)" = 0 ] && no_loops &&
    ! dmsetup ls | grep -E '^(dmu-|lab[[:space:]])'
}

# The way that the daemon's configuration wishes, and the one by which a disk then is served.
transport=$(cat /share/transport)
# test, soak, or nothing where scenarios do all that they can.
# shellcheck disable=SC2034  # for scenarios of both
tier=$(cat /share/tier 2>/dev/null || true)
# shellcheck disable=SC2034 # scenarios use it
case $transport in nbd) way=nbd ;; *) way=dm ;; esac

# transport_of NAME VDEV: how the kernel reaches a disk.
transport_of() {
  dmu-xen status --json "$1" | jq -r --arg vdev "$2" '.[] | select(.vdev == $vdev).transport'
}
# comes_by WAY NAME VDEV
comes_by() { [ "$(transport_of "$2" "$3")" = "$1" ]; }

# table_has WORD: whether a line of `dmu-xen status` has it.
table_has() { has_line "$1" dmu-xen status; }

# has_line PATTERN COMMAND...: whether it succeeds and prints such a line; shows all of it.
has_line() {
  local pattern=$1 output
  shift
  output=$("$@") && echo "$output" && grep -qE -- "$pattern" <<<"$output"
}

# acked NAME: how many operations of its loop the guest has been told of.
acked() { sed -n 's/^LAB acked \([0-9]*\) of.*/\1/p' "$(console "$1")" | tail -n 1; }

# progress NAME [SECONDS]: waits until its loop has been told of twenty more.
progress() {
  local from
  from=$(acked "$1")
  until_true "${2:-60}" has_acked "$1" $((${from:-0} + 20))
}
has_acked() { [ "$(acked "$1")" -ge "$2" ]; }

# end_loop NAME ORDER: tells the loop to stop; prints how many operations it was told of.
end_loop() {
  echo stop >"$(xenstore-read "/local/domain/$(xl domid "$1")/console/tty")"
  await "$1" "^LAB ok $2" 120 >&2 || return 1
  acked "$1"
}

has_block_size() { has_line "^Block size: +$2\$" dscow_tool info "$1"; }
workers_are() { [ "$(pidof cowd | wc -w)" = "$1" ]; }

# has_other_worker OLD: whether the disk of the scenario's guest has another worker by now.
has_other_worker() {
  local new
  new=$(worker "$scenario" xvda)
  [ -n "$new" ] && [ "$new" != "$1" ] && is_alive "$new"
}
