// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the worker says. Every answer is checked to the end before it changes anything; a
 * refused one has changed nothing.
 *
 *   EINVAL     unknown type or flag, a combination that means nothing, a place that is not
 *              aligned as its device wants it
 *   ENOENT     no such fault is waiting, or it is of another kind
 *   ERANGE     blocks outside the device, a place outside its backing device, a mark that
 *              is not greater than all before it
 *   ENXIO      no such backing device
 *   EROFS      that backing device may not be written
 *   EEXIST     the run overlaps what is uncommitted, being prepared or mapped elsewhere
 *   EFAULT     the bytes of DATA cannot be read
 *   ENOMEM     not now
 *   ENOBUFS    too many unread messages
 *   ECANCELED  an answer that this one was linked to came to nothing
 *   ENODEV     the device is gone
 *
 * A chain of LINKED answers is worked off in order; its one MAP to a write is not completed
 * before the end of the chain is done.
 */
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include <linux/uio.h>
#include "dmu-core.h"
#include "dmu-trace.h"

struct dmu_chain {
	bool linked;			/* the next answer belongs to the last one */
	int error;			/* of an earlier member */
	struct dmu_cell *held;
	struct completion prepared;
};

static bool dmu_bad_run(struct dmu_device *dev, u64 block, u64 count)
{
	return !count || block >= dev->blocks || count > dev->blocks - block;
}

/* Checks a place for so many sectors; where nothing is written it may end early. */
static int dmu_check_place(struct dmu_device *dev, unsigned int device, u64 sector, u64 count,
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
	if ((a->flags & DMU_HOLD_FLUSH) && a->mark <= dev->last_mark)
		return -ERANGE;
	if (!(a->flags & DMU_HOLD_FLUSH) && a->mark)
		return -EINVAL;
	return 0;
}

/* Takes the fault for us, with its first bio when it is a write. */
static int dmu_claim(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell **claimed)
{
	struct dmu_cell *cell;
	int error = 0;

	spin_lock_irq(&dev->lock);
	cell = dmu_cell_by_id(dev, a->id);
	if (!cell || (cell->state != DMU_ASKED && cell->state != DMU_PARKED))
		error = -ENOENT;
	else
		cell->state = DMU_CLAIMED;
	spin_unlock_irq(&dev->lock);
	*claimed = error ? NULL : cell;
	return error;
}

/* Gives the fault back as it was: the answer was refused. */
static void dmu_unclaim(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;
	struct bio *bio = NULL;

	spin_lock_irq(&dev->lock);
	if (cell->active) {
		if (dev->requeue)
			bio = cell->active;
		else
			bio_list_add_head(&cell->bios, cell->active);
		cell->active = NULL;
	}
	if (dev->requeue)
		cell->orphan = true;
	cell->state = DMU_ASKED;
	spin_unlock_irq(&dev->lock);
	if (bio)
		dmu_end_bio(bio, BLK_STS_DM_REQUEUE);
}

/* Stores the run, unless it would move what may be in use. */
static int dmu_remember(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell *cell)
{
	unsigned long word = dmu_answer_word(dev, a);
	int error = 0;

	mutex_lock(&dev->map_mutex);
	spin_lock_irq(&dev->lock);
	if (dmu_preparing_overlap(dev, a->block, a->count, cell, word) ||
	    dmu_placed_overlap(dev, a->block, a->count, word, !(a->flags & DMU_HOLD_FLUSH)))
		error = -EEXIST;
	spin_unlock_irq(&dev->lock);
	if (!error && dmu_extent_conflict(dev, a->block, a->count, word))
		error = -EEXIST;
	if (!error && !(a->flags & DMU_TEMPORARY))
		error = dmu_extent_store(dev, a->block, a->count, word);
	mutex_unlock(&dev->map_mutex);
	return error;
}

static struct dmu_placement *dmu_placement_make(struct dmu_answer *a, bool in_flight)
{
	struct dmu_placement *placement;

	placement = kmem_cache_alloc(dmu_placement_cache, GFP_NOIO | __GFP_NOWARN);
	if (!placement)
		return NULL;
	placement->block = a->block;
	placement->count = a->count;
	placement->mark = a->mark;
	placement->sector = a->sector;
	placement->device = a->device;
	placement->writable = a->flags & DMU_WRITABLE;
	placement->in_flight = in_flight;
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
		placement = dmu_placement_make(a, false);
		if (!placement)
			return -ENOMEM;
	}
	error = dmu_remember(dev, a, cell);
	if (error) {
		if (placement)
			kmem_cache_free(dmu_placement_cache, placement);
		return error;
	}
	if (placement) {
		spin_lock_irq(&dev->lock);
		dmu_placed_add(dev, placement);
		spin_unlock_irq(&dev->lock);
	}
	return 0;
}

/* The reads at the head of a claimed cell's queue. */
static struct bio *dmu_pop_read(struct dmu_cell *cell)
{
	struct bio *bio;

	spin_lock_irq(&cell->dev->lock);
	bio = bio_list_peek(&cell->bios);
	if (bio && bio_op(bio) == REQ_OP_READ)
		bio_list_pop(&cell->bios);
	else
		bio = NULL;
	spin_unlock_irq(&cell->dev->lock);
	return bio;
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
	dmu_map_error(dev, cell->event, a->block, a->mark, ECANCELED);
	cell->event = NULL;
	dmu_process(cell);
}

static int dmu_check_write(struct dmu_answer *a, struct dmu_cell *cell)
{
	if (a->block != cell->block)
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

	if (error)
		goto refuse;
	error = -ENOBUFS;
	cell->event = dmu_event_alloc(dev, GFP_NOIO | __GFP_NOWARN);
	if (!cell->event)
		goto refuse;
	error = -ENOMEM;
	if (a->flags & DMU_HOLD_FLUSH) {
		placement = dmu_placement_make(a, true);
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
	error = dmu_remember(dev, a, cell);
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
	if (placement)
		dmu_placed_add(dev, placement);
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

static int dmu_take_map(struct dmu_device *dev, struct dmu_answer *a, struct dmu_chain *chain)
{
	struct dmu_cell *cell;
	int error = dmu_check_map(dev, a);

	if (error)
		return error;
	if (!a->id)
		return a->flags & DMU_TEMPORARY ? -EINVAL : dmu_map_plain(dev, a, NULL);
	error = dmu_claim(dev, a, &cell);
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

/* Fills a read from the caller's memory, which holds [start, start + length) of the disk. */
static int dmu_copy_in(struct bio *bio, u64 address, u64 start)
{
	u64 from = address + ((bio->bi_iter.bi_sector << SECTOR_SHIFT) - start);
	struct bvec_iter iter;
	struct bio_vec vec;

	bio_for_each_segment(vec, bio, iter) {
		char *to = dmu_kmap(vec.bv_page);
		unsigned long left;

		left = copy_from_user(to + vec.bv_offset, u64_to_user_ptr(from), vec.bv_len);
		flush_dcache_page(vec.bv_page);
		dmu_kunmap(vec.bv_page, to);
		if (left)
			return -EFAULT;
		from += vec.bv_len;
	}
	return 0;
}

/* DATA for a read: every read at the head of the queue that the bytes cover. */
static int dmu_data_read(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_cell *cell;
	struct bio *bio;
	u64 start, end;
	int error, served = 0;

	if (a->offset >= dev->block_sectors << SECTOR_SHIFT)
		return -ERANGE;
	error = dmu_claim(dev, a, &cell);
	if (error)
		return error;
	if (cell->type != DMU_FAULT || !(cell->flags & DMU_READ)) {
		dmu_unclaim(cell);
		return -ENOENT;
	}
	start = ((cell->block << dev->block_shift) << SECTOR_SHIFT) + a->offset;
	end = start + a->length;
	while ((bio = dmu_pop_read(cell))) {
		if (bio->bi_iter.bi_sector << SECTOR_SHIFT < start ||
		    bio_end_sector(bio) << SECTOR_SHIFT > end)
			error = -ERANGE;
		else
			error = dmu_copy_in(bio, a->address, start);
		if (error) {
			cell->active = bio;
			break;
		}
		dmu_end_bio(bio, BLK_STS_OK);
		served++;
	}
	if (error && !served) {
		dmu_unclaim(cell);
		return error;
	}
	if (error) {
		spin_lock_irq(&dev->lock);
		bio_list_add_head(&cell->bios, cell->active);
		cell->active = NULL;
		spin_unlock_irq(&dev->lock);
	}
	dmu_process(cell);
	return 0;
}

/* Writes from the caller's pages, without a copy of ours. */
static int dmu_write_pages(struct dmu_device *dev, struct block_device *bdev, u64 sector,
			   u64 address, unsigned int length)
{
	unsigned int offset = offset_in_page(address), done = 0;
	unsigned int count = DIV_ROUND_UP(offset + length, PAGE_SIZE);
	struct page **pages = kvmalloc_array(count, sizeof(*pages), GFP_NOIO | __GFP_NOWARN);
	struct bio *bio;
	int error = 0, pinned;
	unsigned int i;

	if (!pages)
		return -ENOMEM;
	pinned = dmu_pin_pages(address & PAGE_MASK, count, pages);
	if (pinned < (int)count) {
		error = -EFAULT;
		count = max(pinned, 0);
	}
	for (i = 0; i < count && !error;) {
		bio = dmu_bio_alloc(bdev, min_t(unsigned int, count - i, BIO_MAX_VECS),
				    REQ_OP_WRITE | REQ_SYNC, &dev->bios);
		bio->bi_iter.bi_sector = sector + (done >> SECTOR_SHIFT);
		for (; i < count; i++) {
			unsigned int part = min_t(unsigned int, PAGE_SIZE - offset,
						  length - done);

			if (bio_add_page(bio, pages[i], part, offset) != part)
				break;
			done += part;
			offset = 0;
		}
		error = submit_bio_wait(bio);
		bio_put(bio);
	}
	for (i = 0; i < count; i++)
		dmu_unpin_page(pages[i]);
	kvfree(pages);
	return error;
}

/* DATA to write: it is on the device when this returns. */
static int dmu_data_write(struct dmu_device *dev, struct dmu_answer *a)
{
	struct block_device *bdev;
	unsigned int unit;
	int error;

	error = dmu_check_place(dev, a->device, a->sector, a->length >> SECTOR_SHIFT, true);
	if (error)
		return error;
	bdev = dev->table->devs[a->device].dm_dev->bdev;
	unit = bdev_logical_block_size(bdev);
	if ((a->length | a->address | (a->sector << SECTOR_SHIFT)) & (unit - 1))
		return -EINVAL;
	return dmu_write_pages(dev, bdev, a->sector, a->address, a->length);
}

static int dmu_take_data(struct dmu_device *dev, struct dmu_answer *a)
{
	if (!a->length || a->length > DMU_MAX_DATA || a->length & (SECTOR_SIZE - 1) ||
	    a->offset & (SECTOR_SIZE - 1) || !access_ok(u64_to_user_ptr(a->address), a->length))
		return -EINVAL;
	return a->id ? dmu_data_read(dev, a) : dmu_data_write(dev, a);
}

static int dmu_take_zero(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_cell *cell;
	struct bio *bio;
	int error = dmu_claim(dev, a, &cell);

	if (error)
		return error;
	if (cell->type != DMU_FAULT || !(cell->flags & DMU_READ)) {
		dmu_unclaim(cell);
		return -ENOENT;
	}
	while ((bio = dmu_pop_read(cell))) {
		zero_fill_bio(bio);
		dmu_end_bio(bio, BLK_STS_OK);
	}
	dmu_process(cell);
	return 0;
}

static int dmu_take_fail(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_cell *cell;
	int error;

	if (a->code <= 0 || a->code > MAX_ERRNO)
		return -EINVAL;
	error = dmu_claim(dev, a, &cell);
	if (error)
		return dmu_flush_answer(dev, a->id, -a->code);
	dmu_fail_cell(cell, -a->code);
	return 0;
}

static int dmu_take_wait(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_cell *cell;
	int error = 0;

	spin_lock_irq(&dev->lock);
	cell = dmu_cell_by_id(dev, a->id);
	if (!cell || cell->state != DMU_ASKED)
		error = -ENOENT;
	else
		cell->state = DMU_PARKED;
	spin_unlock_irq(&dev->lock);
	return error;
}

static int dmu_take_retry(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_cell *cell = NULL;
	int error = 0;

	spin_lock_irq(&dev->lock);
	if (a->id)
		cell = dmu_cell_by_id(dev, a->id);
	if (a->id && !cell)
		error = -ENOENT;
	else if (!dmu_retry(dev, cell) && a->id)
		error = -ENOENT;
	spin_unlock_irq(&dev->lock);
	return error;
}

static int dmu_take_done(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_cell *cell;
	int error = dmu_claim(dev, a, &cell);

	if (error)
		return error;
	if (cell->type != DMU_DISCARD)
		error = -ENOENT;
	else if (!a->count || a->count > cell->count)
		error = -ERANGE;
	if (error) {
		dmu_unclaim(cell);
		return error;
	}
	spin_lock_irq(&dev->lock);
	if (!cell->orphan)
		cell->active = bio_list_pop(&cell->bios);
	spin_unlock_irq(&dev->lock);
	if (cell->active)
		dmu_advance(cell, a->count);
	else
		dmu_process(cell);
	return 0;
}

static int dmu_take_invalidate(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_event *event;
	int error;

	if (dmu_bad_run(dev, a->block, a->count))
		return -ERANGE;
	event = dmu_event_alloc(dev, GFP_NOIO | __GFP_NOWARN);
	if (!event)
		return -ENOBUFS;
	event->message.type = DMU_INVALIDATE_DONE;
	event->message.block = a->block;
	event->message.count = a->count;
	mutex_lock(&dev->map_mutex);
	error = dmu_extent_erase(dev, a->block, a->count);
	mutex_unlock(&dev->map_mutex);
	if (error) {
		dmu_event_free(dev, event);
		return error;
	}
	spin_lock_irq(&dev->lock);
	list_add_tail(&event->list, &dev->invalidations);
	spin_unlock_irq(&dev->lock);
	queue_work(dev->wq, &dev->epoch_work);
	return 0;
}

static int dmu_take_version(struct dmu_device *dev)
{
	struct dmu_event *event = dmu_event_alloc(dev, GFP_NOIO | __GFP_NOWARN);

	if (!event)
		return -ENOBUFS;
	event->message.type = DMU_VERSION_IS;
	event->message.version = DMU_VERSION;
	event->message.count = dev->sectors;
	event->message.device = dev->table->count;
	event->message.block_sectors = dev->block_sectors;
	dmu_event_post(dev, event);
	return 0;
}

static int dmu_take_stats(struct dmu_device *dev)
{
	struct dmu_event *event;
	unsigned int i;

	for (i = 1; i <= DMU_STAT_LAST; i++) {
		event = dmu_event_alloc(dev, GFP_NOIO | __GFP_NOWARN);
		if (!event)
			return -ENOBUFS;
		event->message.type = DMU_STATS_ARE;
		event->message.id = i;
		event->message.mark = atomic64_read(&dev->stats[i]);
		if (i == DMU_STAT_UNCOMMITTED)
			event->message.mark = atomic_read(&dev->uncommitted);
		else if (i == DMU_STAT_WAITING)
			event->message.mark = atomic_read(&dev->busy);
		dmu_event_post(dev, event);
	}
	return 0;
}

static int dmu_take_dump(struct dmu_device *dev)
{
	spin_lock_irq(&dev->lock);
	dev->dumping = true;
	dev->dump_next = 0;
	dev->dump_last = dev->last_mark;
	wake_up(&dev->wait);
	spin_unlock_irq(&dev->lock);
	return 0;
}

static int dmu_take_one(struct dmu_device *dev, struct dmu_answer *a, struct dmu_chain *chain)
{
	if (a->flags & ~DMU_ALL_ANSWER_FLAGS || a->reserved[0] || a->reserved[1] ||
	    a->reserved[2])
		return -EINVAL;
	if (a->type != DMU_MAP && a->flags & ~DMU_LINKED)
		return -EINVAL;
	switch (a->type) {
	case DMU_MAP:
		return dmu_take_map(dev, a, chain);
	case DMU_DATA:
		return dmu_take_data(dev, a);
	case DMU_ZERO:
		return dmu_take_zero(dev, a);
	case DMU_FAIL:
		return dmu_take_fail(dev, a);
	case DMU_WAIT:
		return dmu_take_wait(dev, a);
	case DMU_RETRY:
		return dmu_take_retry(dev, a);
	case DMU_DONE:
		return dmu_take_done(dev, a);
	case DMU_FLUSH_DONE:
		return dmu_flush_answer(dev, a->id, 0);
	case DMU_INVALIDATE:
		return dmu_take_invalidate(dev, a);
	case DMU_GET_VERSION:
		return dmu_take_version(dev);
	case DMU_STATS:
		return dmu_take_stats(dev);
	case DMU_DUMP:
		return dmu_take_dump(dev);
	default:
		return -EINVAL;
	}
}

/* Lets the write that a chain held back complete, or fail with the chain. */
static void dmu_chain_end(struct dmu_chain *chain)
{
	struct dmu_cell *cell = chain->held;

	if (cell) {
		if (chain->error && !cell->error)
			cell->error = chain->error == -ECANCELED ? -EIO : chain->error;
		queue_work(cell->dev->wq, &cell->work);
	}
	memset(chain, 0, sizeof(*chain));
}

static int dmu_take(struct dmu_device *dev, struct dmu_answer *a, struct dmu_chain *chain)
{
	struct dmu_cell *before = chain->held;
	unsigned int noio = memalloc_noio_save();
	int error;

	if (chain->linked && chain->error) {
		error = -ECANCELED;
	} else {
		error = dmu_take_one(dev, a, chain);
		if (!error && chain->held && chain->held != before) {
			wait_for_completion(&chain->prepared);
			chain->error = chain->held->error;
		}
		if (error)
			chain->error = error;
	}
	chain->linked = a->flags & DMU_LINKED;
	if (!chain->linked)
		dmu_chain_end(chain);
	dmu_count(dev, error ? DMU_STAT_REFUSED : DMU_STAT_ANSWERS);
	trace_dmu_answer(dev->minor, a->type, a->flags, a->id, a->block, error);
	memalloc_noio_restore(noio);
	return error;
}

/* DMU_IOC_ANSWER: every answer has its own result. */
long dmu_answer_batch(struct dmu_device *dev, struct dmu_batch __user *argument)
{
	struct dmu_chain chain = {};
	struct dmu_answer __user *answers;
	struct dmu_batch batch;
	struct dmu_answer a;
	long error = 0;
	u32 i;

	if (copy_from_user(&batch, argument, sizeof(batch)))
		return -EFAULT;
	if (batch.count > DMU_MAX_BATCH)
		return -EINVAL;
	answers = u64_to_user_ptr(batch.answers);
	batch.refused = 0;
	mutex_lock(&dev->answer_mutex);
	for (i = 0; i < batch.count && !error; i++) {
		int result = -ENODEV;

		if (copy_from_user(&a, &answers[i], sizeof(a))) {
			error = -EFAULT;
			break;
		}
		if (!dev->gone && dev->table)
			result = dmu_take(dev, &a, &chain);
		batch.refused += result != 0;
		if (put_user(result, &answers[i].result))
			error = -EFAULT;
		cond_resched();
	}
	dmu_chain_end(&chain);
	mutex_unlock(&dev->answer_mutex);
	if (copy_to_user(argument, &batch, sizeof(batch)))
		error = -EFAULT;
	return error;
}

/*
 * write(2): as many as are taken in a row. No address of the caller is followed, so DATA is
 * not taken here: the descriptor may have become the standard output of somebody else.
 */
ssize_t dmu_answer_write(struct dmu_device *dev, const char __user *buffer, size_t size)
{
	struct dmu_chain chain = {};
	struct dmu_answer a;
	size_t done = 0;
	int error = 0;

	if (!size || size % sizeof(a))
		return -EINVAL;
	mutex_lock(&dev->answer_mutex);
	while (done < size && !error) {
		if (copy_from_user(&a, buffer + done, sizeof(a)))
			error = -EFAULT;
		else if (dev->gone || !dev->table)
			error = -ENODEV;
		else if (a.type == DMU_DATA)
			error = -EPERM;
		else
			error = dmu_take(dev, &a, &chain);
		if (!error)
			done += sizeof(a);
		cond_resched();
	}
	dmu_chain_end(&chain);
	mutex_unlock(&dev->answer_mutex);
	return done ? done : error;
}
