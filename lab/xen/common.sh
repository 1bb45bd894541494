# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# common.sh: what the host side of the Xen lab shares: the cache, and booting dom0.
#
# LAB_KERNEL is the series of dom0's kernel, 6.1 unless it is set; LAB_TRANSPORT the way that
# the daemon's configuration wishes: auto, dm, nbd. LAB_PROCESSORS is how many processors the
# machine has, 2 unless it is set. Those of a Xen wait for each other without rest: two that have to
# share one of a busy computer's take five times as long as one.
#
# The cache is ${XDG_CACHE_HOME:-~/.cache}/dmu-xen/xen. `prepare` leaves links there for each
# series:
#
#   base-6.1/xen.elf        the hypervisor
#   base-6.1/release        the kernel's release
#   base-6.1/vmlinux        the kernel of dom0 and of the guests, uncompressed
#   base-6.1/dom0.cpio.gz   dom0's first root: finds the disk and the share, and leaves
#   base-6.1/dom0.ext4      dom0's root (never written to: QEMU keeps a snapshot)
#   guest-6.1/guest.cpio.gz the guests' whole world: labio as init, and xen-blkfront
#   guest-6.1/labio         the same program for use in dom0 and on this computer
#   module-6.1.ko           dm-userspace for that kernel, which dom0 puts among its modules

lab_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/dmu-xen/xen

kernel=${LAB_KERNEL:-6.1}
transport=${LAB_TRANSPORT:-auto}
processors="-accel tcg,thread=multi -smp ${LAB_PROCESSORS:-2}"
base=$cache/base-$kernel
guest=$cache/guest-$kernel

say() { printf 'lab: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

# new_share DIST: makes a folder to be given to dom0 and prints its name.
new_share() {
  local share
  share=$(mktemp -d "${TMPDIR:-/tmp}/dmu-xen-lab.XXXXXX")
  mkdir -p "$share/out" "$share/dist" "$share/guest"
  cp -a "$lab_dir/dom0" "$lab_dir/scenarios" "$share/"
  cp "$guest/guest.cpio.gz" "$guest/labio" "$share/guest/"
  cp "$cache/module-$kernel.ko" "$share/guest/dm-userspace.ko"
  echo "$transport" >"$share/transport"
  if [ -n "$1" ]; then
    [ -d "$1" ] || die "no install tree at $1: make install DESTDIR=$1 makes one"
    cp -a "$1/." "$share/dist/"
  fi
  printf '%s\n' "$share"
}

# boot_dom0 SHARE SERIAL...: runs the machine in the foreground of the calling shell (exec),
# so that the caller's $! is the emulator's own process id. Two machines at a time would
# take three times as long, so they queue.
boot_dom0() {
  local share=$1
  shift
  # shellcheck disable=SC2086 # words
  exec qemu-system-x86_64 -name dmu-xen-lab \
    $processors -cpu qemu64,+svm,+npt,-rdtscp -m 3072 \
    -no-reboot -nodefaults -display none "$@" \
    -kernel "$base/xen.elf" \
    -append "console=com1 com1=115200 dom0_mem=1024M,max:1024M bootscrub=0 loglvl=warning" \
    -initrd "$base/vmlinux console=hvc0 quiet panic=-1,$base/dom0.cpio.gz" \
    -drive "file=$base/dom0.ext4,if=virtio,format=raw,snapshot=on" \
    -virtfs "local,path=$share,mount_tag=share,security_model=none"
}

# follow SHARE WORD SECONDS [ARGUMENT...]: boots the machine with these arguments for QEMU besides
# and prints what it writes into SHARE/out/report, until that says `WORD: ...` or the seconds are
# over. A machine that does not come as far as dom0's init is started once more. Succeeds if it
# said `WORD: OK`. Takes the share with it.
follow() {
  local share=$1 word=$2 patience=${LAB_PATIENCE:-1} shown=0 lines alive verdict
  local due=$((SECONDS + $3 * patience)) up_due=$((SECONDS + 180 * patience))
  shift 3
  : >"$share/out/report"
  machine=
  # shellcheck disable=SC2064 # the share as it is now
  trap "end_machine; rm -rf '$share'" EXIT
  trap 'exit 1' HUP INT TERM
  start_machine "$share" "$@"
  while :; do
    # A last look after the machine has ended.
    alive=yes
    kill -0 "$machine" 2>/dev/null || alive=
    lines=$(wc -l <"$share/out/report")
    if [ "$lines" -gt "$shown" ]; then
      sed -n "$((shown + 1)),${lines}p" "$share/out/report" | grep -v "^$word: " || true
      shown=$lines
    fi
    ! grep -q "^$word: " "$share/out/report" || break
    if [ ! -e "$share/out/up" ] && [ "$up_due" != 0 ] && [ $SECONDS -gt "$up_due" ]; then
      say "dom0 hangs in its boot; the machine is started once more"
      end_machine
      start_machine "$share" "$@"
      up_due=0
    elif [ -z "$alive" ] || [ $SECONDS -gt $due ]; then
      tail -n 20 "$share/out/console" "$share/out/qemu" >&2
      echo "$word: FAILED: the machine ${alive:+took too long}${alive:-stopped}"
      return 1
    fi
    sleep 0.3
  done
  verdict=$(grep "^$word: " "$share/out/report" | tail -n 1)
  if [ "$verdict" != "$word: OK" ] && [ -e "$share/out/log" ]; then
    tail -n 100 "$share/out/log" >&2
  fi
  echo "$verdict"
  [ "$verdict" = "$word: OK" ]
}

# start_machine SHARE ARGUMENT...: boots it in the background; `machine` is its process.
start_machine() {
  local share=$1
  boot_dom0 "$@" -serial "file:$share/out/console" </dev/null 2>>"$share/out/qemu" &
  machine=$!
}

end_machine() {
  [ -n "$machine" ] || return 0
  kill "$machine" 2>/dev/null || true
  wait "$machine" 2>/dev/null || true
  machine=
}

# lock_machine: waits for its turn on this computer. LAB_SEAT=N is another queue, with logs of its
# own, for a machine of one processor beside another one.
seat=${LAB_SEAT:+-$LAB_SEAT}
lock_machine() {
  mkdir -p "$cache"
  exec 9>"$cache/machine$seat.lock"
  if ! flock -n 9; then
    say "another lab machine is running; waiting for it to end"
    flock 9
  fi
}
