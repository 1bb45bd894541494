// SPDX-License-Identifier: Apache-2.0
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

// The head of the ring that a queue's number is the address of. Source: io_setup(2),
// fs/aio.c: the ring may be read, and its head moved on, without a call.
struct ring {
  uint32_t id, count;
  _Atomic uint32_t head, tail;
  uint32_t magic, compatible, incompatible, header;
  struct io_event events[];
};

int dmu_aio_reap(uint64_t queue, uint64_t *tags, int64_t *results, unsigned most) {
  struct ring *ring = (struct ring *)(uintptr_t)queue;
  if (ring->magic != 0xa10a10a1 || ring->incompatible != 0) {
    errno = ENOTSUP;
    return -1;
  }
  uint32_t head = atomic_load(&ring->head), found = 0;
  uint32_t tail = atomic_load(&ring->tail);
  while (head != tail && found < most) {
    tags[found] = ring->events[head].data;
    results[found] = ring->events[head].res;
    head = (head + 1) % ring->count;
    found++;
  }
  if (found > 0) atomic_store(&ring->head, head);
  return (int)found;
}

struct dmu_discards {
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t wake;
  // Guarded by the lock.
  int wanted, over;
  uint64_t range[2];
  int device, zeroing, event, code;
  atomic_int done;
};

static void *discards_body(void *argument) {
  struct dmu_discards *discards = argument;
  pthread_mutex_lock(&discards->lock);
  for (;;) {
    while (!discards->wanted && !discards->over) {
      pthread_cond_wait(&discards->wake, &discards->lock);
    }
    if (!discards->wanted) break;
    discards->wanted = 0;
    pthread_mutex_unlock(&discards->lock);
    unsigned long order = discards->zeroing ? BLKZEROOUT : BLKDISCARD;
    discards->code = ioctl(discards->device, order, discards->range) == 0 ? 0 : errno;
    atomic_store(&discards->done, 1);
    // Nobody can do anything about an event that is full: it is readable, then.
    (void)eventfd_write(discards->event, 1);
    pthread_mutex_lock(&discards->lock);
  }
  pthread_mutex_unlock(&discards->lock);
  return NULL;
}

struct dmu_discards *dmu_discards_open(int device, int event) {
  struct dmu_discards *discards = calloc(1, sizeof(*discards));
  if (!discards) return NULL;
  discards->device = device;
  discards->event = event;
  pthread_mutex_init(&discards->lock, NULL);
  pthread_cond_init(&discards->wake, NULL);
  int error = pthread_create(&discards->thread, NULL, discards_body, discards);
  if (error == 0) return discards;
  free(discards);
  errno = error;
  return NULL;
}

void dmu_discards_close(struct dmu_discards *discards) {
  pthread_mutex_lock(&discards->lock);
  discards->over = 1;
  pthread_cond_signal(&discards->wake);
  pthread_mutex_unlock(&discards->lock);
  pthread_join(discards->thread, NULL);
  free(discards);
}

void dmu_discard_begin(struct dmu_discards *discards, int zeroing, uint64_t offset,
                       uint64_t count) {
  pthread_mutex_lock(&discards->lock);
  discards->range[0] = offset;
  discards->range[1] = count;
  discards->zeroing = zeroing;
  atomic_store(&discards->done, 0);
  discards->wanted = 1;
  pthread_cond_signal(&discards->wake);
  pthread_mutex_unlock(&discards->lock);
}

int dmu_discard_end(struct dmu_discards *discards) {
  return atomic_load(&discards->done) ? discards->code : -1;
}
