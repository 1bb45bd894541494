// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

ssize_t dmu_pread_nowait(int fd, void *buffer, size_t count, off_t offset)
{
    struct iovec vector = {.iov_base = buffer, .iov_len = count};
    return preadv2(fd, &vector, 1, offset, RWF_NOWAIT);
}

ssize_t dmu_pwrite_nowait(int fd, const void *buffer, size_t count, off_t offset)
{
    struct iovec vector = {.iov_base = (void *)buffer, .iov_len = count};
    return pwritev2(fd, &vector, 1, offset, RWF_NOWAIT);
}

int dmu_zero_range(int fd, int64_t offset, int64_t count)
{
    return fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, count);
}

int dmu_allocate(int fd, int64_t offset, int64_t count)
{
    return fallocate(fd, 0, offset, count);
}

int dmu_settle_range(int fd, int64_t offset, int64_t count)
{
    unsigned int all = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
                       SYNC_FILE_RANGE_WAIT_AFTER;

    if (sync_file_range(fd, offset, count, all))
        return -1;
    errno = posix_fadvise(fd, offset, count, POSIX_FADV_DONTNEED);
    return errno ? -1 : 0;
}

int dmu_set_direct(int fd, int on)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags < 0)
        return -1;
    flags = on ? flags | O_DIRECT : flags & ~O_DIRECT;
    return fcntl(fd, F_SETFL, flags);
}

int dmu_is_direct(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    return flags < 0 ? -1 : (flags & O_DIRECT) != 0;
}

int dmu_free_space(int fd, uint64_t *bytes)
{
    struct statvfs status;

    if (fstatvfs(fd, &status))
        return -1;
    *bytes = (uint64_t)status.f_bavail * status.f_frsize;
    return 0;
}

ssize_t dmu_copy_range(int from, off_t *source, int to, off_t *offset, size_t count)
{
    return copy_file_range(from, source, to, offset, count, 0);
}

int dmu_sealed_memory(const char *name, off_t length)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    if (ftruncate(fd, length) != 0 ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}

int dmu_unnamed_file(const char *directory, mode_t mode)
{
    return open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, mode);
}

int dmu_name_file(int fd, const char *path)
{
    char link[32];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    return linkat(AT_FDCWD, link, AT_FDCWD, path, AT_SYMLINK_FOLLOW);
}

off_t dmu_seek_data(int fd, off_t offset)
{
    return lseek(fd, offset, SEEK_DATA);
}

off_t dmu_seek_hole(int fd, off_t offset)
{
    return lseek(fd, offset, SEEK_HOLE);
}

void dmu_trim_memory(void)
{
    malloc_trim(0);
}
