/* SPDX-License-Identifier: Apache-2.0 */
// I/O that must not wait, and what goes with it. Same rules as in CLinux.h.
#ifndef DMU_CLINUX_IO_H
#define DMU_CLINUX_IO_H

#include <stddef.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/types.h>

// Reads what is at hand without waiting for a medium; fails with EAGAIN when nothing is.
// Source: preadv2(2), RWF_NOWAIT.
ssize_t dmu_pread_nowait(int fd, void *buffer, size_t count, off_t offset);

// Writes without waiting; fails with EAGAIN, or with EOPNOTSUPP where the file system
// cannot promise that. Source: pwritev2(2), RWF_NOWAIT.
ssize_t dmu_pwrite_nowait(int fd, const void *buffer, size_t count, off_t offset);

// Makes a range of a file read as zeroes and keeps its space. Source: fallocate(2).
int dmu_zero_range(int fd, int64_t offset, int64_t count);

// Gives a range of a file its space, lengthening it when need be. Source: fallocate(2).
int dmu_allocate(int fd, int64_t offset, int64_t count);

// Has reads and writes pass the page cache by (O_DIRECT), or not, for every descriptor of the open
// file. EINVAL where the file system cannot. Source: fcntl(2), F_SETFL.
int dmu_set_direct(int fd, int on);

// Whether they do; -1 with errno.
int dmu_is_direct(int fd);

// Writes a range of a file out, waits for that, and forgets what the page cache has of it.
// Source: sync_file_range(2), posix_fadvise(2).
int dmu_settle_range(int fd, int64_t offset, int64_t count);

// Bytes that a file's file system has left for anybody. Source: fstatvfs(3).
int dmu_free_space(int fd, uint64_t *bytes);

// Copies between files within the kernel. Source: copy_file_range(2).
ssize_t dmu_copy_range(int from, off_t *source, int to, off_t *offset, size_t count);

// Memory of a fixed length as a file: nobody can make it longer or shorter. Source:
// memfd_create(2), F_ADD_SEALS in fcntl(2).
int dmu_sealed_memory(const char *name, off_t length);

// A file in a directory that has no name and goes with its descriptor; then a name for it.
// Source: open(2), O_TMPFILE.
int dmu_unnamed_file(const char *directory, mode_t mode);
int dmu_name_file(int fd, const char *path);

// The next place with data at or after an offset, or the next hole. Source: lseek(2).
off_t dmu_seek_data(int fd, off_t offset);
off_t dmu_seek_hole(int fd, off_t offset);

// Gives free memory of the allocator back to the system. Source: malloc_trim(3).
void dmu_trim_memory(void);

#endif
