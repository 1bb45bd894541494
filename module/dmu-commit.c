// SPDX-License-Identifier: GPL-2.0-only
/*
 * Commit on flush, and invalidations: the two things that wait for others.
 *
 * One flush runs at a time; those that come meanwhile share the next one. It notes the highest
 * mark, waits until the data of every placement up to there is written, flushes the devices,
 * asks the worker to commit, and ends its requests. With nothing uncommitted it ends after the
 * devices. All steps but the answer are taken by flush.work, which never runs twice at once.
 * Where much is uncommitted, or something for long, and nobody sends a flush, one runs that no
 * request waits for. No suspend waits for its end, so it is not at the devices while the device is
 * suspended, when they may go: dmu_flush_suspend().
 *
 * A device that failed a flush may have dropped what it was to write: every flush fails from
 * then on, until the administrator says clear_error. EIO of the worker says the same of what it
 * writes itself; any other code of it only means that the next flush asks again.
 */
#include "dmu-commit.h"
#include "dmu-core.h"
#include "dmu-io.h"
#include "dmu-layer.h"
#include "dmu-node.h"
#include "dmu-place.h"
#include "dmu-trace.h"

/* A flush, or a write with FUA that is written, waits for the next commit. */
void dmu_flush_join(struct dmu_device *dev, struct bio *bio)
{
	unsigned long flags;
	bool requeue;

	dmu_io(bio)->since = jiffies;
	spin_lock_irqsave(&dev->lock, flags);
	requeue = dmu_requeueing(dev);
	if (!requeue)
		bio_list_add(&dev->flush.waiting, bio);
	spin_unlock_irqrestore(&dev->lock, flags);
	if (requeue)
		dmu_end_bio(bio, BLK_STS_DM_REQUEUE);
	else
		queue_work(dev->wq, &dev->flush.work);
}

void dmu_flush_kick(struct dmu_device *dev)
{
	if (READ_ONCE(dev->flush.state) == DMU_FLUSH_DATA)
		queue_work(dev->wq, &dev->flush.work);
}

/* What was to be durable may be lost, whoever has sent the flush. */
void dmu_flush_failed(struct dmu_device *dev, int error)
{
	WRITE_ONCE(dev->flush.failed, true);
	wake_up(&dev->wait);
	DMERR_LIMIT("%s: a flush failed with %d: all do until clear_error", dev->name, error);
}

static void dmu_flush_end_io(struct bio *bio)
{
	struct dmu_device *dev = bio->bi_private;
	unsigned long flags;

	if (bio->bi_status)
		WRITE_ONCE(dev->flush.error, blk_status_to_errno(bio->bi_status));
	bio_put(bio);
	/* Who sees that none is pending, which the lock is for, may free the device. */
	spin_lock_irqsave(&dev->lock, flags);
	if (atomic_dec_and_test(&dev->flush.pending))
		queue_work(dev->wq, &dev->flush.work);
	spin_unlock_irqrestore(&dev->lock, flags);
}

static void dmu_flush_devices(struct dmu_device *dev)
{
	struct dmu_flush *flush = &dev->flush;
	struct dmu_table *table = dev->table;
	unsigned int i;

	for (i = 0; i < table->count; i++) {
		struct bio *bio;

		if (!table->devs[i].writable)
			continue;
		atomic_inc(&flush->pending);
		bio = dmu_bio_alloc(table->devs[i].dm_dev->bdev, 0,
				    REQ_OP_WRITE | REQ_PREFLUSH | REQ_SYNC, &dev->bios);
		bio->bi_private = dev;
		bio->bi_end_io = dmu_flush_end_io;
		dmu_submit_bio(bio);
	}
	if (atomic_dec_and_test(&flush->pending))
		queue_work(dev->wq, &flush->work);
}

static bool dmu_flush_data_done(struct dmu_device *dev)
{
	struct dmu_placement *placement;

	placement = list_first_entry_or_null(&dev->writing, struct dmu_placement, writing);
	return !placement || placement->mark > dev->flush.upto;
}

static bool dmu_flush_uncommitted(struct dmu_device *dev)
{
	struct dmu_placement *placement;

	placement = list_first_entry_or_null(&dev->placements, struct dmu_placement, list);
	return (placement && placement->mark <= dev->flush.upto) || dmu_layer_closed(dev);
}

/* The flush is over; its requests end with the lock dropped. */
static void dmu_flush_end(struct dmu_device *dev, blk_status_t status)
	__releases(&dev->lock) __acquires(&dev->lock)
{
	struct bio_list bios = dev->flush.active;
	struct bio *bio;

	bio_list_init(&dev->flush.active);
	WRITE_ONCE(dev->flush.state, DMU_FLUSH_IDLE);
	wake_up(&dev->wait);
	spin_unlock_irq(&dev->lock);
	while ((bio = bio_list_pop(&bios)))
		dmu_end_bio(bio, status);
	spin_lock_irq(&dev->lock);
}

static void dmu_flush_devices_done(struct dmu_device *dev)
{
	struct dmu_flush *flush = &dev->flush;

	if (flush->error) {
		dmu_flush_failed(dev, flush->error);
		dmu_flush_end(dev, BLK_STS_IOERR);
	} else if (!dmu_flush_uncommitted(dev)) {
		dmu_flush_end(dev, BLK_STS_OK);
	} else if (dmu_requeueing(dev)) {
		dmu_flush_end(dev, BLK_STS_DM_REQUEUE);
	} else {
		flush->id = dev->next_id++;
		flush->tell = 0;
		flush->told = false;
		flush->since = jiffies;
		WRITE_ONCE(flush->state, DMU_FLUSH_ASKING);
		dmu_count(dev, DMU_STAT_FLUSHES);
		trace_dmu_fault(dev->minor, DMU_FLUSH, 0, flush->id, 0, 0);
		wake_up(&dev->wait);
		if (unlikely(READ_ONCE(dev->failing)))
			queue_work(dev->wq, &dev->fail_work);
	}
}

/* Whether there is anything to begin a flush for. */
static bool dmu_flush_due(struct dmu_device *dev)
{
	struct dmu_flush *flush = &dev->flush;

	if (!bio_list_empty(&flush->waiting))
		return true;
	if (!dmu_has_uncommitted(dev))
		flush->wanted = false;
	return flush->wanted && !flush->suspended;
}

void dmu_flush_work(struct work_struct *work)
{
	struct dmu_device *dev = container_of(work, struct dmu_device, flush.work);
	struct dmu_flush *flush = &dev->flush;

	dmu_stop(DMU_STOP_FLUSHING);
	spin_lock_irq(&dev->lock);
	for (;;) {
		if (flush->state == DMU_FLUSH_IDLE) {
			if (!dmu_flush_due(dev))
				break;
			if (dmu_layer_closed(dev)) {
				/* Of a flush that has not been answered. */
				spin_unlock_irq(&dev->lock);
				dmu_layer_merge(dev);
				spin_lock_irq(&dev->lock);
				continue;
			}
			flush->wanted = false;
			flush->active = flush->waiting;
			bio_list_init(&flush->waiting);
			if (READ_ONCE(flush->failed)) {
				dmu_flush_end(dev, BLK_STS_IOERR);
				continue;
			}
			/* No placement has the mark of bits: it may come to nothing. */
			if (dmu_layer_close(dev))
				WRITE_ONCE(dev->last_mark, dev->last_mark + 1);
			flush->upto = dev->last_mark;
			WRITE_ONCE(flush->state, DMU_FLUSH_DATA);
		} else if (flush->state == DMU_FLUSH_DATA) {
			if (!dmu_flush_data_done(dev))
				break;
			if (flush->suspended && bio_list_empty(&flush->active)) {
				flush->wanted = true;
				WRITE_ONCE(flush->state, DMU_FLUSH_IDLE);
				continue;
			}
			flush->error = 0;
			atomic_set(&flush->pending, 1);
			WRITE_ONCE(flush->state, DMU_FLUSH_DEVICES);
			spin_unlock_irq(&dev->lock);
			dmu_flush_devices(dev);
			spin_lock_irq(&dev->lock);
			break;
		} else if (flush->state == DMU_FLUSH_DEVICES) {
			if (atomic_read(&flush->pending))
				break;
			dmu_flush_devices_done(dev);
		} else {
			break;
		}
	}
	spin_unlock_irq(&dev->lock);
}

/* Asks for a commit when something has been uncommitted for long, and goes on to do so. */
void dmu_flush_late(struct work_struct *work)
{
	struct dmu_flush *flush = container_of(to_delayed_work(work), struct dmu_flush, late);
	struct dmu_device *dev = container_of(flush, struct dmu_device, flush);
	unsigned long until, delay = DMU_ASK_AFTER;

	spin_lock_irq(&dev->lock);
	until = flush->uncommitted + DMU_ASK_AFTER;
	if (!dmu_has_uncommitted(dev)) {
		delay = 0;
	} else if (time_before(jiffies, until)) {
		delay = until - jiffies;
	} else if (flush->state == DMU_FLUSH_IDLE && dev->opened && !READ_ONCE(flush->failed)) {
		flush->wanted = true;
		queue_work(dev->wq, &flush->work);
	}
	if (delay)
		queue_delayed_work(dev->wq, &flush->late, delay);
	spin_unlock_irq(&dev->lock);
}

/* No request is left. Waits until the devices have done with a flush that none waits for. */
void dmu_flush_suspend(struct dmu_device *dev)
{
	spin_lock_irq(&dev->lock);
	dev->flush.suspended = true;
	spin_unlock_irq(&dev->lock);
	flush_work(&dev->flush.work);
	wait_event(dev->wait, READ_ONCE(dev->flush.state) != DMU_FLUSH_DEVICES);
}

/* So many placements are dropped before others have the lock. */
#define DMU_DROPS	256

/*
 * FLUSH_DONE (error 0) or FAIL: -ENOENT when no such flush was asked about. The caller has
 * dev->answer_mutex. Sleeps.
 */
int dmu_flush_answer(struct dmu_device *dev, u64 id, int error)
{
	struct dmu_flush *flush = &dev->flush;
	struct dmu_placement *placement;
	unsigned int dropped = 0;

	spin_lock_irq(&dev->lock);
	if (flush->state != DMU_FLUSH_ASKED || flush->id != id) {
		spin_unlock_irq(&dev->lock);
		return -ENOENT;
	}
	trace_dmu_commit(dev->minor, id, flush->upto, error);
	if (error == -EIO)
		dmu_flush_failed(dev, error);
	if (!error) {
		spin_unlock_irq(&dev->lock);
		dmu_layer_committed(dev);
		spin_lock_irq(&dev->lock);
	}
	while (!error && dmu_flush_uncommitted(dev)) {
		placement = list_first_entry(&dev->placements, struct dmu_placement, list);
		dmu_placed_drop(dev, placement);
		/* There may be hundreds of thousands. Nobody else answers, and no flush begins. */
		if (++dropped % DMU_DROPS)
			continue;
		spin_unlock_irq(&dev->lock);
		cond_resched();
		spin_lock_irq(&dev->lock);
	}
	flush->uncommitted = jiffies;
	WRITE_ONCE(dev->index_looked, 0);	/* there is more to forget */
	dmu_flush_end(dev, errno_to_blk_status(error));
	spin_unlock_irq(&dev->lock);
	queue_work(dev->wq, &flush->work);
	return 0;
}

static struct dmu_epoch *dmu_epoch_other(struct dmu_device *dev)
{
	return dev->epoch == &dev->epochs[0] ? &dev->epochs[1] : &dev->epochs[0];
}

static void dmu_epoch_release(struct percpu_ref *ref)
{
	struct dmu_epoch *epoch = container_of(ref, struct dmu_epoch, ref);

	queue_work(epoch->dev->wq, &epoch->dev->epoch_work);
}

/* Turns the epoch for those invalidations that wait, and tells of those that are through. */
void dmu_epoch_work(struct work_struct *work)
{
	struct dmu_device *dev = container_of(work, struct dmu_device, epoch_work);
	struct dmu_event *event, *next;
	struct dmu_epoch *old;
	LIST_HEAD(done);

	spin_lock_irq(&dev->lock);
	if (dev->turning) {
		spin_unlock_irq(&dev->lock);
		old = dmu_epoch_other(dev);
		if (!percpu_ref_is_zero(&old->ref))
			return;
		percpu_ref_reinit(&old->ref);
		spin_lock_irq(&dev->lock);
		list_splice_init(&dev->draining, &done);
		dev->turning = false;
	}
	if (!list_empty(&dev->invalidations)) {
		list_splice_init(&dev->invalidations, &dev->draining);
		dev->turning = true;
	}
	spin_unlock_irq(&dev->lock);
	dmu_stop(DMU_STOP_TURNING);
	if (dev->turning) {
		old = dev->epoch;
		/* See dmu_epoch_enter_rcu(). */
		smp_store_release(&dev->epoch, dmu_epoch_other(dev));
		percpu_ref_kill(&old->ref);
	}
	list_for_each_entry_safe(event, next, &done, list) {
		dmu_count(dev, DMU_STAT_INVALIDATES);
		dmu_event_post(dev, event);
	}
	wake_up(&dev->wait);
}

int dmu_epochs_init(struct dmu_device *dev)
{
	int error, i;

	for (i = 0; i < 2; i++) {
		dev->epochs[i].dev = dev;
		error = percpu_ref_init(&dev->epochs[i].ref, dmu_epoch_release, DMU_REF_FLAGS,
					GFP_KERNEL);
		if (error) {
			if (i)
				percpu_ref_exit(&dev->epochs[0].ref);
			return error;
		}
	}
	dev->epoch = &dev->epochs[0];
	return 0;
}

/* No request is left; a turn may still be under way. */
void dmu_epochs_exit(struct dmu_device *dev)
{
	wait_event(dev->wait, !READ_ONCE(dev->turning) && list_empty(&dev->invalidations));
	cancel_work_sync(&dev->epoch_work);
	percpu_ref_exit(&dev->epochs[0].ref);
	percpu_ref_exit(&dev->epochs[1].ref);
}
