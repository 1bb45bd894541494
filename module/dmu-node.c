// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/dmu/NAME: the worker's end.
 *
 * read() hands out, in this order: a dump that was asked for, placements of what was granted and
 * events as they happened, faults, writes that have failed, the question of a flush. What is handed
 * out is told; when its opener closes the node it is to be told again to the next one, events
 * excepted, which were for that opener only, and placements, of which the next one hears by its
 * dump.
 */
#include <linux/cdev.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/idr.h>
#include <linux/mm.h>
#include <linux/poll.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include "dmu-cell.h"
#include "dmu-commit.h"
#include "dmu-core.h"
#include "dmu-grant.h"
#include "dmu-io.h"
#include "dmu-layer.h"
#include "dmu-map.h"
#include "dmu-node.h"
#include "dmu-place.h"
#include "dmu-target.h"
#include "dmu-trace.h"

#define DMU_MINORS 4096

static dev_t dmu_region;
static struct class *dmu_class;
static struct cdev dmu_cdev;
static DEFINE_IDR(dmu_minors);		/* under dmu_devices_mutex */

/* An event for the opener of now; NULL without memory, or when too many are unread. */
struct dmu_event *dmu_event_alloc(struct dmu_device *dev, gfp_t gfp)
{
	struct dmu_event *event = kmem_cache_zalloc(dmu_event_cache, gfp);
	unsigned long flags;
	bool full;

	if (!event)
		return NULL;
	spin_lock_irqsave(&dev->lock, flags);
	full = dev->event_count >= DMU_MAX_EVENTS;
	if (!full)
		dev->event_count++;
	event->session = dev->session;
	spin_unlock_irqrestore(&dev->lock, flags);
	if (full) {
		kmem_cache_free(dmu_event_cache, event);
		event = NULL;
	}
	return event;
}

void dmu_event_free(struct dmu_device *dev, struct dmu_event *event)
{
	unsigned long flags;

	spin_lock_irqsave(&dev->lock, flags);
	dev->event_count--;
	spin_unlock_irqrestore(&dev->lock, flags);
	kmem_cache_free(dmu_event_cache, event);
}

/* Queues the event, or drops it when its opener has gone. The caller holds dev->lock. */
static void dmu_event_queue(struct dmu_device *dev, struct dmu_event *event)
{
	lockdep_assert_held(&dev->lock);
	event->after = dev->last_mark;
	if (dev->opened && !dev->gone && event->session == dev->session) {
		list_add_tail(&event->list, &dev->events);
		wake_up(&dev->wait);
	} else {
		dev->event_count--;
		kmem_cache_free(dmu_event_cache, event);
	}
}

void dmu_event_post(struct dmu_device *dev, struct dmu_event *event)
{
	unsigned long flags;

	spin_lock_irqsave(&dev->lock, flags);
	dmu_event_queue(dev, event);
	spin_unlock_irqrestore(&dev->lock, flags);
}

/*
 * Reports that a placement came to nothing. Unlike other events this one concerns whoever is
 * the worker by now: it may have been told of the placement in a dump. The caller holds dev->lock
 * since it has dropped the placement: a dump has it, or the event follows.
 */
void dmu_map_error(struct dmu_device *dev, struct dmu_event *event, u64 block, u64 mark,
		   int error)
{
	dmu_count(dev, DMU_STAT_ERRORS);
	memset(&event->message, 0, sizeof(event->message));
	event->message.type = DMU_MAP_ERROR;
	event->message.block = block;
	event->message.count = 1;
	event->message.mark = mark;
	event->message.code = error;
	event->session = dev->session;
	dmu_event_queue(dev, event);
}

/* Reports that a backing device has failed under a request; as far as there is memory. */
void dmu_device_error(struct dmu_device *dev, struct bio *bio, bool write, int error)
{
	struct dmu_event *event = dmu_event_alloc(dev, GFP_ATOMIC | __GFP_NOWARN);
	struct dmu_table *table = READ_ONCE(dev->table);
	unsigned int i;

	if (!event)
		return;
	for (i = 0; i < table->count; i++)
		if (dmu_bio_is_on(bio, table->devs[i].dm_dev->bdev))
			break;
	event->message.type = DMU_DEVICE_ERROR;
	event->message.flags = write ? DMU_WRITE : DMU_READ;
	event->message.device = i < table->count ? i : DMU_DEVICE_ZERO;
	event->message.code = error;
	dmu_event_post(dev, event);
}

/*
 * DATA: bytes of the worker's memory, into a read or onto a device.
 */

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
	/* The bits of a layer say for good that a block is there. */
	if (dmu_layer_of(dev, a->block))
		return -EEXIST;
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
	event->message.flags = DMU_TAKES_GRANTS | DMU_TAKES_LAYERS |
			       DMU_TAKES_POOLS;
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
			event->message.mark = atomic_read(&dev->uncommitted) +
					      atomic_read(&dev->touched);
		else if (i == DMU_STAT_WAITING)
			event->message.mark = atomic_read(&dev->busy);
		dmu_event_post(dev, event);
	}
	return 0;
}

static int dmu_take_dump(struct dmu_device *dev)
{
	bool touched = atomic_read(&dev->touched);
	int error = 0;

	spin_lock_irq(&dev->lock);
	/* Who would pass over them must not come to commit. */
	if (touched && !dev->knows_layers) {
		error = -EPROTO;
	} else {
		dev->dumping = true;
		dev->dump_next = dev->placements.next;
		dev->dump_bits = 0;
		dev->dump_round = touched ? 0 : 2;
		/* A mark that no placement has, nor a flush under way. */
		if (touched)
			WRITE_ONCE(dev->last_mark, dev->last_mark + 1);
		dev->dump_last = dev->last_mark;
		wake_up(&dev->wait);
	}
	spin_unlock_irq(&dev->lock);
	return error;
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

/* The flags that an answer may have. */
static u32 dmu_flags_of(struct dmu_answer *a)
{
	if (a->type == DMU_MAP)
		return DMU_ALL_ANSWER_FLAGS & ~DMU_POOL;
	return a->type == DMU_GRANT ? DMU_LINKED | DMU_POOL : DMU_LINKED;
}

static int dmu_take_one(struct dmu_device *dev, struct dmu_answer *a, struct dmu_chain *chain)
{
	if (a->flags & ~dmu_flags_of(a) || a->reserved[0] || a->reserved[1] || a->reserved[2])
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
	case DMU_LAYER:
		return dmu_take_layer(dev, a);
	case DMU_BITS:
		return dmu_take_bits(dev, a);
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
 * An answer of who says that it has size bytes. *refusal is E2BIG, negative, where it says
 * something that is not known here, else 0.
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

/* Whether the answer makes something uncommitted, under a mark that it had or has been given. */
static bool dmu_marks(struct dmu_answer *a)
{
	return a->type == DMU_MAP && a->flags & DMU_HOLD_FLUSH;
}

/* DMU_IOC_ANSWER, with an argument of so many bytes: every answer has its own result. */
static long dmu_answer_batch(struct dmu_device *dev, struct dmu_batch __user *argument, size_t size)
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
		/* Its placement is in the list by now, whether the caller can be told or not. */
		if (!error && dmu_marks(&a))
			error = put_user(a.mark, &at->mark);
		cond_resched();
	}
	dmu_chain_end(&chain);
	mutex_unlock(&dev->answer_mutex);
	if (put_user(refused, &argument->refused))
		error = -EFAULT;
	return error;
}

/*
 * write(2): as many as are taken in a row. No address of the caller is followed, so DATA and BITS are
 * not taken here: the descriptor may have become the standard output of somebody else.
 */
static ssize_t dmu_answer_write(struct dmu_device *dev, const char __user *buffer, size_t size)
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
		else if (a.type == DMU_DATA || a.type == DMU_BITS)
			error = -EPERM;
		else if (dmu_marks(&a) && !a.mark)
			error = -ERANGE;	/* nobody would hear of it */
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

/* The node. */

static void dmu_device_free(struct kref *ref)
{
	struct dmu_device *dev = container_of(ref, struct dmu_device, ref);

	dmu_layer_free(dev);
	kfree(dev);
}

void dmu_device_put(struct dmu_device *dev)
{
	kref_put(&dev->ref, dmu_device_free);
}

static int dmu_open(struct inode *inode, struct file *file)
{
	struct dmu_device *dev;
	int error = 0;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	mutex_lock(&dmu_devices_mutex);
	dev = idr_find(&dmu_minors, iminor(inode));
	if (dev)
		kref_get(&dev->ref);
	mutex_unlock(&dmu_devices_mutex);
	if (!dev)
		return -ENODEV;
	dmu_stop(DMU_STOP_OPENING);
	spin_lock_irq(&dev->lock);
	if (dev->opened) {
		error = -EBUSY;
	} else {
		dev->opened = true;
		dev->knows_layers = false;
		dev->failing = false;
		dev->session++;
		WRITE_ONCE(dev->message_size, DMU_MIN_MESSAGE);
	}
	spin_unlock_irq(&dev->lock);
	if (error) {
		dmu_device_put(dev);
		return error;
	}
	file->private_data = dev;
	return nonseekable_open(inode, file);
}

static int dmu_release(struct inode *inode, struct file *file)
{
	struct dmu_device *dev = file->private_data;
	struct dmu_event *event, *next;
	LIST_HEAD(events);

	dmu_stop(DMU_STOP_CLOSING);
	spin_lock_irq(&dev->lock);
	dev->opened = false;
	dev->dumping = false;
	dev->flush.failure_told = false;
	dmu_grant_end(dev);
	list_splice_init(&dev->events, &events);
	dmu_reask_all(dev);
	if (dev->flush.state == DMU_FLUSH_ASKED) {
		dev->flush.state = DMU_FLUSH_ASKING;
		dev->flush.told = true;
	}
	dev->flush.tell = 0;
	if (dev->failed.state == DMU_FAILED_ASKED) {
		dev->failed.state = DMU_FAILED_ASKING;
		dev->failed.told = true;
	}
	spin_unlock_irq(&dev->lock);
	list_for_each_entry_safe(event, next, &events, list)
		dmu_event_free(dev, event);
	dmu_device_put(dev);
	return 0;
}

/* Whether there is a flush to ask about, of one who hears what has become present. */
static bool dmu_flush_asks(struct dmu_device *dev)
{
	return dev->flush.state == DMU_FLUSH_ASKING &&
	       (dev->knows_layers || !dmu_layer_closed(dev));
}

static bool dmu_has_message(struct dmu_device *dev)
{
	return dev->dumping || !list_empty(&dev->events) || !list_empty(&dev->unsent) ||
	       dmu_flush_asks(dev) || dev->telling ||
	       dev->failed.state == DMU_FAILED_ASKING ||
	       READ_ONCE(dev->flush.failed) != dev->flush.failure_told;
}

static void dmu_tell_placement(struct dmu_device *dev, struct dmu_placement *placement,
			       struct dmu_message *message)
{
	message->flags = (placement->writable ? DMU_WRITE : 0) |
			 (placement->in_flight ? DMU_IN_FLIGHT : 0);
	message->block = placement->block;
	message->count = placement->count;
	message->mark = placement->mark;
	message->sector = placement->sector;
	message->device = placement->device;
	dmu_grant_told(dev, placement);
}

/* The next word of bits for a dump. */
static bool dmu_dump_bits(struct dmu_device *dev, struct dmu_message *message)
{
	for (; dev->dump_round < 2; dev->dump_round++, dev->dump_bits = 0) {
		if (!dmu_layer_next(dev, dev->dump_round, &dev->dump_bits, message))
			continue;
		message->mark = dmu_layer_mark(dev, dev->dump_round, &dev->dump_last);
		return true;
	}
	return false;
}

/* The next record of a dump: a placement, or that there are no more. */
static void dmu_next_dump(struct dmu_device *dev, struct dmu_message *message)
{
	struct dmu_placement *placement;

	if (dev->dump_next != &dev->placements) {
		placement = list_entry(dev->dump_next, struct dmu_placement, list);
		if (placement->mark <= dev->dump_last) {
			message->type = DMU_UNCOMMITTED_IS;
			dmu_tell_placement(dev, placement, message);
			dev->dump_next = placement->list.next;
			return;
		}
	}
	if (dmu_dump_bits(dev, message))
		return;
	message->type = DMU_DUMP_DONE;
	message->mark = dev->last_mark;
	dev->dumping = false;
}

/* A fault says what its first request wants; without one it is content with a sector. */
static void dmu_tell_request(struct dmu_cell *cell, struct dmu_message *message)
{
	struct bio *bio = bio_list_peek(&cell->bios);

	if (cell->type != DMU_FAULT)
		return;
	message->sector = bio ? bio->bi_iter.bi_sector : cell->block << cell->dev->block_shift;
	message->block_sectors = bio ? bio_sectors(bio) : 1;
}

/* The placement that has to be told before anything but a dump. */
static struct dmu_placement *dmu_next_untold(struct dmu_device *dev)
{
	struct dmu_placement *placement;
	struct dmu_event *event;

	placement = list_first_entry_or_null(&dev->untold, struct dmu_placement, untold);
	event = list_first_entry_or_null(&dev->events, struct dmu_event, list);
	return placement && event && placement->mark > event->after ? NULL : placement;
}

/* Takes the next message; an event is handed out with it, to be freed: it counts no more. */
static bool dmu_next(struct dmu_device *dev, struct dmu_message *message,
		     struct dmu_event **event)
{
	struct dmu_placement *placement = dmu_next_untold(dev);
	struct dmu_cell *cell;

	memset(message, 0, sizeof(*message));
	*event = NULL;
	if (dev->dumping) {
		dmu_next_dump(dev, message);
	} else if (placement) {
		message->type = DMU_PLACED;
		dmu_tell_placement(dev, placement, message);
	} else if (!list_empty(&dev->events)) {
		*event = list_first_entry(&dev->events, struct dmu_event, list);
		list_del(&(*event)->list);
		dev->event_count--;
		*message = (*event)->message;
	} else if (READ_ONCE(dev->flush.failed) != dev->flush.failure_told) {
		dev->flush.failure_told = !dev->flush.failure_told;
		message->type = DMU_FLUSH_FAILED;
		message->code = dev->flush.failure_told ? EIO : 0;
	} else if (!list_empty(&dev->unsent)) {
		cell = list_first_entry(&dev->unsent, struct dmu_cell, unsent);
		if (dmu_layer_next_for(cell, message))
			return true;
		list_del_init(&cell->unsent);
		cell->state = DMU_ASKED;
		message->type = cell->type;
		message->flags = cell->flags | (cell->told ? DMU_AGAIN : 0);
		message->id = cell->id;
		message->block = cell->block;
		message->count = cell->count;
		dmu_tell_request(cell, message);
	} else if (dev->failed.state == DMU_FAILED_ASKING) {
		dev->failed.state = DMU_FAILED_ASKED;
		message->type = DMU_WRITES_FAILED;
		message->flags = dev->failed.told ? DMU_AGAIN : 0;
		message->id = dev->failed.id;
		message->code = dev->failed.error;
		dev->failed.told = false;
	} else if (dmu_flush_asks(dev) &&
		   dmu_layer_next_closed(dev, &dev->flush.tell, message)) {
		message->mark = dev->flush.upto;
	} else if (dmu_flush_asks(dev)) {
		dev->flush.state = DMU_FLUSH_ASKED;
		message->type = DMU_FLUSH;
		message->flags = dev->flush.told ? DMU_AGAIN : 0;
		message->id = dev->flush.id;
		message->mark = dev->flush.upto;
	} else {
		return false;
	}
	return true;
}

/* The caller could not be given the message: as if it had not been taken. */
static void dmu_untake(struct dmu_device *dev, struct dmu_message *message,
		       struct dmu_event *event)
{
	struct dmu_placement *placement;
	struct dmu_cell *cell;

	spin_lock_irq(&dev->lock);
	if (event) {
		list_add(&event->list, &dev->events);
		dev->event_count++;
	} else if (message->type == DMU_PLACED) {
		list_for_each_entry(placement, &dev->placements, list) {
			if (placement->mark != message->mark)
				continue;
			list_add(&placement->untold, &dev->untold);
			dev->untold_count++;
			break;
		}
	} else if (message->type == DMU_UNCOMMITTED_IS) {
		while (dev->dumping && dev->dump_next->prev != &dev->placements) {
			placement = list_entry(dev->dump_next->prev, struct dmu_placement, list);
			if (placement->mark < message->mark)
				break;
			dev->dump_next = &placement->list;
		}
	} else if (message->type == DMU_PRESENT) {
		/* What is told twice is no news. */
		dev->dump_round = 0;
		dev->dump_bits = 0;
		dev->flush.tell = 0;
		if (!list_empty(&dev->unsent))
			dmu_layer_tell_from(list_first_entry(&dev->unsent, struct dmu_cell,
							     unsent));
	} else if (message->type == DMU_DUMP_DONE) {
		dev->dumping = true;
		dev->dump_next = &dev->placements;
	} else if (message->type == DMU_FLUSH_FAILED) {
		dev->flush.failure_told = !message->code;
	} else if (message->type == DMU_WRITES_FAILED) {
		if (dev->failed.id == message->id && dev->failed.state == DMU_FAILED_ASKED)
			dev->failed.state = DMU_FAILED_ASKING;
	} else if (message->type == DMU_FLUSH) {
		if (dev->flush.id == message->id && dev->flush.state == DMU_FLUSH_ASKED)
			dev->flush.state = DMU_FLUSH_ASKING;
	} else {
		cell = dmu_cell_by_id(dev, message->id);
		if (cell && cell->state == DMU_ASKED) {
			cell->state = DMU_ASKING;
			list_move(&cell->unsent, &dev->unsent);
		}
	}
	spin_unlock_irq(&dev->lock);
}

/* Gives out a message to who wants it to have size bytes. */
static bool dmu_message_put(char __user *to, struct dmu_message *message, size_t size)
{
	size_t known = min(size, sizeof(*message));

	return copy_to_user(to, message, known) ||
	       (size > known && clear_user(to + known, size - known));
}

static ssize_t dmu_read(struct file *file, char __user *buffer, size_t size, loff_t *offset)
{
	struct dmu_device *dev = file->private_data;
	size_t done = 0, each = READ_ONCE(dev->message_size);
	struct dmu_message message;
	struct dmu_event *event;
	bool more;

	if (size < each)
		return -EINVAL;
	while (size - done >= each) {
		spin_lock_irq(&dev->lock);
		more = dev->gone ? false : dmu_next(dev, &message, &event);
		spin_unlock_irq(&dev->lock);
		if (dev->gone && !more)
			return done ? done : -ENODEV;
		if (!more) {
			if (done)
				return done;
			if (file->f_flags & O_NONBLOCK)
				return -EAGAIN;
			if (wait_event_interruptible(dev->wait, READ_ONCE(dev->gone) ||
						     dmu_has_message(dev)))
				return -ERESTARTSYS;
			continue;
		}
		dmu_stop(DMU_STOP_READING);
		if (dmu_message_put(buffer + done, &message, each)) {
			dmu_untake(dev, &message, event);
			return done ? done : -EFAULT;
		}
		if (event)
			kmem_cache_free(dmu_event_cache, event);
		done += each;
	}
	return done;
}

static ssize_t dmu_write(struct file *file, const char __user *buffer, size_t size,
			 loff_t *offset)
{
	return dmu_answer_write(file->private_data, buffer, size);
}

/* DMU_IOC_ABI, with an argument of so many bytes. */
static long dmu_abi(struct dmu_device *dev, struct dmu_abi __user *argument, size_t size)
{
	struct dmu_abi abi;
	int error;

	error = copy_struct_from_user(&abi, sizeof(abi), argument, size);
	if (error)
		return error;
	if (abi.message_size) {
		if (abi.message_size < DMU_MIN_MESSAGE || abi.message_size > DMU_MAX_RECORD ||
		    abi.message_size % 8)
			return -EINVAL;
		WRITE_ONCE(dev->message_size, abi.message_size);
	}
	abi.version = DMU_VERSION;
	abi.message_size = READ_ONCE(dev->message_size);
	abi.message_known = sizeof(struct dmu_message);
	abi.answer_known = sizeof(struct dmu_answer);
	abi.features = DMU_FEATURE_GRANTS | DMU_FEATURE_HOLD_FAILED | DMU_FEATURE_MARKS_RISE |
		       DMU_FEATURE_COMMITS | DMU_FEATURE_LAYERS | DMU_FEATURE_POOLS;
	return copy_to_user(argument, &abi, min(size, sizeof(abi))) ? -EFAULT : 0;
}

/* An ioctl is known by its number; the size in it is what the caller says of its structure. */
static long dmu_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	void __user *at = (void __user *)argument;

	if (_IOC_TYPE(command) != _IOC_TYPE(DMU_IOC_ANSWER) ||
	    _IOC_DIR(command) != (_IOC_READ | _IOC_WRITE))
		return -ENOTTY;
	switch (_IOC_NR(command)) {
	case _IOC_NR(DMU_IOC_ANSWER):
		return dmu_answer_batch(file->private_data, at, _IOC_SIZE(command));
	case _IOC_NR(DMU_IOC_ABI):
		return dmu_abi(file->private_data, at, _IOC_SIZE(command));
	default:
		return -ENOTTY;
	}
}

static __poll_t dmu_poll(struct file *file, poll_table *table)
{
	struct dmu_device *dev = file->private_data;
	__poll_t mask = EPOLLOUT | EPOLLWRNORM;

	poll_wait(file, &dev->wait, table);
	spin_lock_irq(&dev->lock);
	if (dev->gone)
		mask = EPOLLHUP | EPOLLERR;
	else if (dmu_has_message(dev))
		mask |= EPOLLIN | EPOLLRDNORM;
	spin_unlock_irq(&dev->lock);
	return mask;
}

static const struct file_operations dmu_fops = {
	.owner = THIS_MODULE,
	.open = dmu_open,
	.release = dmu_release,
	.read = dmu_read,
	.write = dmu_write,
	.poll = dmu_poll,
	.unlocked_ioctl = dmu_ioctl,
	.compat_ioctl = DMU_COMPAT_IOCTL(dmu_ioctl),
	.llseek = noop_llseek,
};

/* Shows the device to user space; under dmu_devices_mutex. */
int dmu_node_add(struct dmu_device *dev)
{
	struct device *node;
	int minor = idr_alloc(&dmu_minors, dev, 0, DMU_MINORS, GFP_KERNEL);

	if (minor < 0)
		return minor;
	dev->minor = minor;
	dev->major = MAJOR(dmu_region);
	node = device_create(dmu_class, NULL, MKDEV(MAJOR(dmu_region), minor), NULL, "dmu!%s",
			     dev->name);
	if (IS_ERR(node)) {
		idr_remove(&dmu_minors, minor);
		return PTR_ERR(node);
	}
	return 0;
}

void dmu_node_remove(struct dmu_device *dev)
{
	device_destroy(dmu_class, MKDEV(MAJOR(dmu_region), dev->minor));
	idr_remove(&dmu_minors, dev->minor);
}

int dmu_node_init(void)
{
	int error = alloc_chrdev_region(&dmu_region, 0, DMU_MINORS, "dmu");

	if (error)
		return error;
	dmu_class = dmu_class_create("dmu");
	if (IS_ERR(dmu_class)) {
		error = PTR_ERR(dmu_class);
		goto no_class;
	}
	cdev_init(&dmu_cdev, &dmu_fops);
	dmu_cdev.owner = THIS_MODULE;
	error = cdev_add(&dmu_cdev, dmu_region, DMU_MINORS);
	if (error)
		goto no_cdev;
	return 0;

no_cdev:
	class_destroy(dmu_class);
no_class:
	unregister_chrdev_region(dmu_region, DMU_MINORS);
	return error;
}

void dmu_node_exit(void)
{
	cdev_del(&dmu_cdev);
	class_destroy(dmu_class);
	unregister_chrdev_region(dmu_region, DMU_MINORS);
	idr_destroy(&dmu_minors);
}
