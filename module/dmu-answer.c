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
 *   E2BIG      it is longer than answers are here, and says something there
 *
 * A chain of LINKED answers is worked off in order; its one MAP to a write is not completed
 * before the end of the chain is done.
 */
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include "dmu-answer.h"
#include "dmu-trace.h"

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
	if (!dmu_failed_answer(dev, a->id, -a->code))
		return 0;
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

	if (a->id && !dmu_failed_answer(dev, a->id, 0))
		return 0;
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
	event->message.flags = DMU_TAKES_GRANTS;
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
	dev->dump_next = dev->placements.next;
	dev->dump_last = dev->last_mark;
	wake_up(&dev->wait);
	spin_unlock_irq(&dev->lock);
	return 0;
}

static int dmu_take_hold_failed(struct dmu_device *dev, struct dmu_answer *a)
{
	if (a->code != 0 && a->code != 1)
		return -EINVAL;
	spin_lock_irq(&dev->lock);
	dev->failed.hold = a->code;
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
	case DMU_GRANT:
		return dmu_take_grant(dev, a);
	case DMU_HOLD_FAILED:
		return dmu_take_hold_failed(dev, a);
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

/* Takes an answer, unless refusal says why not. */
static int dmu_take(struct dmu_device *dev, struct dmu_answer *a, struct dmu_chain *chain,
		    int refusal)
{
	struct dmu_cell *before = chain->held;
	unsigned int noio = memalloc_noio_save();
	int error;

	if (chain->linked && chain->error) {
		error = -ECANCELED;
	} else {
		error = refusal ?: dmu_take_one(dev, a, chain);
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

/* The batch of who says that its structure has size bytes. */
static int dmu_batch_get(struct dmu_batch *batch, struct dmu_batch __user *argument, size_t size)
{
	int error;

	if (size < _IOC_SIZE(DMU_IOC_ANSWER))
		return -EINVAL;
	error = copy_struct_from_user(batch, sizeof(*batch), argument, size);
	if (error)
		return error;
	if (!batch->answer_size)
		batch->answer_size = sizeof(struct dmu_answer);
	if (batch->count > DMU_MAX_BATCH || batch->reserved ||
	    batch->answer_size < sizeof(struct dmu_answer) ||
	    batch->answer_size > DMU_MAX_RECORD || batch->answer_size % 8)
		return -EINVAL;
	return 0;
}

/*
 * An answer of who says that it has size bytes. *refusal is E2BIG, negative, where it says something
 * that is not known here, else 0.
 */
static int dmu_answer_get(struct dmu_answer *a, struct dmu_answer __user *at, size_t size,
			  int *refusal)
{
	int zeroed = 1;

	if (copy_from_user(a, at, sizeof(*a)))
		return -EFAULT;
	if (size > sizeof(*a))
		zeroed = check_zeroed_user(at + 1, size - sizeof(*a));
	*refusal = zeroed ? 0 : -E2BIG;
	return min(zeroed, 0);
}

/* DMU_IOC_ANSWER, with an argument of so many bytes: every answer has its own result. */
long dmu_answer_batch(struct dmu_device *dev, struct dmu_batch __user *argument, size_t size)
{
	struct dmu_answer __user *at;
	struct dmu_chain chain = {};
	struct dmu_batch batch;
	struct dmu_answer a;
	u32 i, refused = 0;
	long error;

	error = dmu_batch_get(&batch, argument, size);
	if (error)
		return error;
	mutex_lock(&dev->answer_mutex);
	for (i = 0; i < batch.count && !error; i++) {
		int result = -ENODEV, refusal;

		/* The node is free for the next worker when this one has gone. */
		if (fatal_signal_pending(current)) {
			error = -EINTR;
			break;
		}
		dmu_stop(DMU_STOP_ANSWERING);
		at = u64_to_user_ptr(batch.answers + i * batch.answer_size);
		error = dmu_answer_get(&a, at, batch.answer_size, &refusal);
		if (error)
			break;
		if (!dev->gone && dev->table)
			result = dmu_take(dev, &a, &chain, refusal);
		refused += result != 0;
		error = put_user(result, &at->result);
		cond_resched();
	}
	dmu_chain_end(&chain);
	mutex_unlock(&dev->answer_mutex);
	if (put_user(refused, &argument->refused))
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
		if (fatal_signal_pending(current))
			error = -EINTR;
		else if (copy_from_user(&a, buffer + done, sizeof(a)))
			error = -EFAULT;
		else if (dev->gone || !dev->table)
			error = -ENODEV;
		else if (a.type == DMU_DATA)
			error = -EPERM;
		else
			error = dmu_take(dev, &a, &chain, 0);
		if (!error)
			done += sizeof(a);
		cond_resched();
	}
	dmu_chain_end(&chain);
	mutex_unlock(&dev->answer_mutex);
	return done ? done : error;
}
