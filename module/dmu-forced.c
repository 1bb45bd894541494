// SPDX-License-Identifier: GPL-2.0-only
/*
 * Forced writes (FUA): with something uncommitted, or when it has waited, such a write is a write, then
 * a commit.
 *
 * A suspend that comes between the two gives the request back, and it is written once more after the
 * resume. So that nothing newer is written over then, what comes upon its sectors meanwhile waits
 * until it has ended: it is deferred, and all others line up behind it. That is dear and rare: who
 * wants to know what a disk has in the end does not write where a write is still under way.
 *
 * Such a write is within one block, so that a suspend keeps its order: dmu_map() cuts it.
 */
#include "dmu-core.h"

/* A commit has to follow the write, whose sector is the target's still. Any context. */
void dmu_force(struct dmu_device *dev, struct bio *bio)
{
	struct dmu_io *io = dmu_io(bio);
	unsigned long flags;

	bio->bi_opf &= ~REQ_FUA;
	io->forced = bio_sectors(bio);
	io->sector = bio->bi_iter.bi_sector;
	spin_lock_irqsave(&dev->lock, flags);
	dmu_returned_stamp(dev, bio);
	list_add_tail(&io->forcing, &dev->forced);
	atomic_inc(&dev->forcing);
	spin_unlock_irqrestore(&dev->lock, flags);
}

/* It ends, or is not sent for now: as it was. The caller holds dev->lock. */
void dmu_forced_end(struct dmu_device *dev, struct bio *bio)
{
	struct dmu_io *io = dmu_io(bio);

	lockdep_assert_held(&dev->lock);
	bio->bi_opf |= REQ_FUA;
	io->forced = 0;
	list_del(&io->forcing);
	atomic_dec(&dev->forcing);
	if (!bio_list_empty(&dev->deferred))
		mod_delayed_work(dev->wq, &dev->deferred_work, 0);
}

/* Whether the request changes what a forced one has written. The caller holds dev->lock. */
bool dmu_forced_meets(struct dmu_device *dev, struct bio *bio)
{
	u64 start = bio->bi_iter.bi_sector;
	struct dmu_io *io;

	lockdep_assert_held(&dev->lock);
	if (!op_is_write(bio_op(bio)))
		return false;
	list_for_each_entry(io, &dev->forced, forcing)
		if (io->sector < bio_end_sector(bio) && start < io->sector + io->forced)
			return true;
	return false;
}

/* The same for who does not hold dev->lock. */
bool dmu_forced_may_meet(struct dmu_device *dev, struct bio *bio)
{
	unsigned long flags;
	bool meets;

	if (likely(!atomic_read(&dev->forcing)))
		return false;
	spin_lock_irqsave(&dev->lock, flags);
	meets = dmu_forced_meets(dev, bio);
	spin_unlock_irqrestore(&dev->lock, flags);
	return meets;
}
