# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# boot.sh: what a guest's own root does when the guest is told `boot:DEV`: something like the
# start of a small Debian. It reads programs and files, writes a cache, logs and small files,
# and waits for the disk now and then. bash reads it, with the disk as its root.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
set -e
cd /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs tmp /tmp
mkdir -p /run/lock /var/log /var/lib/boot
log() { echo "$(cut -d ' ' -f 1 /proc/uptime) $*" >>/var/log/boot.log; }
log "begin"
find /etc -xdev -type f -exec cat {} + | cksum >/run/etc
udevadm hwdb --update
log "hardware"
for program in awk bash cat cp dmsetup find grep gzip ip jq less losetup ls lsblk mount perl \
  ps sed sort stat tar udevadm xargs xenstore-ls xl; do
  $program --version >/run/version 2>&1 </dev/null || true
  log "$program"
done
find /usr/lib /usr/sbin -xdev -type f -size -200k -exec cat {} + | cksum >/run/lib
log "files"
sync
cp -r /usr/share/perl* /etc /var/lib/boot/
for i in 1 2 3 4 5 6 7 8; do
  echo "service $i" >"/var/lib/boot/service$i"
  sync "/var/lib/boot/service$i"
done
log "services"
sync
# What comes now is the same for every disk: the next boot finds what this one found.
rm -r /var/lib/boot /var/log/boot.log
cd /
umount /tmp /run /proc
