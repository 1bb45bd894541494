// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "CLinuxLoop.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <stdio.h>
#include <sys/ioctl.h>

int dmu_loop_configure(int loop, int file, uint32_t block_size, uint32_t flags,
                       const char *name) {
  struct loop_config config = {.fd = (uint32_t)file, .block_size = block_size};

  config.info.lo_flags = flags;
  snprintf((char *)config.info.lo_file_name, LO_NAME_SIZE, "%s", name);
  return ioctl(loop, LOOP_CONFIGURE, &config);
}

int dmu_loop_status(int loop, uint64_t *device, uint64_t *inode, uint32_t *flags) {
  struct loop_info64 info;
  int result = ioctl(loop, LOOP_GET_STATUS64, &info);

  if (result == 0) {
    *device = info.lo_device;
    *inode = info.lo_inode;
    *flags = info.lo_flags;
  }
  return result;
}

int dmu_loop_get_free(int control) { return ioctl(control, LOOP_CTL_GET_FREE); }

int dmu_loop_clear(int loop) { return ioctl(loop, LOOP_CLR_FD); }

int dmu_loop_set_capacity(int loop) { return ioctl(loop, LOOP_SET_CAPACITY); }

int dmu_block_device_sector(int fd, uint32_t *bytes) {
  int size = 0;
  int result = ioctl(fd, BLKSSZGET, &size);

  *bytes = (uint32_t)size;
  return result;
}

int dmu_open_direct(const char *path) { return open(path, O_RDONLY | O_DIRECT | O_CLOEXEC); }
