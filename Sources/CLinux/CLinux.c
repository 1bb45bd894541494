// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "CLinux.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <unistd.h>

int dmu_open(const char *path, int flags, mode_t mode)
{
    return open(path, flags, mode);
}

int dmu_find_plain(const char *path)
{
    struct open_how how = {.flags = O_PATH | O_CLOEXEC,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS |
                                      RESOLVE_NO_MAGICLINKS};
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return -1;
    while (*path == '/')
        path++;
    int found = (int)syscall(SYS_openat2, root, path, &how, sizeof how);
    int saved = errno;
    close(root);
    errno = saved;
    return found;
}

int dmu_find(const char *path)
{
    return open(path, O_PATH | O_CLOEXEC);
}

int dmu_ofd_lock(int fd, short type, int64_t start, int64_t length)
{
    struct flock lock = {
        .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    return fcntl(fd, F_OFD_SETLK, &lock);
}

int dmu_ofd_locked(int fd, int64_t start, int64_t length)
{
    struct flock lock = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    if (fcntl(fd, F_OFD_GETLK, &lock) != 0)
        return -1;
    return lock.l_type != F_UNLCK;
}

int dmu_stat_cached(int fd, const char *path, struct dmu_status *status)
{
    struct statx found;

    if (statx(fd, path, AT_EMPTY_PATH | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC,
              STATX_TYPE | STATX_MODE | STATX_INO | STATX_UID, &found) != 0)
        return -1;
    status->file_system = makedev(found.stx_dev_major, found.stx_dev_minor);
    status->inode = found.stx_ino;
    status->device = makedev(found.stx_rdev_major, found.stx_rdev_minor);
    status->mode = found.stx_mode;
    status->owner = found.stx_uid;
    return 0;
}

int dmu_ioctl_pointer(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument);
}

int dmu_block_device_size(int fd, uint64_t *bytes)
{
    return ioctl(fd, BLKGETSIZE64, bytes);
}

int dmu_punch_hole(int fd, int64_t offset, int64_t count)
{
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, count);
}
