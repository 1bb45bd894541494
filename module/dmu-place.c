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
#include <linux/slab.h>
#include "dmu-cell.h"
#include "dmu-commit.h"
#include "dmu-core.h"
#include "dmu-grant.h"
#include "dmu-io.h"
#include "dmu-layer.h"
#include "dmu-map.h"
#include "dmu-node.h"
#include "dmu-place.h"
#include "dmu-trace.h"

/* What is not committed. */

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
static void dmu_placed_written(struct dmu_placement *placement)
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

/* The preparation. */

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

/* Of a layer only what this placement has made present is absent again. */
static int dmu_place_erase(struct dmu_cell *cell)
{
	struct dmu_answer *a = &cell->answer;

	if (!dmu_layer_has(cell->dev, a->block, a->count, cell->word))
		return dmu_extent_erase(cell->dev, a->block, a->count);
	if (a->flags & DMU_HOLD_FLUSH)
		dmu_layer_forget(cell->dev, a->block, a->count);
	return 0;
}

/* Takes a place that came to nothing out of the index; memory is there sooner or later. */
static void dmu_place_forget(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;

	for (;;) {
		unsigned int flags = memalloc_noreclaim_save();
		int error;

		mutex_lock(&dev->map_mutex);
		error = dmu_place_erase(cell);
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
	blk_status_t status;

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
	status = errno_to_blk_status(error);
	if (!error || !dmu_failed_hold(dev, bio, &status))
		dmu_end_bio(bio, status);
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

/*
 * MAP: checked, remembered, and, for a write or a discard, prepared.
 */

bool dmu_bad_run(struct dmu_device *dev, u64 block, u64 count)
{
	return !count || block >= dev->blocks || count > dev->blocks - block;
}

/* Checks a place for so many sectors; where nothing is written it may end early. */
int dmu_check_place(struct dmu_device *dev, unsigned int device, u64 sector, u64 count,
			   bool written)
{
	struct dmu_table *table = dev->table;
	struct block_device *bdev;
	u64 size;

	if (device == DMU_DEVICE_ZERO)
		return written ? -EROFS : 0;
	if (device >= table->count)
		return -ENXIO;
	if (written && !table->devs[device].writable)
		return -EROFS;
	bdev = table->devs[device].dm_dev->bdev;
	if (sector & ((bdev_logical_block_size(bdev) >> SECTOR_SHIFT) - 1))
		return -EINVAL;
	size = dmu_bdev_sectors(bdev);
	if (sector > S64_MAX >> 7 || (written && (sector > size || count > size - sector)))
		return -ERANGE;
	return 0;
}

/*
 * What a request waits for may be what makes memory free: it must not wait for memory, and may take
 * of the reserve the few bytes that it needs. So between these two; what is sent to a device is
 * not.
 */
static unsigned int dmu_reserve_save(struct dmu_cell *cell)
{
	return cell ? memalloc_noreclaim_save() : 0;
}

static void dmu_reserve_restore(struct dmu_cell *cell, unsigned int flags)
{
	if (cell)
		memalloc_noreclaim_restore(flags);
}

static unsigned long dmu_answer_word(struct dmu_device *dev, struct dmu_answer *a)
{
	if (a->device == DMU_DEVICE_ZERO)
		return dmu_word(DMU_WORD_ZERO, false, 0);
	return dmu_word(a->device, a->flags & DMU_WRITABLE,
			a->sector - (a->block << dev->block_shift));
}

static int dmu_check_map(struct dmu_device *dev, struct dmu_answer *a)
{
	u32 first = a->flags & (DMU_COPY_FIRST | DMU_ZERO_FIRST);
	int error;

	if (dmu_bad_run(dev, a->block, a->count))
		return -ERANGE;
	if ((a->flags & DMU_TEMPORARY) && (a->flags & DMU_HOLD_FLUSH))
		return -EINVAL;
	if (first && (first & (first - 1) || a->count != 1 || !(a->flags & DMU_WRITABLE)))
		return -EINVAL;
	error = dmu_check_place(dev, a->device, a->sector,
				dmu_run_sectors(dev, a->block, a->count),
				a->flags & DMU_WRITABLE);
	if (error)
		return error;
	if (a->flags & DMU_COPY_FIRST) {
		error = dmu_check_place(dev, a->from_device, a->from_sector, 0, false);
		if (error)
			return error;
	}
	if ((a->flags & DMU_HOLD_FLUSH) && a->mark &&
	    (a->mark <= READ_ONCE(dev->last_mark) || a->mark > DMU_MAX_MARK))
		return -ERANGE;
	if (!(a->flags & DMU_HOLD_FLUSH) && a->mark)
		return -EINVAL;
	return 0;
}

/* Whether a placement can have no mark, or not the one that the answer gives it. */
static bool dmu_mark_bad(struct dmu_device *dev, struct dmu_answer *a)
{
	return a->mark ? a->mark <= dev->last_mark : dev->last_mark >= DMU_MAX_MARK;
}

/* Stores the run, unless it would move what may be in use, and lists its placement. */
static int dmu_remember(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell *cell,
			struct dmu_placement *placement)
{
	unsigned long word = dmu_answer_word(dev, a);
	/* What lies under a layer may be told whatever becomes of the blocks. */
	bool under = dmu_under_layer(dev, a->block, a->count, word);
	unsigned int flags;
	int error = 0;

	mutex_lock(&dev->map_mutex);
	spin_lock_irq(&dev->lock);
	if (under)
		error = 0;
	else if (dmu_preparing_overlap(dev, a->block, a->count, cell, word) ||
	    dmu_placed_overlap(dev, a->block, a->count, word, !(a->flags & DMU_HOLD_FLUSH)))
		error = -EEXIST;
	else if (placement && dmu_mark_bad(dev, a))
		error = -ERANGE;	/* grants have used it up meanwhile */
	else if (placement && atomic_read(&dev->uncommitted) >= DMU_MAX_UNCOMMITTED)
		error = -ENOBUFS;
	spin_unlock_irq(&dev->lock);
	if (!error && dmu_store_conflict(dev, a->block, a->count, word, placement))
		error = -EEXIST;
	if (!error && !(a->flags & DMU_TEMPORARY)) {
		flags = dmu_reserve_save(cell);
		error = dmu_store_ready(dev, a->block, a->count, word, GFP_NOIO);
		dmu_reserve_restore(cell, flags);
	}
	if (!error && placement) {
		spin_lock_irq(&dev->lock);
		/* A flush may have taken it meanwhile. */
		if (dmu_mark_bad(dev, a)) {
			error = -ERANGE;
		} else {
			if (!a->mark)
				a->mark = dev->last_mark + 1;
			placement->mark = a->mark;
			dmu_placed_add(dev, placement);
		}
		spin_unlock_irq(&dev->lock);
	}
	dmu_stop(DMU_STOP_LISTED);
	/* Who finds the place finds it uncommitted, too: a forced write asks for that. */
	if (!error && !(a->flags & DMU_TEMPORARY))
		dmu_store(dev, a->block, a->count, word);
	mutex_unlock(&dev->map_mutex);
	return error;
}

static struct dmu_placement *dmu_placement_make(struct dmu_answer *a, struct dmu_cell *cell,
						bool in_flight)
{
	unsigned int flags = dmu_reserve_save(cell);
	struct dmu_placement *placement;

	placement = kmem_cache_alloc(dmu_placement_cache, GFP_NOIO | __GFP_NOWARN);
	dmu_reserve_restore(cell, flags);
	if (!placement)
		return NULL;
	placement->block = a->block;
	placement->count = a->count;
	placement->sector = a->sector;
	placement->device = a->device;
	placement->writable = a->flags & DMU_WRITABLE;
	placement->in_flight = in_flight;
	INIT_LIST_HEAD(&placement->untold);
	return placement;
}

/* A mapping that is only remembered: unasked, or for a read. */
static int dmu_map_plain(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell *cell)
{
	struct dmu_placement *placement = NULL;
	int error;

	if (a->flags & (DMU_COPY_FIRST | DMU_ZERO_FIRST | DMU_SYNC))
		return -EINVAL;
	if (a->flags & DMU_HOLD_FLUSH) {
		placement = dmu_placement_make(a, cell, false);
		if (!placement)
			return -ENOMEM;
	}
	error = dmu_remember(dev, a, cell, placement);
	if (error && placement)
		kmem_cache_free(dmu_placement_cache, placement);
	return error;
}

static int dmu_map_read(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell *cell)
{
	struct bio *bio;
	int error;

	if (a->block != cell->block)
		error = -ERANGE;
	else
		error = dmu_map_plain(dev, a, cell);
	if (error) {
		dmu_unclaim(cell);
		return error;
	}
	if (a->flags & DMU_TEMPORARY)
		while ((bio = dmu_pop_read(cell)))
			dmu_issue(dev, bio, dmu_answer_word(dev, a), dmu_epoch_enter(dev));
	dmu_process(cell);
	return 0;
}

/* The requests that the worker was asked about have left: its placement comes to nothing. */
static void dmu_map_orphan(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell *cell)
{
	spin_lock_irq(&dev->lock);
	dmu_map_error(dev, cell->event, a->block, a->mark, ECANCELED);
	spin_unlock_irq(&dev->lock);
	cell->event = NULL;
	dmu_process(cell);
}

static int dmu_check_write(struct dmu_answer *a, struct dmu_cell *cell)
{
	if (a->block != cell->block)
		return -ERANGE;
	/* Blocks of a layer that are present are so for good. */
	if (dmu_under_layer(cell->dev, a->block, a->count, dmu_answer_word(cell->dev, a)))
		return -EEXIST;
	/* A write that fails takes its placement along: that must be its own block only. */
	if (cell->type == DMU_FAULT && a->count != 1)
		return -ERANGE;
	if (cell->type == DMU_FAULT)
		return a->flags & DMU_WRITABLE ? 0 : -EINVAL;
	if (a->flags & (DMU_COPY_FIRST | DMU_ZERO_FIRST | DMU_TEMPORARY | DMU_LINKED))
		return -EINVAL;
	if (!(a->flags & DMU_WRITABLE) && a->device != DMU_DEVICE_ZERO)
		return -EINVAL;
	return a->count > cell->count ? -ERANGE : 0;
}

/* A place for a write or a discard. */
static int dmu_map_write(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell *cell,
			 struct dmu_chain *chain)
{
	struct dmu_placement *placement = NULL;
	int error = dmu_check_write(a, cell);
	unsigned int flags;

	if (error)
		goto refuse;
	error = -ENOBUFS;
	flags = dmu_reserve_save(cell);
	cell->event = dmu_event_alloc(dev, GFP_NOIO | __GFP_NOWARN);
	dmu_reserve_restore(cell, flags);
	if (!cell->event)
		goto refuse;
	error = -ENOMEM;
	if (a->flags & DMU_HOLD_FLUSH) {
		placement = dmu_placement_make(a, cell, true);
		if (!placement)
			goto refuse_event;
	}
	spin_lock_irq(&dev->lock);
	if (!cell->orphan)
		cell->active = bio_list_pop(&cell->bios);
	spin_unlock_irq(&dev->lock);
	if (!cell->active) {
		if (placement)
			kmem_cache_free(dmu_placement_cache, placement);
		dmu_map_orphan(dev, a, cell);
		return 0;
	}
	cell->epoch = dmu_epoch_enter(dev);
	error = dmu_remember(dev, a, cell, placement);
	if (error)
		goto refuse_epoch;
	cell->answer = *a;
	cell->word = dmu_answer_word(dev, a);
	cell->placement = placement;
	cell->error = 0;
	if (a->flags & DMU_LINKED) {
		init_completion(&chain->prepared);
		cell->linked = &chain->prepared;
		chain->held = cell;
	}
	spin_lock_irq(&dev->lock);
	cell->state = DMU_PREPARING;
	spin_unlock_irq(&dev->lock);
	dmu_prepare(cell);
	return 0;

refuse_epoch:
	dmu_epoch_leave(cell->epoch);
	cell->epoch = NULL;
	if (placement)
		kmem_cache_free(dmu_placement_cache, placement);
refuse_event:
	dmu_event_free(dev, cell->event);
	cell->event = NULL;
refuse:
	dmu_unclaim(cell);
	return error;
}

static int dmu_map_fault(struct dmu_device *dev, struct dmu_answer *a, struct dmu_chain *chain)
{
	struct dmu_cell *cell;
	int error = dmu_claim(dev, a, &cell);

	if (error)
		return error;
	if (cell->type == DMU_FAULT && (cell->flags & DMU_READ))
		return dmu_map_read(dev, a, cell);
	if (chain->held) {
		dmu_unclaim(cell);
		return -EINVAL;
	}
	return dmu_map_write(dev, a, cell, chain);
}

int dmu_take_map(struct dmu_device *dev, struct dmu_answer *a, struct dmu_chain *chain)
{
	int error = dmu_check_map(dev, a);

	if (error)
		return error;
	if (!a->id)
		return a->flags & DMU_TEMPORARY ? -EINVAL : dmu_map_plain(dev, a, NULL);
	return dmu_map_fault(dev, a, chain);
}
