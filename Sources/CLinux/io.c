#define _GNU_SOURCE
#include "io.h"

#include <fcntl.h>
#include <malloc.h>
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
