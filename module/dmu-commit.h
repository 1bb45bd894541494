/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * dmu-commit.c: the rounds of a flush, and invalidations. See dmu-map.h for what is said of each
 * function.
 */
#ifndef DMU_COMMIT_H
#define DMU_COMMIT_H

#include "dmu-core.h"

/* Any. What was to be durable may be lost: all flushes fail until clear_error. */
void dmu_flush_failed(struct dmu_device *dev, int error);

/*
 * Any; takes lock. A flush, or a forced write that is written, waits for the next commit; or goes
 * back to the core, where a suspend wants it.
 */
void dmu_flush_join(struct dmu_device *dev, struct bio *bio);

/* Any. A placement's data is written: a flush may wait for that. */
void dmu_flush_kick(struct dmu_device *dev);

/* Process: the works of the flush, and of what is uncommitted for long. */
void dmu_flush_work(struct work_struct *work);
void dmu_flush_late(struct work_struct *work);

/* Process; takes lock; no request is left. Waits for the devices, under a flush of our own. */
void dmu_flush_suspend(struct dmu_device *dev);

/*
 * Process, under answer_mutex; takes lock, lets go of it on its way; sleeps. FLUSH_DONE (0) or
 * FAIL (a negative errno): -ENOENT without a question.
 */
int dmu_flush_answer(struct dmu_device *dev, u64 id, int error);

/* Process: the work that turns the epoch for those invalidations that wait. */
void dmu_epoch_work(struct work_struct *work);

/* Process, with the device alone; the second waits for a turn that is under way. */
int dmu_epochs_init(struct dmu_device *dev);
void dmu_epochs_exit(struct dmu_device *dev);

#endif
