// SPDX-License-Identifier: GPL-2.0-only
/*
 * Writes that have failed on their devices, and wait for what the worker makes of that.
 *
 * A full file system under a loop device, or a thin pool that has run out, need not be an error
 * for who writes: somebody may make room. So, when the worker has said HOLD_FAILED, a write that
 * fails does not end. It goes to dev->failed.bios, as it was before it was sent, and the worker
 * is told (WRITES_FAILED). There is one such question at a time, for all of them. Its answer,
 * FAIL or RETRY, is for those that are there when it comes; what fails later raises another.
 *
 * They hold nothing meanwhile: other requests to the same blocks go on. A write that is tried
 * again counts as having come then.
 *
 * A discard is not held: part of it may be done, and a later write may have followed that.
 */
#include "dmu-core.h"

static u64 dmu_wide(struct dmu_device *dev, struct bio *bio)
{
	return dmu_block_of(dev, bio_end_sector(bio) - 1) -
	       dmu_block_of(dev, bio->bi_iter.bi_sector) + 1;
}

/* Whether there are such writes, which count on what is mapped. The caller holds dev->lock. */
bool dmu_failed_waits(struct dmu_device *dev)
{
	struct dmu_failed *failed = &dev->failed;

	lockdep_assert_held(&dev->lock);
	return failed->sending || !bio_list_empty(&failed->bios) ||
	       !bio_list_empty(&failed->again);
}

/* Notes what of a write is about to be sent: its end may have moved on. */
void dmu_failed_note(struct bio *bio)
{
	dmu_io(bio)->iter = bio->bi_iter;
}

/*
 * Takes a write that has failed with a positive errno, if it is to wait. False: it has to fail.
 * Any context.
 */
bool dmu_failed_hold(struct dmu_device *dev, struct bio *bio, int error)
{
	struct dmu_failed *failed = &dev->failed;
	unsigned long flags;
	bool held;

	if (bio_op(bio) != REQ_OP_WRITE)
		return false;
	spin_lock_irqsave(&dev->lock, flags);
	held = failed->hold && !dev->requeue && !dev->failing;
	if (held) {
		bio->bi_status = BLK_STS_OK;
		bio->bi_iter = dmu_io(bio)->iter;
		if (dmu_io(bio)->forced)
			dmu_forced_end(dev, bio);
		dmu_io(bio)->arrival = 0;
		dmu_io(bio)->asked = 0;
		bio_list_add(&failed->bios, bio);
		failed->error = error;
		if (failed->state == DMU_FAILED_IDLE) {
			failed->id = dev->next_id++;
			failed->state = DMU_FAILED_ASKING;
			wake_up(&dev->wait);
		}
	}
	spin_unlock_irqrestore(&dev->lock, flags);
	return held;
}

/* Takes away all that wait; what the worker knows of the question is void. */
void dmu_failed_collect(struct dmu_device *dev, struct bio_list *bios)
{
	struct dmu_failed *failed = &dev->failed;

	lockdep_assert_held(&dev->lock);
	bio_list_merge(bios, &failed->bios);
	bio_list_init(&failed->bios);
	bio_list_merge(bios, &failed->again);
	bio_list_init(&failed->again);
	failed->state = DMU_FAILED_IDLE;
}

/* FAIL (error) or RETRY (0): -ENOENT when there is no such question. */
int dmu_failed_answer(struct dmu_device *dev, u64 id, int error)
{
	struct dmu_failed *failed = &dev->failed;
	struct bio_list bios = BIO_EMPTY_LIST;
	struct bio *bio;

	spin_lock_irq(&dev->lock);
	if (failed->state != DMU_FAILED_ASKED || failed->id != id) {
		spin_unlock_irq(&dev->lock);
		return -ENOENT;
	}
	failed->state = DMU_FAILED_IDLE;
	bio_list_merge(error ? &bios : &failed->again, &failed->bios);
	bio_list_init(&failed->bios);
	spin_unlock_irq(&dev->lock);
	while ((bio = bio_list_pop(&bios)))
		dmu_end_bio(bio, errno_to_blk_status(error));
	if (!error)
		mod_delayed_work(dev->wq, &failed->work, 0);
	return 0;
}

/*
 * The place of a write to several blocks, 0 when they are not mapped as one. *missing is the first one
 * of them that is mapped nowhere, which was forgotten while the write was under way, if that is
 * all; or U64_MAX.
 */
static unsigned long dmu_failed_place(struct dmu_device *dev, u64 block, u64 count, u64 *missing)
{
	unsigned long word, next = 0;
	u64 run, more;

	rcu_read_lock();
	word = dmu_index_lookup(dev, block, count, &run);
	if (word && run < count)
		next = dmu_index_lookup(dev, block + run, 1, &more);
	rcu_read_unlock();
	*missing = U64_MAX;
	if (word && !dmu_word_writable(word))
		return 0;
	if (word && run >= count)
		return word;
	if (!next)
		*missing = word ? block + run : block;
	return 0;
}

/*
 * Sends a write to several blocks, if they are still mapped as one and nobody waits for any of
 * them. Of what is mapped nowhere the worker is asked, once: what it says is not forgotten as long as
 * the write waits. False: not now.
 */
static bool dmu_failed_wide(struct dmu_device *dev, struct bio *bio, u64 count)
{
	u64 block = dmu_block_of(dev, bio->bi_iter.bi_sector), missing;
	struct dmu_epoch *epoch = dmu_epoch_enter(dev);
	unsigned long word = dmu_failed_place(dev, block, count, &missing);

	smp_rmb();	/* see dmu-core.h: the index before the cells */
	if ((atomic_read(&dev->busy) && dmu_free_run(dev, block, count) < count) ||
	    dmu_forced_may_meet(dev, bio)) {
		dmu_epoch_leave(epoch);
		return false;
	}
	if (word) {
		dmu_issue(dev, bio, word, epoch);
		return true;
	}
	dmu_epoch_leave(epoch);
	if (missing == U64_MAX || dmu_io(bio)->asked == missing + 1) {
		dmu_end_bio(bio, BLK_STS_IOERR);
		return true;
	}
	if (dmu_ask_unasked(dev, missing))
		dmu_io(bio)->asked = missing + 1;
	return false;
}

/* Sends a write as if it had just come. False: not now. */
static bool dmu_failed_send(struct dmu_device *dev, struct bio *bio)
{
	u64 count = dmu_wide(dev, bio);
	bool requeue;

	if (count > 1)
		return dmu_failed_wide(dev, bio, count);
	for (;;) {
		if (dmu_hold(dev, bio, &requeue))
			return true;
		if (requeue) {
			dmu_give_back(dev, bio);
			return true;
		}
		if (dmu_try_issue(dev, bio))
			return true;
	}
}

void dmu_failed_work(struct work_struct *work)
{
	struct dmu_failed *failed = container_of(to_delayed_work(work), struct dmu_failed, work);
	struct dmu_device *dev = container_of(failed, struct dmu_device, failed);
	struct bio_list bios, later = BIO_EMPTY_LIST;
	struct bio *bio;
	bool requeue;

	spin_lock_irq(&dev->lock);
	bios = failed->again;
	bio_list_init(&failed->again);
	failed->sending = true;
	spin_unlock_irq(&dev->lock);
	while ((bio = bio_list_pop(&bios)))
		if (!dmu_failed_send(dev, bio))
			bio_list_add(&later, bio);
	spin_lock_irq(&dev->lock);
	failed->sending = false;
	/* A suspend or the administrator may have come for them meanwhile. */
	requeue = dmu_requeueing(dev);
	if (!requeue && !dev->failing && !bio_list_empty(&later)) {
		bio_list_merge_head(&failed->again, &later);
		bio_list_init(&later);
		mod_delayed_work(dev->wq, &failed->work, HZ / 100);
	}
	spin_unlock_irq(&dev->lock);
	while ((bio = bio_list_pop(&later))) {
		if (requeue)
			dmu_give_back(dev, bio);
		else
			dmu_end_bio(bio, BLK_STS_IOERR);
	}
}
