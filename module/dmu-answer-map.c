// SPDX-License-Identifier: GPL-2.0-only
/*
 * MAP: checked, remembered, and, for a write or a discard, prepared.
 */
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include "dmu-answer.h"

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
 * of the reserve the few bytes that it needs. So between these two; what is sent to a device is not.
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
	if ((a->flags & DMU_HOLD_FLUSH) &&
	    (a->mark <= READ_ONCE(dev->last_mark) || a->mark > DMU_MAX_MARK))
		return -ERANGE;
	if (!(a->flags & DMU_HOLD_FLUSH) && a->mark)
		return -EINVAL;
	return 0;
}

/* Stores the run, unless it would move what may be in use, and lists its placement. */
static int dmu_remember(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell *cell,
			struct dmu_placement *placement)
{
	unsigned long word = dmu_answer_word(dev, a);
	unsigned int flags;
	int error = 0;

	mutex_lock(&dev->map_mutex);
	spin_lock_irq(&dev->lock);
	if (dmu_preparing_overlap(dev, a->block, a->count, cell, word) ||
	    dmu_placed_overlap(dev, a->block, a->count, word, !(a->flags & DMU_HOLD_FLUSH)))
		error = -EEXIST;
	else if (placement && a->mark <= dev->last_mark)
		error = -ERANGE;	/* grants have used it up meanwhile */
	else if (placement && atomic_read(&dev->uncommitted) >= DMU_MAX_UNCOMMITTED)
		error = -ENOBUFS;
	spin_unlock_irq(&dev->lock);
	if (!error && dmu_extent_conflict(dev, a->block, a->count, word))
		error = -EEXIST;
	if (!error && !(a->flags & DMU_TEMPORARY)) {
		flags = dmu_reserve_save(cell);
		error = dmu_index_ready(dev, a->block, a->count, word, GFP_NOIO);
		dmu_reserve_restore(cell, flags);
	}
	if (!error && placement) {
		spin_lock_irq(&dev->lock);
		dmu_placed_add(dev, placement);
		spin_unlock_irq(&dev->lock);
	}
	dmu_stop(DMU_STOP_LISTED);
	/* Who finds the place finds it uncommitted, too: a forced write asks for that. */
	if (!error && !(a->flags & DMU_TEMPORARY)) {
		dmu_extent_store(dev, a->block, a->count, word);
		dmu_index_bound(dev, a->block, a->count);
	}
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
	placement->mark = a->mark;
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
