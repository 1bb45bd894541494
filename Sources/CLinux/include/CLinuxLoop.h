/* SPDX-License-Identifier: Apache-2.0 */
// Loop devices. Same rules as in CLinux.h. Source: loop(4), linux/loop.h.
#ifndef DMU_CLINUX_LOOP_H
#define DMU_CLINUX_LOOP_H

#include <stdint.h>

// Gives a loop device its file, with everything said at once (Linux 5.8). `flags` are those
// of loop(4), `block_size` 0 leaves the choice to the kernel.
int dmu_loop_configure(int loop, int file, uint32_t block_size, uint32_t flags,
                       const char *name);

// What a loop device is built on: the device and inode of its file, and its flags. Fails with
// ENXIO when it is free.
int dmu_loop_status(int loop, uint64_t *device, uint64_t *inode, uint32_t *flags);

// The number of a free loop device, made if need be.
int dmu_loop_get_free(int control);

// Takes the file away: at once, or with the last close.
int dmu_loop_clear(int loop);

// Lets the size follow that of the file.
int dmu_loop_set_capacity(int loop);

// Bytes of the smallest unit that a block device takes. Source: BLKSSZGET in linux/fs.h.
int dmu_block_device_sector(int fd, uint32_t *bytes);

// Opens for reading past the page cache. Source: open(2), O_DIRECT.
int dmu_open_direct(const char *path);

#endif
