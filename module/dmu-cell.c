// SPDX-License-Identifier: GPL-2.0-only
/*
 * Requests that wait, and the questions that are asked for them.
 *
 * A cell stands for a block (FAULT) or a run of whole blocks (DISCARD) from the moment that
 * a request cannot be served until every request that queued behind it is on its way. Its
 * state changes under dev->lock. In DMU_CLAIMED and DMU_PREPARING it belongs to whoever
 * brought it there: only bios may be added or taken away by others, and only followers.
 *
 * A bio that waits is within one block, or is a discard of whole blocks; dmu_map() cuts it so.
 * Its sector counts from the beginning of the target until it is issued.
 */
#include <linux/hash.h>
#include "dmu-core.h"
#include "dmu-trace.h"

void dmu_end_bio(struct bio *bio, blk_status_t status)
{
	bio->bi_status = status;
	bio_endio(bio);
}

static bool dmu_is_discard(struct bio *bio)
{
	return bio_op(bio) == REQ_OP_DISCARD || bio_op(bio) == REQ_OP_WRITE_ZEROES;
}

/* Whether the bio covers each block that it touches from end to end. */
static bool dmu_covers_blocks(struct dmu_device *dev, struct bio *bio)
{
	u64 end = bio_end_sector(bio);
	unsigned int mask = dev->block_sectors - 1;

	return !(bio->bi_iter.bi_sector & mask) && (!(end & mask) || end == dev->sectors);
}

static u64 dmu_bio_blocks(struct dmu_device *dev, struct bio *bio)
{
	return dmu_block_of(dev, bio_end_sector(bio) - 1) -
	       dmu_block_of(dev, bio->bi_iter.bi_sector) + 1;
}

/* A request that is decided as a run: a cell of its own kind. */
static bool dmu_is_run(struct dmu_device *dev, struct bio *bio)
{
	return dmu_is_discard(bio) && dmu_covers_blocks(dev, bio);
}

/*
 * Sends a bio to the place that word says. The bio leaves the epoch when it ends. Reads past
 * the end of a backing device are zeroes.
 */
void dmu_issue(struct dmu_device *dev, struct bio *bio, unsigned long word,
	       struct dmu_epoch *epoch)
{
	struct dmu_io *io = dmu_io(bio);
	struct block_device *bdev;
	u64 sector, size;

	if (bio_op(bio) == REQ_OP_WRITE_ZEROES) {
		dmu_zero_bio(dev, bio, word, epoch);
		return;
	}
	io->epoch = epoch;
	if (dmu_word_device(word) == DMU_WORD_ZERO) {
		zero_fill_bio(bio);
		dmu_end_bio(bio, BLK_STS_OK);
		return;
	}
	bdev = dev->table->devs[dmu_word_device(word)].dm_dev->bdev;
	sector = bio->bi_iter.bi_sector + dmu_word_shift(word);
	size = dmu_bdev_sectors(bdev);
	if (unlikely(sector + bio_sectors(bio) > size)) {
		if (bio_op(bio) != REQ_OP_READ) {
			dmu_end_bio(bio, BLK_STS_IOERR);
			return;
		}
		if (sector < size) {
			struct bio *head = bio_split(bio, size - sector, GFP_NOIO, &dev->bios);

			bio_chain(head, bio);
			bio_set_dev(head, bdev);
			head->bi_iter.bi_sector = sector;
			dmu_submit_bio(head);
		}
		zero_fill_bio(bio);
		bio_endio(bio);
		return;
	}
	/* Even with nothing uncommitted: a device lets others pass a forced write. */
	if (bio_op(bio) == REQ_OP_WRITE && bio->bi_opf & REQ_FUA)
		dmu_force(dev, bio);
	dmu_failed_note(bio);
	bio_set_dev(bio, bdev);
	bio->bi_iter.bi_sector = sector;
	dmu_submit_bio(bio);
}

/* Whether the index serves the bio. */
static unsigned long dmu_serving(struct dmu_device *dev, struct bio *bio)
{
	unsigned long word;
	u64 run;

	if (dmu_is_run(dev, bio))
		return 0;
	rcu_read_lock();
	word = dmu_index_lookup(dev, dmu_block_of(dev, bio->bi_iter.bi_sector), 1, &run);
	rcu_read_unlock();
	if (op_is_write(bio_op(bio)) && !dmu_word_writable(word))
		return 0;
	return word;
}

/* Issues the bio if it is served now. */
bool dmu_try_issue(struct dmu_device *dev, struct bio *bio)
{
	struct dmu_epoch *epoch = dmu_epoch_enter(dev);
	unsigned long word = dmu_serving(dev, bio);

	if (!word) {
		dmu_epoch_leave(epoch);
		return false;
	}
	dmu_issue(dev, bio, word, epoch);
	return true;
}

/*
 * Decides where a bio goes that no cell holds, and enters the epoch for it. That is done while the
 * caller holds dev->lock: once it is dropped, a write may place the block anew, and its place
 * must not be read before it is ready.
 */
static bool dmu_serve(struct dmu_device *dev, struct bio *bio)
{
	struct dmu_io *io = dmu_io(bio);

	lockdep_assert_held(&dev->lock);
	io->epoch = dmu_epoch_enter(dev);
	io->word = dmu_serving(dev, bio);
	if (io->word)
		return true;
	dmu_epoch_leave(io->epoch);
	io->epoch = NULL;
	return false;
}

static struct hlist_head *dmu_bucket(struct hlist_head *table, u64 key)
{
	return &table[hash_64(key, DMU_HASH_BITS)];
}

/* The cell that holds any of the blocks; the first in no particular order. */
static struct dmu_cell *dmu_cell_find(struct dmu_device *dev, u64 block, u64 count)
{
	struct dmu_cell *cell;
	u64 i;

	lockdep_assert_held(&dev->lock);
	list_for_each_entry(cell, &dev->ranges, range)
		if (cell->block < block + count && block < cell->block + cell->count)
			return cell;
	if (count > 64) {
		list_for_each_entry(cell, &dev->cells, all)
			if (cell->block < block + count && block < cell->block + cell->count)
				return cell;
		return NULL;
	}
	for (i = block; i < block + count; i++)
		hlist_for_each_entry(cell, dmu_bucket(dev->by_block, i), by_block)
			if (cell->block == i)
				return cell;
	return NULL;
}

struct dmu_cell *dmu_cell_by_id(struct dmu_device *dev, u64 id)
{
	struct dmu_cell *cell;

	lockdep_assert_held(&dev->lock);
	hlist_for_each_entry(cell, dmu_bucket(dev->by_id, id), by_id)
		if (cell->id == id)
			return cell;
	return NULL;
}

/*
 * Whether a request for the blocks may have to wait: without the lock, and true for some that need
 * not. The caller has read the index before, and looks at dev->removals afterwards.
 */
bool dmu_may_wait(struct dmu_device *dev, u64 block, unsigned int count)
{
	unsigned int i;

	if (atomic_read(&dev->broad))
		return true;
	smp_rmb();	/* see dmu-core.h: what is deferred before the cells */
	for (i = 0; i < count; i++)
		if (!hlist_empty(dmu_bucket(dev->by_block, block + i)))
			return true;
	return false;
}

/* How many of the blocks, from the first on, are in nobody's hands. */
unsigned int dmu_free_run(struct dmu_device *dev, u64 block, unsigned int count)
{
	unsigned long flags;
	unsigned int i;

	dmu_stop(DMU_STOP_SEARCHING);
	spin_lock_irqsave(&dev->lock, flags);
	for (i = 0; i < count; i++)
		if (dmu_cell_find(dev, block + i, 1))
			break;
	if (!bio_list_empty(&dev->deferred))
		i = 0;
	spin_unlock_irqrestore(&dev->lock, flags);
	return i;
}

/* Whether a block of the run is being prepared for a place other than word says. */
bool dmu_preparing_overlap(struct dmu_device *dev, u64 block, u64 count,
			   struct dmu_cell *except, unsigned long word)
{
	struct dmu_cell *cell;

	lockdep_assert_held(&dev->lock);
	list_for_each_entry(cell, &dev->cells, all) {
		if (cell == except || cell->state != DMU_PREPARING || cell->word == word)
			continue;
		if (cell->block < block + count && block < cell->block + cell->count)
			return true;
	}
	return false;
}

static void dmu_cell_name(struct dmu_cell *cell, u64 id)
{
	if (cell->id)
		hlist_del(&cell->by_id);
	cell->id = id;
	if (id)
		hlist_add_head(&cell->by_id, dmu_bucket(cell->dev->by_id, id));
}

void dmu_cell_remove(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;

	lockdep_assert_held(&dev->lock);
	dmu_cell_name(cell, 0);
	list_del(&cell->all);
	list_del_init(&cell->unsent);
	smp_store_release(&dev->removals, dev->removals + 1);	/* see dmu-core.h */
	smp_wmb();	/* the count before the cell is gone */
	if (cell->type == DMU_FAULT) {
		hlist_del(&cell->by_block);
	} else {
		list_del(&cell->range);
		atomic_dec(&dev->broad);
	}
	atomic_dec(&dev->busy);
	mempool_free(cell, &dev->cell_pool);
	if (!bio_list_empty(&dev->deferred))
		mod_delayed_work(dev->wq, &dev->deferred_work, 0);
}

/* Raises the question of the cell's first bio; without one, where the block is read. */
void dmu_ask(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;
	struct bio *bio = bio_list_peek(&cell->bios);

	lockdep_assert_held(&dev->lock);
	if (!bio) {
		cell->flags = DMU_READ;
	} else if (cell->type == DMU_FAULT) {
		cell->flags = op_is_write(bio_op(bio)) ? DMU_WRITE : DMU_READ;
		if (op_is_write(bio_op(bio)) && dmu_covers_blocks(dev, bio))
			cell->flags |= DMU_WHOLE;
	} else {
		cell->flags = bio_op(bio) == REQ_OP_WRITE_ZEROES ? DMU_ZEROING : 0;
	}
	dmu_cell_name(cell, dev->next_id++);
	cell->state = DMU_ASKING;
	cell->orphan = false;
	cell->told = false;
	list_move_tail(&cell->unsent, &dev->unsent);
	dmu_count(dev, DMU_STAT_FAULTS);
	trace_dmu_fault(dev->minor, cell->type, cell->flags, cell->id, cell->block, cell->count);
	wake_up(&dev->wait);
	if (unlikely(READ_ONCE(dev->failing)))
		queue_work(dev->wq, &dev->fail_work);
}

static struct dmu_cell *dmu_cell_make(struct dmu_device *dev, u32 type, u64 block, u64 count)
{
	struct dmu_cell *cell = mempool_alloc(&dev->cell_pool, GFP_NOWAIT | __GFP_NOWARN);

	lockdep_assert_held(&dev->lock);
	if (!cell)
		return NULL;
	memset(cell, 0, sizeof(*cell));
	cell->dev = dev;
	cell->type = type;
	cell->block = block;
	cell->count = count;
	INIT_LIST_HEAD(&cell->unsent);
	INIT_WORK(&cell->work, dmu_place_work);
	bio_list_init(&cell->bios);
	if (type == DMU_DISCARD) {
		list_add(&cell->range, &dev->ranges);
		atomic_inc(&dev->broad);
	} else {
		hlist_add_head(&cell->by_block, dmu_bucket(dev->by_block, block));
	}
	list_add_tail(&cell->all, &dev->cells);
	atomic_inc(&dev->busy);
	smp_mb__after_atomic();	/* the cell stands before its place enters the index */
	return cell;
}

/*
 * Finds a bio its place in the queues: true when it has one, false when the index serves it.
 * The caller holds dev->lock.
 */
static bool dmu_queue(struct dmu_device *dev, struct bio *bio)
{
	u64 block = dmu_block_of(dev, bio->bi_iter.bi_sector);
	struct dmu_cell *cell = dmu_cell_find(dev, block, dmu_bio_blocks(dev, bio));

	if (cell) {
		bio_list_add(&cell->bios, bio);
		return true;
	}
	if (dmu_serving(dev, bio))
		return false;
	if (dmu_is_run(dev, bio))
		cell = dmu_cell_make(dev, DMU_DISCARD, block, dmu_bio_blocks(dev, bio));
	else
		cell = dmu_cell_make(dev, DMU_FAULT, block, 1);
	if (!cell)
		return false;
	bio_list_add(&cell->bios, bio);
	if (!dmu_grant_offer(cell))
		dmu_ask(cell);
	return true;
}

/* Asks where a block is that no request waits for. False: not now. */
bool dmu_ask_unasked(struct dmu_device *dev, u64 block)
{
	struct dmu_cell *cell = NULL;

	spin_lock_irq(&dev->lock);
	if (!dmu_requeueing(dev) && !dmu_cell_find(dev, block, 1))
		cell = dmu_cell_make(dev, DMU_FAULT, block, 1);
	if (cell)
		dmu_ask(cell);
	spin_unlock_irq(&dev->lock);
	return cell;
}

/* Lets a bio line up where it belongs: those of a cell that is given up may have come before others. */
static void dmu_line_up(struct bio_list *list, struct bio *bio)
{
	struct bio *at = list->head;
	u64 arrival = dmu_io(bio)->arrival;

	if (!at || dmu_io(list->tail)->arrival <= arrival) {
		bio_list_add(list, bio);
	} else if (arrival < dmu_io(at)->arrival) {
		bio_list_add_head(list, bio);
	} else {
		while (dmu_io(at->bi_next)->arrival <= arrival)
			at = at->bi_next;
		bio->bi_next = at->bi_next;
		at->bi_next = bio;
	}
}

static void dmu_defer(struct dmu_device *dev, struct bio *bio)
{
	dmu_line_up(&dev->deferred, bio);
	dmu_count_deferred(dev, 1);
	if (unlikely(READ_ONCE(dev->failing)))
		queue_work(dev->wq, &dev->fail_work);
	/* Not put off by every request that comes. */
	queue_delayed_work(dev->wq, &dev->deferred_work, HZ / 100);
}

/* Whether the bio may not even be queued: others line up, or it would change what is forced. */
static bool dmu_has_to_line_up(struct dmu_device *dev, struct bio *bio)
{
	return !bio_list_empty(&dev->deferred) || dmu_forced_meets(dev, bio);
}

/*
 * Takes a bio that the index did not serve. False: look again, or, with *requeue, give it
 * back to the device-mapper core.
 */
bool dmu_hold(struct dmu_device *dev, struct bio *bio, bool *requeue)
{
	unsigned long flags;
	bool held = true;

	*requeue = false;
	dmu_io(bio)->since = jiffies;
	/* Who sends it on may wait. */
	bio->bi_opf &= ~REQ_NOWAIT;
	spin_lock_irqsave(&dev->lock, flags);
	dmu_returned_stamp(dev, bio);
	if (dmu_requeueing(dev)) {
		*requeue = true;
		held = false;
	} else if (dmu_has_to_line_up(dev, bio)) {
		dmu_defer(dev, bio);
	} else if (!dmu_queue(dev, bio)) {
		held = false;
		if (!dmu_serving(dev, bio)) {
			dmu_defer(dev, bio);
			held = true;
		}
	}
	spin_unlock_irqrestore(&dev->lock, flags);
	return held;
}

/* Hands out the bios that found no cell in memory, or came upon a forced write, in order. */
void dmu_deferred(struct work_struct *work)
{
	struct dmu_device *dev = container_of(to_delayed_work(work), struct dmu_device,
					      deferred_work);
	struct bio *bio;

	for (;;) {
		bool issue = false, meets;

		spin_lock_irq(&dev->lock);
		bio = bio_list_pop(&dev->deferred);
		meets = bio && dmu_forced_meets(dev, bio);
		if (bio && (meets || !dmu_queue(dev, bio))) {
			issue = !meets && dmu_serve(dev, bio);
			if (!issue) {
				bio_list_add_head(&dev->deferred, bio);
				mod_delayed_work(dev->wq, &dev->deferred_work, HZ / 100);
				bio = NULL;
			}
		}
		if (bio && !issue)
			dmu_count_deferred(dev, -1);
		spin_unlock_irq(&dev->lock);
		if (!bio)
			return;
		if (!issue)
			continue;
		dmu_issue(dev, bio, dmu_io(bio)->word, dmu_io(bio)->epoch);
		dmu_count_deferred(dev, -1);
	}
}

/*
 * Gives up a claimed cell and finds each of its bios a new place. What is served goes out
 * after the lock is dropped.
 */
static void dmu_scatter(struct dmu_cell *cell)
	__releases(&cell->dev->lock)
{
	struct dmu_device *dev = cell->dev;
	struct bio_list bios = cell->bios, issue = BIO_EMPTY_LIST;
	struct bio *bio;

	dmu_cell_remove(cell);
	while ((bio = bio_list_pop(&bios))) {
		if (dmu_has_to_line_up(dev, bio))
			dmu_defer(dev, bio);
		else if (dmu_queue(dev, bio))
			continue;
		else if (dmu_serve(dev, bio))
			bio_list_add(&issue, bio);
		else
			dmu_defer(dev, bio);
	}
	spin_unlock_irq(&dev->lock);
	dmu_stop(DMU_STOP_SCATTERED);
	while ((bio = bio_list_pop(&issue)))
		dmu_issue(dev, bio, dmu_io(bio)->word, dmu_io(bio)->epoch);
}

/* Gives up a claimed cell, and its bios back to the core: a suspend wants them. */
void dmu_return_cell(struct dmu_cell *cell)
	__releases(&cell->dev->lock)
{
	struct dmu_device *dev = cell->dev;
	struct bio_list bios = cell->bios, reversed = BIO_EMPTY_LIST;
	struct bio *bio;

	dmu_cell_remove(cell);
	spin_unlock_irq(&dev->lock);
	while ((bio = bio_list_pop(&bios)))
		bio_list_add_head(&reversed, bio);
	while ((bio = bio_list_pop(&reversed)))
		dmu_give_back(dev, bio);
}

/*
 * Serves the queue of a claimed cell as far as the index allows: ends with the cell gone, or
 * asking for its first bio. Process context.
 */
void dmu_process(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;
	struct bio *bio;

	for (;;) {
		spin_lock_irq(&dev->lock);
		bio = bio_list_peek(&cell->bios);
		if (!bio) {
			dmu_cell_remove(cell);
			break;
		}
		if (cell->type == DMU_DISCARD || dmu_is_run(dev, bio) ||
		    dmu_forced_meets(dev, bio)) {
			dmu_scatter(cell);
			return;
		}
		if (!dmu_serving(dev, bio)) {
			if (unlikely(dmu_requeueing(dev))) {
				dmu_return_cell(cell);
				return;
			}
			if (!dmu_grant_offer(cell))
				dmu_ask(cell);
			break;
		}
		bio_list_pop(&cell->bios);
		spin_unlock_irq(&dev->lock);
		if (!dmu_try_issue(dev, bio)) {
			spin_lock_irq(&dev->lock);
			bio_list_add_head(&cell->bios, bio);
			spin_unlock_irq(&dev->lock);
		}
	}
	spin_unlock_irq(&dev->lock);
}

/* A claimed discard has count blocks less to do; its bio is active. */
void dmu_advance(struct dmu_cell *cell, u64 count)
{
	struct dmu_device *dev = cell->dev;
	struct bio *bio = cell->active;

	cell->active = NULL;
	if (count == cell->count) {
		dmu_end_bio(bio, BLK_STS_OK);
		dmu_process(cell);
		return;
	}
	spin_lock_irq(&dev->lock);
	cell->block += count;
	cell->count -= count;
	bio_list_add_head(&cell->bios, bio);
	cell->state = DMU_CLAIMED;
	if (dmu_requeueing(dev)) {
		dmu_return_cell(cell);
		return;
	}
	dmu_ask(cell);
	spin_unlock_irq(&dev->lock);
}
