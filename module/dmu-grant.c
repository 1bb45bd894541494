// SPDX-License-Identifier: GPL-2.0-only
/*
 * Grants: first writes that are placed without a question.
 *
 * The worker says beforehand where the blocks of a run go (GRANT): each to a place of its own, in
 * a row, or to the next unit of a pool. A write to one of them that is mapped to be read only is
 * then treated as if the worker had answered at once: the block is carried along from where it is
 * read, and its placement is uncommitted, under the mark after the last. The worker reads of it
 * (PLACED) before it reads any question.
 *
 * Units of a pool are taken in their order. One whose placement fails is not taken again: the
 * worker hears of it, as of any. A second pool waits for the end of the first, so that no write
 * has to wait for the worker to make a new one.
 *
 * A cell that finds a grant goes to dev->granting, and grant_work decides: not every context in
 * which a request arrives may sleep, and many cells share one run of the work. Whatever
 * stands in the way there, memory included, only means that the worker is asked.
 *
 * A grant ends with its opener: what decides looks at it again under dev->lock, in the moment
 * in which the placement is listed. So after the end, or an answer that takes it back, every
 * placement of it is in the list, for PLACED and for a dump.
 */
#include <linux/overflow.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include "dmu-cell.h"
#include "dmu-core.h"
#include "dmu-grant.h"
#include "dmu-layer.h"
#include "dmu-map.h"
#include "dmu-node.h"
#include "dmu-place.h"
#include "dmu-trace.h"

/* Units of the pools that are left. */
static u32 dmu_pool_left(struct dmu_grant *grant)
{
	return grant->pool.units - grant->pool.used + grant->next.units;
}

/* Whether a write to the block may be placed now. */
static bool dmu_grant_holds(struct dmu_device *dev, u64 block)
{
	struct dmu_grant *grant = &dev->grant;

	lockdep_assert_held(&dev->lock);
	return block - grant->block < grant->count &&
	       (grant->pooled ? dmu_pool_left(grant) > 0 : dev->untold_count < grant->budget) &&
	       !dev->requeue && atomic_read(&dev->uncommitted) < DMU_MAX_UNCOMMITTED &&
	       dev->last_mark < DMU_MAX_MARK;
}

/* Where the next write to the block would go, 0 for nowhere. */
static unsigned long dmu_grant_word(struct dmu_device *dev, u64 block)
{
	struct dmu_grant *grant = &dev->grant;
	struct dmu_pool *pool = &grant->pool;

	lockdep_assert_held(&dev->lock);
	if (!grant->pooled)
		return grant->word;
	if (pool->used == pool->units)
		return 0;
	return dmu_word(pool->device, true, pool->sector + pool->used * pool->stride -
			(block << dev->block_shift));
}

/* Whether a block that goes to word has its place by the grant; then nobody else gets it. */
static bool dmu_grant_take(struct dmu_device *dev, u64 block, unsigned long word)
{
	struct dmu_grant *grant = &dev->grant;

	if (!dmu_grant_holds(dev, block) || dmu_grant_word(dev, block) != word ||
	    dmu_placed_overlap(dev, block, 1, word, false))
		return false;
	if (grant->pooled && ++grant->pool.used == grant->pool.units) {
		grant->pool = grant->next;
		memset(&grant->next, 0, sizeof(grant->next));
	}
	return true;
}

/* Whether the worker should read of placements now, rather than with the next question. */
static bool dmu_grant_tells(struct dmu_device *dev)
{
	struct dmu_grant *grant = &dev->grant;

	if (!grant->pooled)
		return dev->untold_count >= grant->budget / 2;
	return dmu_pool_left(grant) <= grant->budget / 2;
}

static unsigned long dmu_grant_lookup(struct dmu_device *dev, u64 block)
{
	unsigned long word;
	u64 run;

	rcu_read_lock();
	word = dmu_find(dev, block, 1, &run);
	rcu_read_unlock();
	return word;
}

/* Takes the first bio of a cell that is to ask, if it need not. The caller holds dev->lock. */
bool dmu_grant_offer(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;
	struct bio *bio = bio_list_peek(&cell->bios);

	if (cell->type != DMU_FAULT || !op_is_write(bio_op(bio)) ||
	    !dmu_grant_holds(dev, cell->block) || !dmu_grant_lookup(dev, cell->block))
		return false;
	cell->active = bio_list_pop(&cell->bios);
	cell->state = DMU_CLAIMED;
	list_move_tail(&cell->unsent, &dev->granting);
	queue_work(dev->wq, &dev->grant_work);
	return true;
}

/* The worker has to be asked after all. */
static void dmu_grant_ask(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;

	spin_lock_irq(&dev->lock);
	bio_list_add_head(&cell->bios, cell->active);
	cell->active = NULL;
	if (dmu_requeueing(dev)) {
		dmu_return_cell(cell);
		return;
	}
	dmu_ask(cell);
	spin_unlock_irq(&dev->lock);
}

/* Makes the cell one that was answered. Its block is read where from says. */
static void dmu_grant_fill(struct dmu_cell *cell, unsigned long word, unsigned long from)
{
	u64 start = cell->block << cell->dev->block_shift;
	struct dmu_placement *placement = cell->placement;
	struct dmu_answer *a = &cell->answer;

	memset(a, 0, sizeof(*a));
	a->type = DMU_MAP;
	a->flags = DMU_WRITABLE | DMU_COPY_FIRST | DMU_HOLD_FLUSH;
	a->block = cell->block;
	a->count = 1;
	a->device = dmu_word_device(word);
	a->sector = start + dmu_word_shift(word);
	a->from_device = DMU_DEVICE_ZERO;
	if (dmu_word_device(from) != DMU_WORD_ZERO) {
		a->from_device = dmu_word_device(from);
		a->from_sector = start + dmu_word_shift(from);
	}
	a->mark = cell->dev->last_mark + 1;
	placement->block = cell->block;
	placement->count = 1;
	placement->mark = a->mark;
	placement->sector = a->sector;
	placement->device = a->device;
	placement->writable = true;
	placement->in_flight = true;
	cell->word = word;
	cell->error = 0;
}

/* Lists the placement and maps the block to it; the cell has what that needs. */
static bool dmu_grant_place(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;
	unsigned long from, word;
	bool placed = false;
	unsigned int flags;
	int error;

	mutex_lock(&dev->map_mutex);
	from = dmu_grant_lookup(dev, cell->block);
	spin_lock_irq(&dev->lock);
	word = dmu_grant_word(dev, cell->block);
	spin_unlock_irq(&dev->lock);
	if (!from || dmu_word_writable(from) || !word)
		goto out;
	flags = memalloc_noreclaim_save();
	error = dmu_store_ready(dev, cell->block, 1, word, GFP_NOWAIT);
	memalloc_noreclaim_restore(flags);
	if (error)
		goto out;
	spin_lock_irq(&dev->lock);
	if (dmu_grant_take(dev, cell->block, word)) {
		dmu_grant_fill(cell, word, from);
		dmu_placed_add(dev, cell->placement);
		list_add_tail(&cell->placement->untold, &dev->untold);
		dev->untold_count++;
		if (dmu_grant_tells(dev) && !dev->telling) {
			dev->telling = true;
			wake_up(&dev->wait);
		}
		cell->state = DMU_PREPARING;
		placed = true;
	}
	spin_unlock_irq(&dev->lock);
	dmu_stop(DMU_STOP_LISTED);
	if (placed)
		dmu_store(dev, cell->block, 1, word);
out:
	mutex_unlock(&dev->map_mutex);
	return placed;
}

static void dmu_grant_cell(struct dmu_cell *cell)
{
	struct dmu_device *dev = cell->dev;
	unsigned int flags;

	dmu_stop(DMU_STOP_GRANTING);
	cell->epoch = dmu_epoch_enter(dev);
	/* As an answer to it: see dmu_reserve_save(). */
	flags = memalloc_noreclaim_save();
	cell->event = dmu_event_alloc(dev, GFP_NOWAIT | __GFP_NOWARN);
	cell->placement = kmem_cache_alloc(dmu_placement_cache, GFP_NOWAIT | __GFP_NOWARN);
	memalloc_noreclaim_restore(flags);
	if (cell->event && cell->placement && dmu_grant_place(cell)) {
		dmu_count(dev, DMU_STAT_GRANTED);
		trace_dmu_answer(dev->minor, DMU_GRANT, cell->answer.flags, 0, cell->block, 0);
		dmu_prepare(cell);
		return;
	}
	if (cell->placement)
		kmem_cache_free(dmu_placement_cache, cell->placement);
	cell->placement = NULL;
	if (cell->event)
		dmu_event_free(dev, cell->event);
	cell->event = NULL;
	dmu_epoch_leave(cell->epoch);
	cell->epoch = NULL;
	dmu_grant_ask(cell);
}

void dmu_grant_work(struct work_struct *work)
{
	struct dmu_device *dev = container_of(work, struct dmu_device, grant_work);
	unsigned int flags = memalloc_noio_save();	/* for what is sent to a device */
	struct dmu_cell *cell;

	for (;;) {
		spin_lock_irq(&dev->lock);
		cell = list_first_entry_or_null(&dev->granting, struct dmu_cell, unsent);
		if (cell)
			list_del_init(&cell->unsent);
		spin_unlock_irq(&dev->lock);
		if (!cell)
			break;
		dmu_grant_cell(cell);
	}
	memalloc_noio_restore(flags);
}

/* The worker knows of the placement, or need not any more. */
void dmu_grant_told(struct dmu_device *dev, struct dmu_placement *placement)
{
	lockdep_assert_held(&dev->lock);
	if (list_empty(&placement->untold))
		return;
	list_del_init(&placement->untold);
	if (!--dev->untold_count)
		dev->telling = false;
}

/* Nothing is granted any more; whoever comes next hears of what was placed by a dump. */
void dmu_grant_end(struct dmu_device *dev)
{
	struct dmu_placement *placement, *next;

	lockdep_assert_held(&dev->lock);
	memset(&dev->grant, 0, sizeof(dev->grant));
	dmu_layer_grant(dev);
	list_for_each_entry_safe(placement, next, &dev->untold, untold)
		dmu_grant_told(dev, placement);
}

/* Checks that count blocks have places, from the first's on or one unit each. */
static int dmu_grant_check(struct dmu_device *dev, struct dmu_answer *a)
{
	u64 stride = a->flags & DMU_POOL ? a->from_sector : 0;
	u64 length;
	int error = 0;

	if (!(a->flags & DMU_POOL))
		return dmu_check_place(dev, a->device, a->sector,
				       dmu_run_sectors(dev, a->block, a->count), true);
	if (stride < dev->block_sectors ||
	    check_mul_overflow(stride, (u64)a->length, &length) || length > S64_MAX >> 7)
		return -ERANGE;
	/* Where one unit is aligned and so is the next, all are. */
	if (a->length > 1)
		error = dmu_check_place(dev, a->device, a->sector + stride, 0, true);
	return error ?: dmu_check_place(dev, a->device, a->sector,
					length - stride + dev->block_sectors, true);
}

/* Whether the places of a pool are in the table; one that has none left needs none. */
static bool dmu_pool_renew(struct dmu_device *dev, struct dmu_pool *pool)
{
	return pool->used == pool->units ||
	       !dmu_check_place(dev, pool->device, pool->sector,
				(pool->units - 1) * pool->stride + dev->block_sectors, true);
}

/* Another table has come: a place that it has not is granted no more. */
void dmu_grant_renew(struct dmu_device *dev)
{
	struct dmu_grant *grant = &dev->grant;
	bool holds;

	lockdep_assert_held(&dev->lock);
	if (grant->pooled)
		holds = dmu_pool_renew(dev, &grant->pool) && dmu_pool_renew(dev, &grant->next);
	else
		holds = !dmu_check_place(dev, dmu_word_device(grant->word),
					 (grant->block << dev->block_shift) +
					 dmu_word_shift(grant->word),
					 dmu_run_sectors(dev, grant->block, grant->count), true);
	if (grant->count && !holds)
		memset(grant, 0, sizeof(*grant));
	dmu_layer_grant(dev);
}

/* A pool; one beside it that has units left, for the same blocks, comes first. */
static int dmu_grant_pool(struct dmu_device *dev, struct dmu_grant *grant, struct dmu_answer *a)
{
	struct dmu_grant *old = &dev->grant;
	struct dmu_pool pool = {
		.device = a->device, .sector = a->sector, .stride = a->from_sector,
		.units = a->length,
	};

	lockdep_assert_held(&dev->lock);
	if (dev->layer)
		return -EEXIST;
	grant->pooled = true;
	grant->pool = pool;
	if (old->pooled && old->block == grant->block && old->count == grant->count &&
	    dmu_pool_left(old)) {
		if (old->next.units)
			return -ENOBUFS;
		grant->pool = old->pool;
		grant->next = pool;
	}
	return 0;
}

int dmu_take_grant(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_grant grant = {};
	int error = 0;

	if (a->count) {
		if (dmu_bad_run(dev, a->block, a->count))
			return -ERANGE;
		if (!a->length || a->length > DMU_MAX_BUDGET)
			return -EINVAL;
		error = dmu_grant_check(dev, a);
		if (error)
			return error;
		grant.block = a->block;
		grant.count = a->count;
		grant.budget = a->length;
		if (!(a->flags & DMU_POOL))
			grant.word = dmu_word(a->device, true,
					      a->sector - (a->block << dev->block_shift));
		if (grant.word && dev->layer && dev->layer->word != grant.word)
			return -EEXIST;
	} else if (a->flags & DMU_POOL) {
		return -EINVAL;
	}
	spin_lock_irq(&dev->lock);
	if (a->flags & DMU_POOL)
		error = dmu_grant_pool(dev, &grant, a);
	if (!error) {
		dev->grant = grant;
		dmu_layer_grant(dev);
		dev->telling = dev->untold_count > 0;
		wake_up(&dev->wait);
	}
	spin_unlock_irq(&dev->lock);
	return error;
}
