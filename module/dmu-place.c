// SPDX-License-Identifier: GPL-2.0-only
/*
 * How a block gets to a new place, and which placements are not committed yet.
 *
 * A prepared cell goes through two steps: what the write does not cover is copied or zeroed
 * (kcopyd, in pieces) and, beside that, the write itself goes there, sent by whoever placed it
 * (cell->pending counts all of them); then the placement counts as written, the request ends and,
 * in process context, the queue behind it is served. Any failure ends in the second step too,
 * which then takes the place out of the index again and reports MAP_ERROR. Nobody reads at the
 * place before that. The cell is in its epoch throughout.
 *
 * kcopyd's own thread sends nothing of ours: a write that has to wait there would keep all copies
 * waiting, and one that needs kcopyd itself would wait for ever.
 */
#include <linux/delay.h>
#include <linux/sched/mm.h>
#include "dmu-core.h"

static struct block_device *dmu_bdev(struct dmu_device *dev, unsigned int device)
{
	return dev->table->devs[device].dm_dev->bdev;
}

/*
 * The second step of what went well, in any context: no work item for a request that nobody
 * queues behind. What it cannot do is left to dmu_place_work().
 */
static void dmu_place_done(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;
	struct dmu_epoch *epoch = cell->epoch;
	struct dmu_event *event = cell->event;
	struct bio *bio = cell->active;
	unsigned long flags;
	bool more;

	dmu_stop(DMU_STOP_WRITTEN);
	if (cell->error || cell->linked || cell->type == DMU_DISCARD ||
	    cell->answer.flags & DMU_SYNC) {
		queue_work(dev->wq, &cell->work);
		return;
	}
	spin_lock_irqsave(&dev->lock, flags);
	if (cell->placement)
		dmu_placed_written(cell->placement);
	cell->placement = NULL;
	cell->epoch = NULL;
	cell->event = NULL;
	cell->active = NULL;
	cell->state = DMU_CLAIMED;
	dev->event_count--;
	more = !bio_list_empty(&cell->bios);
	if (!more)
		dmu_cell_remove(cell);
	spin_unlock_irqrestore(&dev->lock, flags);
	kmem_cache_free(dmu_event_cache, event);
	dmu_epoch_leave(epoch);
	dmu_flush_kick(dev);
	if (more)
		queue_work(dev->wq, &cell->work);
	dmu_end_bio(bio, BLK_STS_OK);
}

/* A copy, or the write, has ended. */
static void dmu_place_put(struct dmu_cell *cell)
{
	if (atomic_dec_and_test(&cell->pending))
		dmu_place_done(cell);
}

static void dmu_place_copied(int read_error, unsigned long write_error, void *context)
{
	struct dmu_cell *cell = context;

	/* How the write failed says more. */
	if (read_error || write_error)
		cmpxchg(&cell->error, 0, -EIO);
	dmu_place_put(cell);
}

static void dmu_place_zero(struct dmu_cell *cell, u64 sector, u64 count)
{
	struct dm_io_region to = {
		.bdev = dmu_bdev(cell->dev, cell->answer.device),
		.sector = sector,
		.count = count,
	};

	atomic_inc(&cell->pending);
	dm_kcopyd_zero(cell->dev->kcopyd, 1, &to, 0, dmu_place_copied, cell);
}

/* Brings count sectors of the block, from offset on, along to the new place. */
static void dmu_place_carry(struct dmu_cell *cell, u64 offset, u64 count)
{
	struct dmu_answer *a = &cell->answer;
	u64 sector = a->sector + offset;
	struct dm_io_region from, to;
	u64 size;

	if ((a->flags & DMU_COPY_FIRST) && a->from_device != DMU_DEVICE_ZERO) {
		from.bdev = dmu_bdev(cell->dev, a->from_device);
		from.sector = a->from_sector + offset;
		size = dmu_bdev_sectors(from.bdev);
		from.count = from.sector < size ? min(count, size - from.sector) : 0;
		if (from.count) {
			to.bdev = dmu_bdev(cell->dev, a->device);
			to.sector = sector;
			to.count = from.count;
			atomic_inc(&cell->pending);
			dm_kcopyd_copy(cell->dev->kcopyd, &from, 1, &to, 0, dmu_place_copied,
				       cell);
			sector += from.count;
			count -= from.count;
		}
	}
	if (count)
		dmu_place_zero(cell, sector, count);
}

static void dmu_place_end_io(struct bio *bio)
{
	struct dmu_io *io = dmu_io(bio);
	struct dmu_cell *cell = io->cell;
	int error;

	bio->bi_end_io = io->saved_end_io;
	if (bio->bi_status) {
		error = blk_status_to_errno(bio->bi_status);
		WRITE_ONCE(cell->error, error);
		dmu_device_error(cell->dev, bio, true, -error);
	}
	dmu_place_put(cell);
}

/* The request itself goes to the new place. The caller is done with the cell. */
static void dmu_place_write(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;
	struct bio *bio = cell->active;
	struct dmu_io *io = dmu_io(bio);
	u64 sector = cell->answer.sector +
		     (bio->bi_iter.bi_sector & (dev->block_sectors - 1));

	dmu_stop(DMU_STOP_WRITING);
	if (bio->bi_opf & REQ_FUA)
		dmu_force(dev, bio);
	if (bio_op(bio) == REQ_OP_WRITE_ZEROES) {
		struct dm_io_region to = {
			.bdev = dmu_bdev(dev, cell->answer.device),
			.sector = sector,
			.count = bio_sectors(bio),
		};

		dm_kcopyd_zero(dev->kcopyd, 1, &to, 0, dmu_place_copied, cell);
		return;
	}
	io->cell = cell;
	io->saved_end_io = bio->bi_end_io;
	bio->bi_end_io = dmu_place_end_io;
	bio_set_dev(bio, dmu_bdev(dev, cell->answer.device));
	bio->bi_iter.bi_sector = sector;
	dmu_submit_bio(bio);
}

/* Starts the preparation that the cell's answer asks for. Process context. */
void dmu_prepare(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;
	struct dmu_answer *a = &cell->answer;
	u64 size = dmu_run_sectors(dev, cell->block, 1);
	u64 offset, end;

	atomic_set(&cell->pending, 1);	/* the write, or that of a discard all is begun */
	dmu_failed_note(cell->active);
	if (cell->type == DMU_DISCARD) {
		if (a->device != DMU_DEVICE_ZERO)
			dmu_place_zero(cell, a->sector,
				       dmu_run_sectors(dev, a->block, a->count));
	} else if (a->flags & (DMU_COPY_FIRST | DMU_ZERO_FIRST)) {
		offset = cell->active->bi_iter.bi_sector & (dev->block_sectors - 1);
		end = offset + bio_sectors(cell->active);
		if (offset || end < size)
			dmu_count(dev, DMU_STAT_COPIES);
		if (offset)
			dmu_place_carry(cell, 0, offset);
		if (end < size)
			dmu_place_carry(cell, end, size - end);
	}
	if (cell->type == DMU_FAULT)
		dmu_place_write(cell);
	else
		dmu_place_put(cell);
}

/* Takes a place that came to nothing out of the index; memory is there sooner or later. */
static void dmu_place_forget(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;

	for (;;) {
		unsigned int flags = memalloc_noreclaim_save();
		int error;

		mutex_lock(&dev->map_mutex);
		error = dmu_extent_erase(dev, cell->answer.block, cell->answer.count);
		mutex_unlock(&dev->map_mutex);
		memalloc_noreclaim_restore(flags);
		if (!error)
			return;
		msleep(20);
	}
}

/* Says that the placement is done, if anyone is to hear of it. */
static void dmu_place_tell(struct dmu_cell *cell)
{
	struct dmu_answer *a = &cell->answer;
	struct dmu_event *event = cell->event;

	cell->event = NULL;
	if (a->flags & DMU_SYNC) {
		event->message.type = DMU_SYNC_DONE;
		event->message.id = a->id;
		event->message.block = a->block;
		event->message.count = a->count;
		event->message.mark = a->mark;
		dmu_event_post(cell->dev, event);
	} else {
		dmu_event_free(cell->dev, event);
	}
}

/* The second step, in process context. */
void dmu_place_work(struct work_struct *work)
{
	struct dmu_cell *cell = container_of(work, struct dmu_cell, work);
	struct dmu_device *dev = cell->dev;
	struct completion *linked = cell->linked;
	struct dmu_answer *a = &cell->answer;
	struct bio *bio = cell->active;
	int error = cell->error;

	if (!bio) {
		/* dmu_place_done() has been here. */
		dmu_process(cell);
		return;
	}
	if (linked) {
		cell->linked = NULL;
		complete(linked);
		return;
	}
	if (error && !(a->flags & DMU_TEMPORARY))
		dmu_place_forget(cell);
	dmu_stop(DMU_STOP_FORGOTTEN);
	spin_lock_irq(&dev->lock);
	if (cell->placement) {
		if (error)
			dmu_placed_drop(dev, cell->placement);
		else
			dmu_placed_written(cell->placement);
		cell->placement = NULL;
	}
	if (error) {
		dmu_map_error(dev, cell->event, a->block, a->mark, -error);
		cell->event = NULL;
	}
	spin_unlock_irq(&dev->lock);
	dmu_stop(DMU_STOP_DROPPED);
	if (!error)
		dmu_place_tell(cell);
	dmu_epoch_leave(cell->epoch);
	cell->epoch = NULL;
	cell->error = 0;
	dmu_flush_kick(dev);
	if (cell->type == DMU_DISCARD && !error) {
		dmu_advance(cell, a->count);
		return;
	}
	cell->active = NULL;
	if (!error || !dmu_failed_hold(dev, bio, -error))
		dmu_end_bio(bio, errno_to_blk_status(error));
	dmu_stop(DMU_STOP_ENDED);
	spin_lock_irq(&dev->lock);
	cell->state = DMU_CLAIMED;
	spin_unlock_irq(&dev->lock);
	dmu_process(cell);
}

static void dmu_zero_bio_done(int read_error, unsigned long write_error, void *context)
{
	dmu_end_bio(context, write_error ? BLK_STS_IOERR : BLK_STS_OK);
}

/* A write-zeroes that is mapped: not every device takes one, kcopyd knows what to do. */
void dmu_zero_bio(struct dmu_device *dev, struct bio *bio, unsigned long word,
		  struct dmu_epoch *epoch)
{
	struct dm_io_region to = {
		.bdev = dmu_bdev(dev, dmu_word_device(word)),
		.sector = bio->bi_iter.bi_sector + dmu_word_shift(word),
		.count = bio_sectors(bio),
	};
	struct dmu_io *io = dmu_io(bio);

	io->epoch = epoch;
	if (bio->bi_opf & REQ_FUA)
		dmu_force(dev, bio);
	dm_kcopyd_zero(dev->kcopyd, 1, &to, 0, dmu_zero_bio_done, bio);
}

static unsigned long dmu_placed_word(struct dmu_device *dev, struct dmu_placement *placement)
{
	if (placement->device == DMU_DEVICE_ZERO)
		return dmu_word(DMU_WORD_ZERO, false, 0);
	return dmu_word(placement->device, placement->writable,
			placement->sector - (placement->block << dev->block_shift));
}

/*
 * Whether an uncommitted placement lies in the run, other than, where that is allowed, one
 * that says the same.
 */
bool dmu_placed_overlap(struct dmu_device *dev, u64 block, u64 count, unsigned long word,
			bool same_allowed)
{
	struct rb_node *node = dev->placed.rb_node, *first = NULL;
	struct dmu_placement *placement;

	lockdep_assert_held(&dev->lock);
	while (node) {
		placement = rb_entry(node, struct dmu_placement, node);
		if (placement->block + placement->count <= block) {
			node = node->rb_right;
		} else {
			first = node;
			node = node->rb_left;
		}
	}
	for (node = first; node; node = rb_next(node)) {
		placement = rb_entry(node, struct dmu_placement, node);
		if (placement->block >= block + count)
			break;
		if (!same_allowed || dmu_placed_word(dev, placement) != word)
			return true;
	}
	return false;
}

/* Lists a placement; it overlaps no other, and its mark is the highest. */
void dmu_placed_add(struct dmu_device *dev, struct dmu_placement *placement)
{
	struct rb_node **link = &dev->placed.rb_node, *parent = NULL;
	unsigned int count;

	lockdep_assert_held(&dev->lock);
	while (*link) {
		parent = *link;
		if (placement->block < rb_entry(parent, struct dmu_placement, node)->block)
			link = &parent->rb_left;
		else
			link = &parent->rb_right;
	}
	rb_link_node(&placement->node, parent, link);
	rb_insert_color(&placement->node, &dev->placed);
	list_add_tail(&placement->list, &dev->placements);
	if (placement->in_flight)
		list_add_tail(&placement->writing, &dev->writing);
	WRITE_ONCE(dev->last_mark, placement->mark);
	count = atomic_inc_return(&dev->uncommitted);
	if (count == 1) {
		dev->flush.uncommitted = jiffies;
		queue_delayed_work(dev->wq, &dev->flush.late, DMU_ASK_AFTER);
	} else if (!(count % DMU_ASK_COMMIT)) {
		dev->flush.wanted = true;
		queue_work(dev->wq, &dev->flush.work);
	}
}

/* Its data is in its place. The caller holds dev->lock. */
void dmu_placed_written(struct dmu_placement *placement)
{
	placement->in_flight = false;
	list_del(&placement->writing);
}

void dmu_placed_drop(struct dmu_device *dev, struct dmu_placement *placement)
{
	lockdep_assert_held(&dev->lock);
	if (dev->dumping && dev->dump_next == &placement->list)
		dev->dump_next = placement->list.next;
	if (placement->in_flight)
		list_del(&placement->writing);
	rb_erase(&placement->node, &dev->placed);
	dmu_grant_told(dev, placement);
	list_del(&placement->list);
	atomic_dec(&dev->uncommitted);
	kmem_cache_free(dmu_placement_cache, placement);
}
