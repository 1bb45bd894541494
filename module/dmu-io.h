/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * dmu-io.c: the path of a request, to its place and back, and what may keep it on the way: a
 * commit, a suspend, a device that fails. See dmu-map.h for what is said of each function.
 */
#ifndef DMU_IO_H
#define DMU_IO_H

#include "dmu-core.h"

/* Of the target: any context that sends bios; process unless the bio must not wait. */
int dmu_map(struct dm_target *ti, struct bio *bio);
int dmu_end_io(struct dm_target *ti, struct bio *bio, blk_status_t *error);

/* Any. Ends a bio, which is the core's again. */
void dmu_end_bio(struct bio *bio, blk_status_t status);

/*
 * Process. Sends a bio to the place that word says. It leaves the epoch, which the caller has
 * entered for it, when it ends. Reads past the end of a backing device are zeroes.
 */
void dmu_issue(struct dmu_device *dev, struct bio *bio, unsigned long word,
	       struct dmu_epoch *epoch);

/* Process. Issues the bio if it is served now; else it is the caller's still. */
bool dmu_try_issue(struct dmu_device *dev, struct bio *bio);

/*
 * Any; takes lock. The write is not durable without the next commit; its sector is the target's
 * still. Until dmu_forced_end() it is listed, and what would change its sectors waits.
 */
void dmu_force(struct dmu_device *dev, struct bio *bio);

/* Any; lock held. It ends, or is not sent for now, and is as it was. */
void dmu_forced_end(struct dmu_device *dev, struct bio *bio);

/* Any; lock held, or, the second, not. Whether the bio changes what a forced one has written. */
bool dmu_forced_meets(struct dmu_device *dev, struct bio *bio);
bool dmu_forced_may_meet(struct dmu_device *dev, struct bio *bio);

/* Any; lock held. A request comes to wait, or is forced, now or in the turn that it had before. */
void dmu_returned_stamp(struct dmu_device *dev, struct bio *bio);

/* Any; takes lock. Notes the order of a request that is about to go back to the core. */
void dmu_returned_note(struct dmu_device *dev, struct bio *bio);

/* Any; takes lock. Notes it, and gives it back: it is the core's again. */
void dmu_give_back(struct dmu_device *dev, struct bio *bio);

/*
 * As dmu_map(); takes lock. A request that comes again: DM_MAPIO_SUBMITTED when it has been taken,
 * to be sent in its turn, DM_MAPIO_REQUEUE while the suspend lasts, -1 when it is none.
 */
int dmu_returned_again(struct dmu_device *dev, struct bio *bio);

/* Any; lock held. Adds those that have come again and wait to bios, which go back once more. */
void dmu_returned_collect(struct dmu_device *dev, struct bio_list *bios);

/* Any; lock held, dev->requeue down. What was given back is about to come again. */
void dmu_returned_expect(struct dmu_device *dev);

/* Process; takes lock. Gives up all notes; who waits for one waits no more. */
void dmu_returned_drop(struct dmu_device *dev);
void dmu_returned_work(struct work_struct *work);

/* Any; lock held. Whether writes wait that have failed, which count on what is mapped. */
bool dmu_failed_waits(struct dmu_device *dev);

/* Any. Notes what of a write is about to be sent: its end may have moved on when it fails. */
void dmu_failed_note(struct bio *bio);

/*
 * Any; takes lock. Takes a write that has failed, if it is to wait; if not it ends with *status, which
 * may have become that it goes back to the core.
 */
bool dmu_failed_hold(struct dmu_device *dev, struct bio *bio, blk_status_t *status);

/* Any; lock held. Adds all that wait to bios; what the worker knows of the question is void. */
void dmu_failed_collect(struct dmu_device *dev, struct bio_list *bios);

/* Process; takes lock. FAIL (a negative errno) or RETRY (0): -ENOENT without such a question. */
int dmu_failed_answer(struct dmu_device *dev, u64 id, int error);
void dmu_failed_work(struct work_struct *work);

#endif
