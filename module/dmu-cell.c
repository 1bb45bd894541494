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
#include "dmu-cell.h"
#include "dmu-core.h"
#include "dmu-grant.h"
#include "dmu-io.h"
#include "dmu-layer.h"
#include "dmu-map.h"
#include "dmu-place.h"
#include "dmu-trace.h"

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

/* Whether the index serves the bio. */
unsigned long dmu_serving(struct dmu_device *dev, struct bio *bio)
{
	u64 block = dmu_block_of(dev, bio->bi_iter.bi_sector), run;
	unsigned long word;

	if (dmu_is_run(dev, bio))
		return 0;
	rcu_read_lock();
	word = dmu_find(dev, block, 1, &run);
	if (unlikely(READ_ONCE(dev->layer)) && !dmu_word_writable(word) &&
	    !op_is_write(bio_op(bio)) && dmu_touch_meets(dev, block, 1))
		word = 0;
	rcu_read_unlock();
	if (op_is_write(bio_op(bio)) && !dmu_word_writable(word))
		return 0;
	return word;
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
	dmu_layer_leave(cell);
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
	dmu_layer_tell_from(cell);
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
	if (dmu_layer_stand(cell)) {
		cell->state = DMU_CLAIMED;
		list_add_tail(&cell->unsent, &dev->standing);
		queue_work(dev->wq, &dev->standing_work);
	} else if (!dmu_grant_offer(cell)) {
		dmu_ask(cell);
	}
	return true;
}

/* Asks where a block is that no request waits for. False: not now. */
bool dmu_ask_unasked(struct dmu_device *dev, u64 block)
{
	struct dmu_cell *cell = NULL;

	spin_lock_irq(&dev->lock);
	if (!dmu_requeueing(dev) && !dmu_cell_find(dev, block, 1))
		cell = dmu_cell_make(dev, DMU_FAULT, block, 1);
	if (cell) {
		/* It only asks: no touch is in its way. */
		dmu_layer_stand(cell);
		dmu_ask(cell);
	}
	spin_unlock_irq(&dev->lock);
	return cell;
}

/*
 * Lets a bio line up where it belongs: those of a cell that is given up may have come before
 * others.
 */
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

void dmu_take_up(struct dmu_cell *cell)
	__releases(&cell->dev->lock)
{
	struct dmu_device *dev = cell->dev;

	lockdep_assert_held(&dev->lock);
	if (cell->type != DMU_DISCARD) {
		spin_unlock_irq(&dev->lock);
		dmu_process(cell);
		return;
	}
	if (dmu_requeueing(dev)) {
		dmu_return_cell(cell);
		return;
	}
	if (bio_list_empty(&cell->bios))
		dmu_cell_remove(cell);
	else
		dmu_ask(cell);
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

/* What an answer takes a question for. */

/* Takes the fault for us, with its first bio when it is a write. */
int dmu_claim(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell **claimed)
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
	dmu_stop(DMU_STOP_CLAIMED);
	*claimed = error ? NULL : cell;
	return error;
}

/* Gives the fault back as it was: the answer was refused. */
void dmu_unclaim(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;
	struct bio *bio = NULL;

	spin_lock_irq(&dev->lock);
	if (cell->active) {
		if (dmu_requeueing(dev))
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
		dmu_give_back(dev, bio);
}

/* The reads at the head of a claimed cell's queue. */
struct bio *dmu_pop_read(struct dmu_cell *cell)
{
	struct bio *bio;

	spin_lock_irq(&cell->dev->lock);
	bio = bio_list_peek(&cell->bios);
	if (bio && bio_op(bio) == REQ_OP_READ)
		bio_list_pop(&cell->bios);
	else
		bio = NULL;
	spin_unlock_irq(&cell->dev->lock);
	if (bio)
		dmu_stop(DMU_STOP_POPPED);
	return bio;
}

/*
 * What happens to many waiting requests at once: a suspend wants them back, the administrator
 * or a timeout fails them, a new opener is to be asked again.
 *
 * Only questions are swept, not cells that are claimed or being prepared: of those, what queues.
 */

static void dmu_end_list(struct bio_list *bios, blk_status_t status)
{
	struct bio *bio;

	while ((bio = bio_list_pop(bios)))
		dmu_end_bio(bio, status);
}

/* Ends every bio of a claimed cell, and the cell. */
void dmu_fail_cell(struct dmu_cell *cell, int error)
{
	struct dmu_device *dev = cell->dev;
	struct bio_list bios;

	spin_lock_irq(&dev->lock);
	bios = cell->bios;
	if (cell->active)
		bio_list_add_head(&bios, cell->active);
	dmu_cell_remove(cell);
	spin_unlock_irq(&dev->lock);
	dmu_end_list(&bios, errno_to_blk_status(error));
}

/*
 * Takes the bios of every question away; what the worker knows of stays, an orphan. So does what
 * an answer has claimed and has not taken its request of: what queues there next is another one.
 */
static void dmu_collect(struct dmu_device *dev, struct bio_list *bios)
{
	struct dmu_cell *cell, *next;

	lockdep_assert_held(&dev->lock);
	list_for_each_entry_safe(cell, next, &dev->cells, all) {
		bio_list_merge(bios, &cell->bios);
		bio_list_init(&cell->bios);
		if (cell->state == DMU_ASKING)
			dmu_cell_remove(cell);
		else if (cell->state <= DMU_CLAIMED)
			cell->orphan = true;
	}
	dmu_count_deferred(dev, -(int)bio_list_size(&dev->deferred));
	bio_list_merge(bios, &dev->deferred);
	bio_list_init(&dev->deferred);
	dmu_failed_collect(dev, bios);
	bio_list_merge(bios, &dev->flush.waiting);
	bio_list_init(&dev->flush.waiting);
	if (dev->flush.state >= DMU_FLUSH_ASKING) {
		bio_list_merge(bios, &dev->flush.active);
		bio_list_init(&dev->flush.active);
		if (dev->flush.state == DMU_FLUSH_ASKING)
			dev->flush.state = DMU_FLUSH_IDLE;
	}
}

/*
 * For a suspend without flush. The core puts each bio that is given back at the head of its own
 * list: the last has to go first, so that a block's requests come again in their order.
 */
void dmu_requeue_all(struct dmu_device *dev)
{
	struct bio_list bios = BIO_EMPTY_LIST, reversed = BIO_EMPTY_LIST;
	struct bio *bio;

	spin_lock_irq(&dev->lock);
	WRITE_ONCE(dev->requeue, true);
	dmu_collect(dev, &bios);
	dmu_returned_collect(dev, &bios);
	spin_unlock_irq(&dev->lock);
	dmu_stop(DMU_STOP_COLLECTED);
	while ((bio = bio_list_pop(&bios)))
		bio_list_add_head(&reversed, bio);
	while ((bio = bio_list_pop(&reversed)))
		dmu_give_back(dev, bio);
}

static void dmu_fail_waiting(struct dmu_device *dev, int error)
{
	struct bio_list bios = BIO_EMPTY_LIST;

	spin_lock_irq(&dev->lock);
	dmu_collect(dev, &bios);
	spin_unlock_irq(&dev->lock);
	dmu_stop(DMU_STOP_COLLECTED);
	dmu_end_list(&bios, errno_to_blk_status(error));
}

/*
 * For the administrator: nothing is to wait any more. Where there is no worker, that is so for
 * what comes later, too, until there is one.
 */
void dmu_fail_all(struct dmu_device *dev, int error)
{
	spin_lock_irq(&dev->lock);
	if (!dev->opened)
		WRITE_ONCE(dev->failing, true);
	spin_unlock_irq(&dev->lock);
	dmu_fail_waiting(dev, error);
}

/* Something has come to wait although nothing is to. */
void dmu_fail_work(struct work_struct *work)
{
	struct dmu_device *dev = container_of(work, struct dmu_device, fail_work);

	if (READ_ONCE(dev->failing))
		dmu_fail_waiting(dev, -EIO);
}

/* Before the device goes: no bio is left, only questions. */
void dmu_free_cells(struct dmu_device *dev)
{
	struct dmu_cell *cell, *next;

	spin_lock_irq(&dev->lock);
	list_for_each_entry_safe(cell, next, &dev->cells, all) {
		WARN_ON(!bio_list_empty(&cell->bios) || cell->active);
		dmu_cell_remove(cell);
	}
	spin_unlock_irq(&dev->lock);
}

static int dmu_older(const struct dmu_cell *one, const struct dmu_cell *other)
{
	return one->id < other->id;
}

/* For a new opener: everything that the last one was told is unanswered again. */
void dmu_reask_all(struct dmu_device *dev)
{
	struct dmu_cell *cell, *next, *at;
	struct bio *bio;

	lockdep_assert_held(&dev->lock);
	list_for_each_entry_safe_reverse(cell, next, &dev->cells, all) {
		if (cell->state != DMU_ASKED && cell->state != DMU_PARKED)
			continue;
		if (cell->orphan && bio_list_empty(&cell->bios)) {
			dmu_cell_remove(cell);
			continue;
		}
		if (cell->state == DMU_PARKED)
			bio_list_for_each(bio, &cell->bios)
				dmu_io(bio)->since = jiffies;
		if (cell->orphan)
			dmu_ask(cell);
		dmu_layer_tell_from(cell);
		cell->state = DMU_ASKING;
		cell->told = true;
		list_for_each_entry(at, &dev->unsent, unsent)
			if (at != cell && dmu_older(cell, at))
				break;
		list_move_tail(&cell->unsent, &at->unsent);
	}
}

/* Asks again what was parked; only says which cell, NULL is all. Returns how many. */
unsigned int dmu_retry(struct dmu_device *dev, struct dmu_cell *only)
{
	struct dmu_cell *cell, *next;
	unsigned int count = 0;

	lockdep_assert_held(&dev->lock);
	list_for_each_entry_safe(cell, next, &dev->cells, all) {
		if (cell->state != DMU_PARKED || (only && only != cell))
			continue;
		count++;
		if (cell->orphan && bio_list_empty(&cell->bios))
			dmu_cell_remove(cell);
		else
			dmu_ask(cell);
	}
	return count;
}

/* The flush that is asked about, and those for the next one. */
static void dmu_late_flushes(struct dmu_device *dev, unsigned long limit, struct bio_list *late)
{
	struct dmu_flush *flush = &dev->flush;
	struct bio_list waiting = flush->waiting;
	struct bio *bio;

	if (time_before(flush->since, limit)) {
		bio_list_merge(late, &flush->active);
		bio_list_init(&flush->active);
	}
	bio_list_init(&flush->waiting);
	while ((bio = bio_list_pop(&waiting)))
		bio_list_add(time_after(dmu_io(bio)->since, limit) ? &flush->waiting : late, bio);
}

/* Fails what has waited for longer than fault_timeout. */
void dmu_timeout(struct work_struct *work)
{
	struct dmu_device *dev = container_of(to_delayed_work(work), struct dmu_device,
					      timeout_work);
	struct bio_list late = BIO_EMPTY_LIST, stay;
	struct dmu_cell *cell, *next;
	unsigned long limit;
	struct bio *bio;

	spin_lock_irq(&dev->lock);
	if (!dev->fault_timeout) {
		/* Another table has none. */
		spin_unlock_irq(&dev->lock);
		return;
	}
	limit = jiffies - dev->fault_timeout * HZ;
	list_for_each_entry_safe(cell, next, &dev->cells, all) {
		bool first = true;

		if (cell->state > DMU_ASKED)
			continue;
		bio_list_init(&stay);
		while ((bio = bio_list_pop(&cell->bios))) {
			if (time_after(dmu_io(bio)->since, limit)) {
				bio_list_add(&stay, bio);
			} else {
				bio_list_add(&late, bio);
				cell->orphan |= first;
			}
			first = false;
		}
		cell->bios = stay;
		if (!cell->orphan || cell->state != DMU_ASKING)
			continue;
		if (bio_list_empty(&cell->bios))
			dmu_cell_remove(cell);
		else
			dmu_ask(cell);
	}
	if (dev->flush.state >= DMU_FLUSH_ASKING)
		dmu_late_flushes(dev, limit, &late);
	queue_delayed_work(dev->wq, &dev->timeout_work, HZ / 2);
	spin_unlock_irq(&dev->lock);
	dmu_end_list(&late, BLK_STS_IOERR);
}
