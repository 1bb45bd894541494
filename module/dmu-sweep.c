// SPDX-License-Identifier: GPL-2.0-only
/*
 * What happens to many waiting requests at once: a suspend wants them back, the administrator
 * or a timeout fails them, a new opener is to be asked again.
 *
 * Only questions are swept, not cells that are claimed or being prepared: of those, what queues.
 */
#include "dmu-core.h"

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
	dev->requeue = true;
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
