#define _GNU_SOURCE
#include "CTrials.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int dmu_trial_open(const char *path) { return open(path, O_RDWR | O_DIRECT | O_CLOEXEC); }

int dmu_trial_event(void) { return eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC); }

int dmu_aio_open(unsigned count, uint64_t *queue) {
  aio_context_t context = 0;
  if (syscall(SYS_io_setup, count, &context) != 0) return -1;
  *queue = context;
  return 0;
}

int dmu_aio_close(uint64_t queue) { return (int)syscall(SYS_io_destroy, (aio_context_t)queue); }

int dmu_aio_submit(uint64_t queue, int device, int operation, int forced, void *buffer,
                   uint64_t count, int64_t offset, uint64_t tag, int event) {
  static const uint16_t codes[] = {IOCB_CMD_PREAD, IOCB_CMD_PWRITE, IOCB_CMD_FSYNC};
  struct iocb order;
  struct iocb *orders = &order;
  memset(&order, 0, sizeof(order));
  order.aio_data = tag;
  order.aio_lio_opcode = codes[operation];
  order.aio_fildes = (uint32_t)device;
  order.aio_rw_flags = forced ? RWF_DSYNC : 0;
  if (operation != DMU_TRIAL_FLUSH) {
    order.aio_buf = (uintptr_t)buffer;
    order.aio_nbytes = count;
    order.aio_offset = offset;
  }
  order.aio_flags = IOCB_FLAG_RESFD;
  order.aio_resfd = (uint32_t)event;
  return syscall(SYS_io_submit, (aio_context_t)queue, 1, &orders) == 1 ? 0 : -1;
}

int dmu_aio_reap(uint64_t queue, uint64_t *tags, int64_t *results, unsigned most) {
  struct io_event events[64];
  struct timespec none = {0, 0};
  if (most > 64) most = 64;
  long count = syscall(SYS_io_getevents, (aio_context_t)queue, 0L, (long)most, events, &none);
  for (long i = 0; i < count; i++) {
    tags[i] = events[i].data;
    results[i] = events[i].res;
  }
  return (int)count;
}

struct dmu_discard {
  pthread_t thread;
  uint64_t range[2];
  int device, zeroing, event, code;
  atomic_int done;
};

static void *discard_body(void *argument) {
  struct dmu_discard *discard = argument;
  int event = discard->event;
  unsigned long order = discard->zeroing ? BLKZEROOUT : BLKDISCARD;
  discard->code = ioctl(discard->device, order, discard->range) == 0 ? 0 : errno;
  atomic_store(&discard->done, 1);
  // Nobody can do anything about an event that is full: it is readable, then.
  (void)eventfd_write(event, 1);
  return NULL;
}

struct dmu_discard *dmu_discard_begin(int device, int zeroing, uint64_t offset, uint64_t count,
                                      int event) {
  struct dmu_discard *discard = calloc(1, sizeof(*discard));
  if (!discard) return NULL;
  discard->range[0] = offset;
  discard->range[1] = count;
  discard->device = device;
  discard->zeroing = zeroing;
  discard->event = event;
  int error = pthread_create(&discard->thread, NULL, discard_body, discard);
  if (error == 0) return discard;
  free(discard);
  errno = error;
  return NULL;
}

int dmu_discard_end(struct dmu_discard *discard) {
  if (!atomic_load(&discard->done)) return -1;
  pthread_join(discard->thread, NULL);
  int code = discard->code;
  free(discard);
  return code;
}
