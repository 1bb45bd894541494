// SPDX-License-Identifier: GPL-2.0-only
/*
 * The path of a request: through the index if it can, into a queue if it must.
 */
#include "dmu-core.h"

/* A bio that needs more than the index: true when it is held, else as dmu_hold() says. */
static int dmu_map_held(struct dmu_device *dev, struct bio *bio)
{
	bool requeue;

	dmu_io(bio)->arrival = 0;
	dmu_stop(DMU_STOP_HOLDING);
	if (dmu_hold(dev, bio, &requeue))
		return DM_MAPIO_SUBMITTED;
	if (!requeue)
		return -1;
	dmu_returned_note(dev, bio);
	dmu_stop(DMU_STOP_RETURNING);
	return DM_MAPIO_REQUEUE;
}

static int dmu_map_flush(struct dmu_table *table, struct bio *bio)
{
	struct dmu_device *dev = table->dev;
	unsigned int i;

	if (atomic_read(&dev->uncommitted) || table->writable != 1 ||
	    READ_ONCE(dev->flush.failed)) {
		if (dmu_requeueing(dev))
			return DM_MAPIO_REQUEUE;
		dmu_flush_join(dev, bio);
		return DM_MAPIO_SUBMITTED;
	}
	for (i = 0; !table->devs[i].writable; i++)
		;
	dmu_io(bio)->passed = true;
	bio_set_dev(bio, table->devs[i].dm_dev->bdev);
	return DM_MAPIO_REMAPPED;
}

/* Whole blocks are a run for the worker; a rest is ignored, or zeroed as a write is. */
static int dmu_map_discard(struct dmu_device *dev, struct bio *bio)
{
	unsigned int mask = dev->block_sectors - 1, count = bio_sectors(bio);
	u64 sector = bio->bi_iter.bi_sector, end = sector + count;
	unsigned int offset = sector & mask;
	int result;

	if (offset || (count < dev->block_sectors && end != dev->sectors)) {
		count = min(count, dev->block_sectors - offset);
		/* The core puts back a bio that was split behind those that were not. */
		if (count < bio_sectors(bio))
			dm_accept_partial_bio(bio, count);
		if (bio_op(bio) == REQ_OP_DISCARD) {
			bio_endio(bio);
			return DM_MAPIO_SUBMITTED;
		}
	} else if (end & mask && end != dev->sectors) {
		dm_accept_partial_bio(bio, count & ~mask);
	}
	for (;;) {
		result = dmu_map_held(dev, bio);
		if (result >= 0)
			return result;
		if (dmu_try_issue(dev, bio))
			return DM_MAPIO_SUBMITTED;
	}
}

/*
 * The fast path: how many sectors of the bio go where word says, 0 when it has to wait.
 * The caller has entered the epoch and holds the RCU read lock.
 */
static unsigned int dmu_lookup(struct dmu_table *table, struct bio *bio, unsigned long *word)
{
	struct dmu_device *dev = table->dev;
	unsigned int count, blocks, free, removals;
	u64 sector, block, run, size;

again:
	removals = smp_load_acquire(&dev->removals);	/* before the index */
	sector = bio->bi_iter.bi_sector;
	block = dmu_block_of(dev, sector);
	count = bio_sectors(bio);
	*word = dmu_index_lookup(dev, block, dmu_block_of(dev, sector + count - 1) - block + 1,
				 &run);
	if (!*word || (op_is_write(bio_op(bio)) && !dmu_word_writable(*word)))
		return 0;
	count = min_t(u64, count, ((block + run) << dev->block_shift) - sector);
	if (dmu_word_device(*word) != DMU_WORD_ZERO) {
		size = dmu_bdev_sectors(table->devs[dmu_word_device(*word)].dm_dev->bdev);
		sector += dmu_word_shift(*word);
		if (unlikely(sector + count > size)) {
			if (sector < size)
				count = size - sector;
			else
				*word = dmu_word(DMU_WORD_ZERO, false, 0);
		}
	}
	dmu_stop(DMU_STOP_LOOKED);
	smp_rmb();	/* see dmu-core.h: the index before the cells */
	if (unlikely(atomic_read(&dev->busy))) {
		blocks = dmu_block_of(dev, bio->bi_iter.bi_sector + count - 1) - block + 1;
		free = blocks;
		if (dmu_may_wait(dev, block, blocks))
			free = dmu_free_run(dev, block, blocks);
		if (!free)
			return 0;
		if (free < blocks)
			count = ((block + free) << dev->block_shift) - bio->bi_iter.bi_sector;
	}
	if (unlikely(atomic_read(&dev->forcing)) && dmu_forced_may_meet(dev, bio))
		return 0;
	smp_rmb();	/* see dmu-core.h: the cells before the removals */
	if (unlikely(READ_ONCE(dev->removals) != removals))
		goto again;
	return count;
}

static int dmu_remap(struct dmu_table *table, struct bio *bio, unsigned long word,
		     struct dmu_epoch *epoch, bool force)
{
	struct dmu_io *io = dmu_io(bio);

	io->epoch = epoch;
	if (dmu_word_device(word) == DMU_WORD_ZERO) {
		/* A write comes here when its device has become smaller than its place. */
		if (op_is_write(bio_op(bio)))
			bio->bi_status = BLK_STS_IOERR;
		else
			zero_fill_bio(bio);
		bio_endio(bio);
		return DM_MAPIO_SUBMITTED;
	}
	if (force) {
		io->arrival = 0;
		dmu_force(table->dev, bio);
	}
	dmu_failed_note(bio);
	bio_set_dev(bio, table->devs[dmu_word_device(word)].dm_dev->bdev);
	bio->bi_iter.bi_sector += dmu_word_shift(word);
	return DM_MAPIO_REMAPPED;
}

/*
 * The sectors from the bio's first to the end of what may wait as one: a block, or of a larger
 * one as much as the bytes of one answer serve.
 */
static unsigned int dmu_unit_rest(struct dmu_device *dev, struct bio *bio)
{
	unsigned int unit = dev->block_sectors;

	if (bio_op(bio) == REQ_OP_READ)
		unit = min_t(unsigned int, unit, DMU_MAX_DATA >> SECTOR_SHIFT);
	return unit - (bio->bi_iter.bi_sector & (unit - 1));
}

int dmu_map(struct dm_target *ti, struct bio *bio)
{
	struct dmu_table *table = ti->private;
	struct dmu_device *dev = table->dev;
	struct dmu_io *io = dmu_io(bio);
	struct dmu_epoch *epoch;
	unsigned int count, rest;
	unsigned long word;
	bool force;
	int result;

	io->dev = dev;
	io->epoch = NULL;
	io->forced = 0;
	io->written = false;
	io->passed = false;
	if (bio->bi_opf & REQ_PREFLUSH)
		return dmu_map_flush(table, bio);
	bio->bi_iter.bi_sector = dm_target_offset(ti, bio->bi_iter.bi_sector);
	if (unlikely(!list_empty(&dev->returned.notes))) {
		result = dmu_returned_again(dev, bio);
		if (result >= 0)
			return result;
	}
	switch (bio_op(bio)) {
	case REQ_OP_READ:
	case REQ_OP_WRITE:
		break;
	case REQ_OP_DISCARD:
	case REQ_OP_WRITE_ZEROES:
		return dmu_map_discard(dev, bio);
	default:
		return DM_MAPIO_KILL;
	}
	for (;;) {
		rcu_read_lock();
		epoch = dmu_epoch_enter_rcu(dev);
		count = dmu_lookup(table, bio, &word);
		rcu_read_unlock();
		if (likely(count)) {
			force = unlikely(bio->bi_opf & REQ_FUA) &&
				(atomic_read(&dev->uncommitted) || READ_ONCE(dev->flush.failed));
			if (force)
				count = min(count, dmu_unit_rest(dev, bio));
			if (count < bio_sectors(bio))
				dm_accept_partial_bio(bio, count);
			return dmu_remap(table, bio, word, epoch, force);
		}
		dmu_epoch_leave(epoch);
		rest = dmu_unit_rest(dev, bio);
		if (rest < bio_sectors(bio))
			dm_accept_partial_bio(bio, rest);
		result = dmu_map_held(dev, bio);
		if (result >= 0)
			return result;
	}
}

/*
 * A backing device has failed under a request that was sent to it: whoever counts is told, and a
 * write may wait. True when it does. That a device had no place for a request that must not wait
 * is no failure of it.
 */
static bool dmu_io_failed(struct dmu_device *dev, struct bio *bio, blk_status_t status)
{
	int error = -blk_status_to_errno(status);

	if (status == BLK_STS_DM_REQUEUE || status == BLK_STS_AGAIN)
		return false;
	dmu_device_error(dev, bio, op_is_write(bio_op(bio)), error);
	return dmu_failed_hold(dev, bio, error);
}

int dmu_end_io(struct dm_target *ti, struct bio *bio, blk_status_t *error)
{
	struct dmu_io *io = dmu_io(bio);
	bool issued = io->epoch;
	unsigned long flags;

	if (issued) {
		dmu_epoch_leave(io->epoch);
		io->epoch = NULL;
	}
	if (unlikely(*error)) {
		if (io->passed && *error != BLK_STS_DM_REQUEUE)
			dmu_flush_failed(io->dev, blk_status_to_errno(*error));
		else if (issued && dmu_io_failed(io->dev, bio, *error))
			return DM_ENDIO_INCOMPLETE;
		else if (io->written && *error == BLK_STS_DM_REQUEUE)
			dmu_returned_note(io->dev, bio);
	} else if (unlikely(io->forced && !io->written)) {
		io->written = true;
		dmu_flush_join(io->dev, bio);
		return DM_ENDIO_INCOMPLETE;
	}
	if (unlikely(io->forced)) {
		spin_lock_irqsave(&io->dev->lock, flags);
		dmu_forced_end(io->dev, bio);
		spin_unlock_irqrestore(&io->dev->lock, flags);
	}
	return DM_ENDIO_DONE;
}
