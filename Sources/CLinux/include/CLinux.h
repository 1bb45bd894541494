/* SPDX-License-Identifier: Apache-2.0 */
// What Swift cannot call or spell by itself of Linux's C interface: variadic functions,
// ancillary data, and constants that are macros. Each function is a bare door, returns
// -1 with errno set on failure, and holds no state.
#ifndef DMU_CLINUX_H
#define DMU_CLINUX_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "CLinuxLoop.h"
#include "CLinuxProcess.h"
#include "io.h"

// Opens with a creation mode. Source: open(2).
int dmu_open(const char *path, int flags, mode_t mode);

// Finds what a path from the root on names, following no symbolic link; the descriptor (O_PATH) can
// be examined and opened by /proc/self/fd. ELOOP where there is a link. Source: openat2(2),
// RESOLVE_NO_SYMLINKS, which implies RESOLVE_NO_MAGICLINKS, and RESOLVE_BENEATH.
int dmu_find_plain(const char *path);

// Finds what a path names, links followed. Source: open(2), O_PATH.
int dmu_find(const char *path);

// Places (type F_WRLCK or F_RDLCK) or drops (F_UNLCK) a lock on a range, length 0 meaning up
// to the end, that belongs to the open file description, without waiting. Source: fcntl(2),
// "Open file description locks".
int dmu_ofd_lock(int fd, short type, int64_t start, int64_t length);

// Whether another open file description has any lock in a range: 1 or 0.
int dmu_ofd_locked(int fd, int64_t start, int64_t length);

// Which file something is: its file system's device and its inode, as stat(2) reports them, the
// device that a node stands for, type and permissions, and owner.
struct dmu_status {
    uint64_t file_system, inode, device;
    uint32_t mode, owner;
};

// The status of what a path leads to, or of an open file when the path is "". What the kernel has
// of it is returned; no server is asked, who might not answer. Source: statx(2),
// AT_STATX_DONT_SYNC.
int dmu_stat_cached(int fd, const char *path, struct dmu_status *status);

// An ioctl whose argument is a pointer. Source: ioctl(2).
int dmu_ioctl_pointer(int fd, unsigned long request, void *argument);

// Length in bytes of a block device. Source: BLKGETSIZE64 in linux/fs.h.
int dmu_block_device_size(int fd, uint64_t *bytes);

// Makes a range of a file read as zeroes and gives its space back, the length unchanged.
// Source: fallocate(2).
int dmu_punch_hole(int fd, int64_t offset, int64_t count);

#endif
