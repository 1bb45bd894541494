/* SPDX-License-Identifier: Apache-2.0 */
// Requests of a block device that do not wait, in the order in which they are made. As in
// CLinux.h: bare doors, -1 and errno on failure. For the trials of the target only.
#ifndef DMU_CTRIALS_H
#define DMU_CTRIALS_H

#include <stddef.h>
#include <stdint.h>

// What DMU_TRIAL_* asks of a device.
#define DMU_TRIAL_READ 0
#define DMU_TRIAL_WRITE 1
#define DMU_TRIAL_FLUSH 2

// Opens a device for reading and writing past the page cache. Source: open(2), O_DIRECT.
int dmu_trial_open(const char *path);

// An eventfd that does not wait. Source: eventfd(2).
int dmu_trial_event(void);

// A queue for so many requests. Source: io_setup(2).
int dmu_aio_open(unsigned count, uint64_t *queue);
int dmu_aio_close(uint64_t queue);

// Makes a request; `event`, an eventfd, is told of its end. `forced`: a write is durable
// before it ends. Source: io_submit(2).
int dmu_aio_submit(uint64_t queue, int device, int operation, int forced, void *buffer,
                   uint64_t count, int64_t offset, uint64_t tag, int event);

// Takes what has ended, without waiting, from the memory that the kernel shares: it is no call.
// Tags, and results as of read(2), errors negative. Source: io_setup(2).
int dmu_aio_reap(uint64_t queue, uint64_t *tags, int64_t *results, unsigned most);

// A thread for discards, which cannot but wait: one at a time; `event` is told of its end.
struct dmu_discards;
struct dmu_discards *dmu_discards_open(int device, int event);
// None may be under way.
void dmu_discards_close(struct dmu_discards *discards);

// Begins to discard a range, or to make it zeroes. Source: BLKDISCARD, BLKZEROOUT in linux/fs.h.
void dmu_discard_begin(struct dmu_discards *discards, int zeroing, uint64_t offset,
                       uint64_t count);

// Its errno, 0 for success; -1 while it is under way.
int dmu_discard_end(struct dmu_discards *discards);

// Makes a system call by its name, past libc, for the trials of a worker's cage. -1 and errno on
// failure, EINVAL for a name that is not known. "none" makes none, "thread" starts a thread with
// libc and waits for its end.
int dmu_trial_call(const char *name);

#endif
