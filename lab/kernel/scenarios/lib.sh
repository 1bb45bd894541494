# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What the scenarios of the kernel lab are written with. Sourced; runs inside the machine.
#
# Given: DMU_PROGRAMS (cowd, dscow_tool, ...), DMU_WORK (tools), DMU_SEED, DMU_ROUNDS.
set -euo pipefail
programs=$DMU_PROGRAMS
# shellcheck disable=SC2034  # for the scenarios
seed=${DMU_SEED:-1}
# shellcheck disable=SC2034
rounds=${DMU_ROUNDS:-1}
cowd=
exec {never}<> <(:)

die() { echo "${0##*/}: $*"; exit 1; }
# A word for the log; on the host it is seen at once.
note() { echo "# $*" | tee -a "$DMU_WORK/progress"; }

# This kernel has no namespaces, so no worker here is caged.
# serve NAME STORE [OPTION...]: starts cowd and waits until the device is there. The store is of
# the format that the variable says, dscow unless it is set.
serve() {
    local name=$1 store=$2 line
    shift 2
    : >"/mnt/$name.said"
    "$programs/cowd" --no-sandbox -p "${format:-dscow}" --transport dm "$@" "$name" "$store" \
        >"/mnt/$name.said" 2>"/mnt/$name.errors" &
    cowd=$!
    for _ in {1..1500}; do
        while read -r line; do
            case $line in *"is served"*) return ;; esac
        done <"/mnt/$name.said"
        kill -0 "$cowd" 2>/dev/null || { cat "/mnt/$name.errors"; die "cowd has ended"; }
        # A sleep that is no process.
        read -rt 0.02 <&"$never" || true
    done
    die "cowd does not serve $store"
}

# stop NAME: ends cowd in order; the device is gone afterwards.
stop() {
    local status=0
    kill -TERM "$cowd"
    wait "$cowd" || status=$?
    cowd=
    [ $status -eq 0 ] || { cat "/mnt/$1.errors"; die "cowd ended with $status"; }
    [ ! -e "/dev/mapper/$1" ] || die "/dev/mapper/$1 is left behind"
}

# make_base FILE MEGABYTES: an ext4 file system with something in it.
make_base() {
    truncate -s "$2M" "$1"
    mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0 -J size=4 "$1"
}

sound() { # STORE: the image has no damage
    local status=0
    "$programs/dscow_tool" check "$1" >/mnt/check.said 2>&1 || status=$?
    case $status in 0 | 3) ;; *) cat /mnt/check.said; die "$1 is damaged" ;; esac
}

whole() { # FS DEVICE: the file system, which is not mounted, has no damage
    case $1 in
    ext4) e2fsck -fn "$2" ;;
    xfs) xfs_repair -n "$2" ;;
    esac >/mnt/fsck.said 2>&1 || { cat /mnt/fsck.said; return 1; }
}
