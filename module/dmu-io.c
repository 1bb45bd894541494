// SPDX-License-Identifier: GPL-2.0-only
/*
 * The path of a request: through the index if it can, into a queue if it must.
 */
#include <linux/hash.h>
#include <linux/list_sort.h>
#include <linux/slab.h>
#include "dmu-cell.h"
#include "dmu-commit.h"
#include "dmu-core.h"
#include "dmu-io.h"
#include "dmu-layer.h"
#include "dmu-map.h"
#include "dmu-node.h"
#include "dmu-place.h"

void dmu_end_bio(struct bio *bio, blk_status_t status)
{
	bio->bi_status = status;
	bio_endio(bio);
}

/*
 * Forced writes (FUA): with something uncommitted, or when it has waited, such a write is a write,
 * then a commit.
 *
 * A suspend that comes between the two gives the request back, and it is written once more after
 * the resume. So that nothing newer is written over then, what comes upon its sectors meanwhile
 * waits until it has ended: it is deferred, and all others line up behind it. That is dear and
 * rare: who wants to know what a disk has in the end does not write where a write is still under
 * way.
 *
 * Such a write is within one block, so that a suspend keeps its order: dmu_map() cuts it.
 */

/* A commit has to follow the write, whose sector is the target's still. Any context. */
void dmu_force(struct dmu_device *dev, struct bio *bio)
{
	struct dmu_io *io = dmu_io(bio);
	unsigned long flags;

	bio->bi_opf &= ~REQ_FUA;
	io->forced = bio_sectors(bio);
	io->sector = bio->bi_iter.bi_sector;
	spin_lock_irqsave(&dev->lock, flags);
	dmu_returned_stamp(dev, bio);
	list_add_tail(&io->forcing, &dev->forced);
	atomic_inc(&dev->forcing);
	spin_unlock_irqrestore(&dev->lock, flags);
}

/* It ends, or is not sent for now: as it was. The caller holds dev->lock. */
void dmu_forced_end(struct dmu_device *dev, struct bio *bio)
{
	struct dmu_io *io = dmu_io(bio);

	lockdep_assert_held(&dev->lock);
	bio->bi_opf |= REQ_FUA;
	io->forced = 0;
	list_del(&io->forcing);
	atomic_dec(&dev->forcing);
	if (!bio_list_empty(&dev->deferred))
		mod_delayed_work(dev->wq, &dev->deferred_work, 0);
}

/* Whether the request changes what a forced one has written. The caller holds dev->lock. */
bool dmu_forced_meets(struct dmu_device *dev, struct bio *bio)
{
	u64 start = bio->bi_iter.bi_sector;
	struct dmu_io *io;

	lockdep_assert_held(&dev->lock);
	if (!op_is_write(bio_op(bio)))
		return false;
	list_for_each_entry(io, &dev->forced, forcing)
		if (io->sector < bio_end_sector(bio) && start < io->sector + io->forced)
			return true;
	return false;
}

/* The same for who does not hold dev->lock. */
bool dmu_forced_may_meet(struct dmu_device *dev, struct bio *bio)
{
	unsigned long flags;
	bool meets;

	if (likely(!atomic_read(&dev->forcing)))
		return false;
	spin_lock_irqsave(&dev->lock, flags);
	meets = dmu_forced_meets(dev, bio);
	spin_unlock_irqrestore(&dev->lock, flags);
	return meets;
}

/* Sending a bio to a place. */

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
 * The order of what a suspend without flush gives back to the device-mapper core.
 *
 * The core puts what it is given back at the head of its list, and takes requests still while
 * dmu_presuspend() runs: one that comes then is given back after the others and stands before them.
 * So of each request that is given back it is noted when it had come. When they come again after
 * the resume, one whose blocks are noted for an earlier one waits for that one.
 *
 * What is noted is known by its array of bio_vecs, which is nobody else's until it ends, and its
 * first sector; a discard, which has none, by its sectors: two that are alike may change places.
 *
 * Whatever comes while a suspend has its requests given back goes back as well, also what the index
 * serves: the core looks at what it was given back for a moment longer, and one that comes again at
 * once must not have ended by then.
 *
 * Only order depends on a note. Whoever is taken for another one waits for others in vain at most,
 * and so does whoever waits for one that does not come, because the core has failed it: when no
 * note has gone for a while, all go. Without memory for a note its request has no order.
 */

#define DMU_PATIENCE	HZ	/* without a request that was noted */

struct dmu_note {
	struct list_head list;		/* dev->returned.notes; after a resume by arrival */
	struct hlist_node node;		/* dev->returned.found */
	const struct bio_vec *vecs;
	u64 sector;
	unsigned int count;
	blk_opf_t op;
	u64 arrival;
	struct bio *bio;		/* has come again, and waits for an earlier one */
	struct list_head turn;		/* of that one's behind */
	struct list_head behind;	/* those that wait for this one */
};

/* Where a request begins, and what it has: of one that was sent its own iterator says no more. */
static u64 dmu_note_sector(struct bio *bio)
{
	return dmu_io(bio)->forced ? dmu_io(bio)->sector : bio->bi_iter.bi_sector;
}

static unsigned int dmu_note_sectors(struct bio *bio)
{
	return dmu_io(bio)->forced ?: bio_sectors(bio);
}

static struct hlist_head *dmu_note_bucket(struct dmu_device *dev, struct bio *bio)
{
	u64 key = (u64)(unsigned long)bio->bi_io_vec + dmu_note_sector(bio);

	return &dev->returned.found[hash_64(key, DMU_RETURNED_BITS)];
}

static struct dmu_note *dmu_note_find(struct dmu_device *dev, struct bio *bio)
{
	struct dmu_note *note;

	lockdep_assert_held(&dev->lock);
	hlist_for_each_entry(note, dmu_note_bucket(dev, bio), node)
		if (note->vecs == bio->bi_io_vec && note->sector == dmu_note_sector(bio) &&
		    note->op == (bio->bi_opf & REQ_OP_MASK) && !note->bio &&
		    (note->vecs || note->count == dmu_note_sectors(bio)))
			return note;
	return NULL;
}

/* A request comes to wait, or is forced, now or in the turn that it had before; under dev->lock. */
void dmu_returned_stamp(struct dmu_device *dev, struct bio *bio)
{
	lockdep_assert_held(&dev->lock);
	if (!dmu_io(bio)->arrival)
		dmu_io(bio)->arrival = ++dev->returned.arrivals;
}

/* Whether it has an order: it is within one block, or a discard of whole ones. */
static bool dmu_note_wanted(struct dmu_device *dev, struct bio *bio)
{
	u64 sector = dmu_note_sector(bio);
	unsigned int count = dmu_note_sectors(bio);

	if (!count)
		return false;
	if (bio_op(bio) != REQ_OP_READ && bio_op(bio) != REQ_OP_WRITE)
		return true;
	return dmu_block_of(dev, sector) == dmu_block_of(dev, sector + count - 1);
}

/* Notes a request that waited, or was forced, and is about to be given back. Any context. */
void dmu_returned_note(struct dmu_device *dev, struct bio *bio)
{
	struct dmu_note *note;
	unsigned long flags;

	if (!dmu_note_wanted(dev, bio))
		return;
	note = kmalloc(sizeof(*note), GFP_ATOMIC | __GFP_NOWARN);
	if (!note)
		return;
	note->vecs = bio->bi_io_vec;
	note->sector = dmu_note_sector(bio);
	note->count = dmu_note_sectors(bio);
	note->op = bio->bi_opf & REQ_OP_MASK;
	note->arrival = dmu_io(bio)->arrival;
	note->bio = NULL;
	INIT_LIST_HEAD(&note->turn);
	INIT_LIST_HEAD(&note->behind);
	spin_lock_irqsave(&dev->lock, flags);
	/* It may have come again while the core takes requests still, and goes back once more. */
	if (dev->requeue && !dmu_note_find(dev, bio)) {
		list_add_tail(&note->list, &dev->returned.notes);
		hlist_add_head(&note->node, dmu_note_bucket(dev, bio));
		note = NULL;
	}
	spin_unlock_irqrestore(&dev->lock, flags);
	kfree(note);
}

/* Gives a request that waited back to the core. */
void dmu_give_back(struct dmu_device *dev, struct bio *bio)
{
	/* Of a forced one dmu_end_io() sees to that. */
	if (!dmu_io(bio)->forced)
		dmu_returned_note(dev, bio);
	dmu_end_bio(bio, BLK_STS_DM_REQUEUE);
}

static bool dmu_note_meets(struct dmu_device *dev, const struct dmu_note *one,
			   const struct dmu_note *other)
{
	u64 first = dmu_block_of(dev, one->sector), at = dmu_block_of(dev, other->sector);

	return first <= dmu_block_of(dev, other->sector + other->count - 1) &&
	       at <= dmu_block_of(dev, one->sector + one->count - 1);
}

/* A request to some of its blocks that came before it and has not come again, if there is one. */
static struct dmu_note *dmu_note_before(struct dmu_device *dev, const struct dmu_note *note)
{
	struct dmu_note *at;

	list_for_each_entry(at, &dev->returned.notes, list) {
		if (at == note)
			return NULL;
		if (dmu_note_meets(dev, at, note))
			return at;
	}
	return NULL;
}

static void dmu_note_drop(struct dmu_note *note)
{
	list_del(&note->list);
	hlist_del(&note->node);
	kfree(note);
}

/* One has come again: adds it to ready, and whoever waited for it, or lets it wait. */
static void dmu_returned_turn(struct dmu_device *dev, struct dmu_note *note,
			      struct bio_list *ready)
{
	struct dmu_note *before;
	LIST_HEAD(turn);

	list_add(&note->turn, &turn);
	while (!list_empty(&turn)) {
		note = list_first_entry(&turn, struct dmu_note, turn);
		before = dmu_note_before(dev, note);
		if (before) {
			list_move_tail(&note->turn, &before->behind);
			continue;
		}
		dmu_io(note->bio)->arrival = note->arrival;
		bio_list_add(ready, note->bio);
		list_del(&note->turn);
		list_splice_tail(&note->behind, &turn);
		dmu_note_drop(note);
	}
}

/* Sends on, as if they had just come, what is within one block each, or whole discards. */
static void dmu_returned_send(struct dmu_device *dev, struct bio_list *ready)
{
	struct bio *bio;
	bool requeue;

	while ((bio = bio_list_pop(ready))) {
		while (!dmu_hold(dev, bio, &requeue)) {
			if (requeue) {
				dmu_give_back(dev, bio);
				break;
			}
			if (dmu_try_issue(dev, bio))
				break;
		}
	}
}

/*
 * A request that comes again: DM_MAPIO_SUBMITTED when it has been taken, to be sent in its turn,
 * DM_MAPIO_REQUEUE while the suspend lasts, -1 when it is none. The caller has found that there
 * are notes.
 */
int dmu_returned_again(struct dmu_device *dev, struct bio *bio)
{
	struct bio_list ready = BIO_EMPTY_LIST;
	int result = DM_MAPIO_SUBMITTED;
	struct dmu_note *note;
	unsigned long flags;
	unsigned int count;

	spin_lock_irqsave(&dev->lock, flags);
	note = dmu_note_find(dev, bio);
	if (!note) {
		result = -1;
	} else if (dmu_requeueing(dev)) {
		result = DM_MAPIO_REQUEUE;
	} else {
		count = note->count;
		if (count < bio_sectors(bio))
			dm_accept_partial_bio(bio, count);
		note->bio = bio;
		dev->returned.came = true;
		dmu_returned_turn(dev, note, &ready);
	}
	spin_unlock_irqrestore(&dev->lock, flags);
	dmu_returned_send(dev, &ready);
	return result;
}

/* Gives up all notes. Those that have come again are left in order. */
static void dmu_returned_clear(struct dmu_device *dev, struct bio_list *bios)
{
	struct dmu_note *note, *next;

	lockdep_assert_held(&dev->lock);
	list_for_each_entry_safe(note, next, &dev->returned.notes, list) {
		if (note->bio) {
			dmu_io(note->bio)->arrival = note->arrival;
			bio_list_add(bios, note->bio);
		}
		dmu_note_drop(note);
	}
}

void dmu_returned_drop(struct dmu_device *dev)
{
	struct bio_list bios = BIO_EMPTY_LIST;

	spin_lock_irq(&dev->lock);
	dmu_returned_clear(dev, &bios);
	spin_unlock_irq(&dev->lock);
	dmu_returned_send(dev, &bios);
}

/* Those that have come again and wait go back once more; their notes stay. */
void dmu_returned_collect(struct dmu_device *dev, struct bio_list *bios)
{
	struct dmu_note *note;

	lockdep_assert_held(&dev->lock);
	list_for_each_entry(note, &dev->returned.notes, list) {
		if (note->bio)
			bio_list_add(bios, note->bio);
		note->bio = NULL;
		INIT_LIST_HEAD(&note->turn);
		INIT_LIST_HEAD(&note->behind);
	}
}

static int dmu_note_compare(void *context, const struct list_head *a, const struct list_head *b)
{
	u64 one = list_entry(a, struct dmu_note, list)->arrival;
	u64 other = list_entry(b, struct dmu_note, list)->arrival;

	return one < other ? -1 : one > other;
}

/* They are about to come again. The caller holds dev->lock, and dev->requeue is down. */
void dmu_returned_expect(struct dmu_device *dev)
{
	lockdep_assert_held(&dev->lock);
	if (list_empty(&dev->returned.notes))
		return;
	dmu_list_sort(&dev->returned.notes, dmu_note_compare);
	dev->returned.came = false;
	mod_delayed_work(dev->wq, &dev->returned.work, DMU_PATIENCE);
}

/* Gives up on those that do not come. */
void dmu_returned_work(struct work_struct *work)
{
	struct dmu_returned *returned = container_of(to_delayed_work(work), struct dmu_returned,
						     work);
	struct dmu_device *dev = container_of(returned, struct dmu_device, returned);
	bool stale;

	spin_lock_irq(&dev->lock);
	stale = !returned->came && !dev->requeue;
	returned->came = false;
	if (!stale && !dev->requeue && !list_empty(&returned->notes))
		queue_delayed_work(dev->wq, &returned->work, DMU_PATIENCE);
	spin_unlock_irq(&dev->lock);
	if (stale)
		dmu_returned_drop(dev);
}

/*
 * Writes that have failed on their devices, and wait for what the worker makes of that.
 *
 * A full file system under a loop device, or a thin pool that has run out, need not be an error
 * for who writes: somebody may make room. So, when the worker has said HOLD_FAILED, a write that
 * fails does not end. It goes to dev->failed.bios, as it was before it was sent, and the worker
 * is told (WRITES_FAILED). There is one such question at a time, for all of them. Its answer,
 * FAIL or RETRY, is for those that are there when it comes; what fails later raises another.
 *
 * They hold nothing meanwhile: other requests to the same blocks go on. A write that is tried
 * again counts as having come then.
 *
 * A discard is not held: part of it may be done, and a later write may have followed that.
 */

static u64 dmu_wide(struct dmu_device *dev, struct bio *bio)
{
	return dmu_block_of(dev, bio_end_sector(bio) - 1) -
	       dmu_block_of(dev, bio->bi_iter.bi_sector) + 1;
}

/* Whether there are such writes, which count on what is mapped. The caller holds dev->lock. */
bool dmu_failed_waits(struct dmu_device *dev)
{
	struct dmu_failed *failed = &dev->failed;

	lockdep_assert_held(&dev->lock);
	return failed->sending || !bio_list_empty(&failed->bios) ||
	       !bio_list_empty(&failed->again);
}

/* Notes what of a write is about to be sent: its end may have moved on. */
void dmu_failed_note(struct bio *bio)
{
	dmu_io(bio)->iter = bio->bi_iter;
}

/*
 * Takes a write that has failed, if it is to wait. False: it has to end with *status, which a suspend
 * that gives back what waits has changed to that. Any context.
 */
bool dmu_failed_hold(struct dmu_device *dev, struct bio *bio, blk_status_t *status)
{
	struct dmu_failed *failed = &dev->failed;
	unsigned long flags;
	bool held;

	if (bio_op(bio) != REQ_OP_WRITE)
		return false;
	spin_lock_irqsave(&dev->lock, flags);
	held = failed->hold && !dev->failing;
	if (held && dmu_requeueing(dev)) {
		held = false;
		*status = BLK_STS_DM_REQUEUE;
	}
	if (held) {
		bio->bi_status = BLK_STS_OK;
		bio->bi_iter = dmu_io(bio)->iter;
		if (dmu_io(bio)->forced)
			dmu_forced_end(dev, bio);
		dmu_io(bio)->arrival = 0;
		dmu_io(bio)->asked = 0;
		bio_list_add(&failed->bios, bio);
		failed->error = -blk_status_to_errno(*status);
		if (failed->state == DMU_FAILED_IDLE) {
			failed->id = dev->next_id++;
			failed->state = DMU_FAILED_ASKING;
			wake_up(&dev->wait);
		}
	}
	spin_unlock_irqrestore(&dev->lock, flags);
	return held;
}

/* Takes away all that wait; what the worker knows of the question is void. */
void dmu_failed_collect(struct dmu_device *dev, struct bio_list *bios)
{
	struct dmu_failed *failed = &dev->failed;

	lockdep_assert_held(&dev->lock);
	bio_list_merge(bios, &failed->bios);
	bio_list_init(&failed->bios);
	bio_list_merge(bios, &failed->again);
	bio_list_init(&failed->again);
	failed->state = DMU_FAILED_IDLE;
}

/* FAIL (error) or RETRY (0): -ENOENT when there is no such question. */
int dmu_failed_answer(struct dmu_device *dev, u64 id, int error)
{
	struct dmu_failed *failed = &dev->failed;
	struct bio_list bios = BIO_EMPTY_LIST;
	struct bio *bio;

	spin_lock_irq(&dev->lock);
	if (failed->state != DMU_FAILED_ASKED || failed->id != id) {
		spin_unlock_irq(&dev->lock);
		return -ENOENT;
	}
	failed->state = DMU_FAILED_IDLE;
	bio_list_merge(error ? &bios : &failed->again, &failed->bios);
	bio_list_init(&failed->bios);
	spin_unlock_irq(&dev->lock);
	while ((bio = bio_list_pop(&bios)))
		dmu_end_bio(bio, errno_to_blk_status(error));
	if (!error)
		mod_delayed_work(dev->wq, &failed->work, 0);
	return 0;
}

/*
 * The place of a write to several blocks, 0 when they are not mapped as one. *missing is the first
 * one of them that is mapped nowhere, which was forgotten while the write was under way, if that is
 * all; or U64_MAX.
 */
static unsigned long dmu_failed_place(struct dmu_device *dev, u64 block, u64 count, u64 *missing)
{
	unsigned long word, next = 0;
	u64 run, more;

	rcu_read_lock();
	word = dmu_find(dev, block, count, &run);
	if (word && run < count)
		next = dmu_find(dev, block + run, 1, &more);
	rcu_read_unlock();
	*missing = U64_MAX;
	if (word && !dmu_word_writable(word))
		return 0;
	if (word && run >= count)
		return word;
	if (!next)
		*missing = word ? block + run : block;
	return 0;
}

/*
 * Sends a write to several blocks, if they are still mapped as one and nobody waits for any of
 * them. Of what is mapped nowhere the worker is asked, once: what it says is not forgotten as long
 * as the write waits. False: not now.
 */
static bool dmu_failed_wide(struct dmu_device *dev, struct bio *bio, u64 count)
{
	u64 block = dmu_block_of(dev, bio->bi_iter.bi_sector), missing;
	struct dmu_epoch *epoch = dmu_epoch_enter(dev);
	unsigned long word = dmu_failed_place(dev, block, count, &missing);

	smp_rmb();	/* see dmu-core.h: the index before the cells */
	if ((atomic_read(&dev->busy) && dmu_free_run(dev, block, count) < count) ||
	    dmu_forced_may_meet(dev, bio)) {
		dmu_epoch_leave(epoch);
		return false;
	}
	if (word) {
		dmu_issue(dev, bio, word, epoch);
		return true;
	}
	dmu_epoch_leave(epoch);
	if (missing == U64_MAX || dmu_io(bio)->asked == missing + 1) {
		dmu_end_bio(bio, BLK_STS_IOERR);
		return true;
	}
	if (dmu_ask_unasked(dev, missing))
		dmu_io(bio)->asked = missing + 1;
	return false;
}

/* Whether all the blocks are where word says. */
static bool dmu_failed_mapped(struct dmu_device *dev, u64 block, u64 count, unsigned long word)
{
	u64 run = 0;

	rcu_read_lock();
	for (; count; block += run, count -= run) {
		if (dmu_find(dev, block, count, &run) != word)
			break;
		run = min(run, count);
	}
	rcu_read_unlock();
	return !count;
}

/*
 * Sends a write to several blocks of a layer, as a touch where not all are present. False: not now,
 * or not as long as nothing is granted.
 */
static bool dmu_failed_layered(struct dmu_device *dev, struct bio *bio, struct dmu_layer *layer,
			       u64 count)
{
	u64 block = dmu_block_of(dev, bio->bi_iter.bi_sector);
	struct dmu_epoch *epoch = dmu_epoch_enter(dev);
	bool send = dmu_failed_mapped(dev, block, count, layer->word);

	smp_rmb();	/* see dmu-core.h: the index before the cells */
	if ((atomic_read(&dev->busy) && dmu_free_run(dev, block, count) < count) ||
	    dmu_forced_may_meet(dev, bio)) {
		dmu_epoch_leave(epoch);
		return false;
	}
	if (!send) {
		rcu_read_lock();
		send = dmu_touch_run(dev, bio, block, count) >= count;
		rcu_read_unlock();
		send = send && dmu_touch_begin(dev, bio, bio_sectors(bio));
	}
	if (send)
		dmu_issue(dev, bio, layer->word, epoch);
	else
		dmu_epoch_leave(epoch);
	return send;
}

/* Sends a write as if it had just come. False: not now. */
static bool dmu_failed_send(struct dmu_device *dev, struct bio *bio)
{
	struct dmu_layer *layer = dmu_layer_of(dev, dmu_block_of(dev, bio->bi_iter.bi_sector));
	u64 count = dmu_wide(dev, bio);
	bool requeue;

	if (count > 1 && layer)
		return dmu_failed_layered(dev, bio, layer, count);
	if (count > 1)
		return dmu_failed_wide(dev, bio, count);
	for (;;) {
		if (dmu_hold(dev, bio, &requeue))
			return true;
		if (requeue) {
			dmu_give_back(dev, bio);
			return true;
		}
		if (dmu_try_issue(dev, bio))
			return true;
	}
}

void dmu_failed_work(struct work_struct *work)
{
	struct dmu_failed *failed = container_of(to_delayed_work(work), struct dmu_failed, work);
	struct dmu_device *dev = container_of(failed, struct dmu_device, failed);
	struct bio_list bios, later = BIO_EMPTY_LIST;
	struct bio *bio;
	bool requeue;

	spin_lock_irq(&dev->lock);
	bios = failed->again;
	bio_list_init(&failed->again);
	failed->sending = true;
	spin_unlock_irq(&dev->lock);
	while ((bio = bio_list_pop(&bios)))
		if (!dmu_failed_send(dev, bio))
			bio_list_add(&later, bio);
	spin_lock_irq(&dev->lock);
	failed->sending = false;
	/* A suspend or the administrator may have come for them meanwhile. */
	requeue = dmu_requeueing(dev);
	if (!requeue && !dev->failing && !bio_list_empty(&later)) {
		bio_list_merge_head(&failed->again, &later);
		bio_list_init(&later);
		mod_delayed_work(dev->wq, &failed->work, HZ / 100);
	}
	spin_unlock_irq(&dev->lock);
	while ((bio = bio_list_pop(&later))) {
		if (requeue)
			dmu_give_back(dev, bio);
		else
			dmu_end_bio(bio, BLK_STS_IOERR);
	}
}

/* The path of a request. */

/* A bio that needs more than the index: true when it is held, else as dmu_hold() says. */
static int dmu_map_held(struct dmu_device *dev, struct bio *bio)
{
	bool requeue;

	dmu_io(bio)->arrival = 0;
	dmu_stop(DMU_STOP_HOLDING);
	if (dmu_hold(dev, bio, &requeue))
		return DM_MAPIO_SUBMITTED;
	if (!requeue)
		return -1;
	dmu_returned_note(dev, bio);
	dmu_stop(DMU_STOP_RETURNING);
	return DM_MAPIO_REQUEUE;
}

static int dmu_map_flush(struct dmu_table *table, struct bio *bio)
{
	struct dmu_device *dev = table->dev;
	unsigned int i;

	if (dmu_requeueing(dev))
		return DM_MAPIO_REQUEUE;
	if (dmu_has_uncommitted(dev) || table->writable != 1 ||
	    READ_ONCE(dev->flush.failed)) {
		dmu_flush_join(dev, bio);
		return DM_MAPIO_SUBMITTED;
	}
	for (i = 0; !table->devs[i].writable; i++)
		;
	dmu_io(bio)->passed = true;
	bio_set_dev(bio, table->devs[i].dm_dev->bdev);
	return DM_MAPIO_REMAPPED;
}

/* Whole blocks are a run for the worker; a rest is ignored, or zeroed as a write is. */
static int dmu_map_discard(struct dmu_device *dev, struct bio *bio)
{
	unsigned int mask = dev->block_sectors - 1, count = bio_sectors(bio);
	u64 sector = bio->bi_iter.bi_sector, end = sector + count;
	unsigned int offset = sector & mask;
	int result;

	if (offset || (count < dev->block_sectors && end != dev->sectors)) {
		count = min(count, dev->block_sectors - offset);
		/* The core puts back a bio that was split behind those that were not. */
		if (count < bio_sectors(bio))
			dm_accept_partial_bio(bio, count);
		if (bio_op(bio) == REQ_OP_DISCARD) {
			bio_endio(bio);
			return DM_MAPIO_SUBMITTED;
		}
	} else if (end & mask && end != dev->sectors) {
		dm_accept_partial_bio(bio, count & ~mask);
	}
	for (;;) {
		result = dmu_map_held(dev, bio);
		if (result >= 0)
			return result;
		if (dmu_try_issue(dev, bio))
			return DM_MAPIO_SUBMITTED;
	}
}

/* Whether the write goes to more blocks, as a touch, than the word that was found serves. */
static bool dmu_lookup_touch(struct dmu_device *dev, struct bio *bio, u64 block,
			     unsigned int blocks, unsigned long *word, u64 *run)
{
	unsigned int most;

	/* All of it is there, as it mostly is. */
	if (dmu_word_writable(*word) && *run >= blocks)
		return false;
	most = dmu_touch_run(dev, bio, block, blocks);
	if (!most || (dmu_word_writable(*word) && *run >= most))
		return false;
	*word = dev->layer->word;
	*run = most;
	return true;
}

/*
 * The fast path: how many sectors of the bio go where word says, 0 when it has to wait. With touch
 * they go there as a touch. The caller has entered the epoch and holds the RCU read lock.
 */
static unsigned int dmu_lookup(struct dmu_table *table, struct bio *bio, unsigned long *word,
			       bool *touch)
{
	struct dmu_device *dev = table->dev;
	unsigned int count, blocks, free, removals;
	u64 sector, block, run, size;

again:
	removals = smp_load_acquire(&dev->removals);	/* before the index */
	sector = bio->bi_iter.bi_sector;
	block = dmu_block_of(dev, sector);
	count = bio_sectors(bio);
	blocks = dmu_block_of(dev, sector + count - 1) - block + 1;
	*word = dmu_find(dev, block, blocks, &run);
	*touch = false;
	if (unlikely(READ_ONCE(dev->layer))) {
		if (op_is_write(bio_op(bio)))
			*touch = dmu_lookup_touch(dev, bio, block, blocks, word, &run);
		else if (!dmu_word_writable(*word) &&
			 dmu_touch_meets(dev, block, min_t(u64, run, blocks)))
			return 0;
	}
	if (!*word || (op_is_write(bio_op(bio)) && !dmu_word_writable(*word)))
		return 0;
	count = min_t(u64, count, ((block + run) << dev->block_shift) - sector);
	if (dmu_word_device(*word) != DMU_WORD_ZERO) {
		size = dmu_bdev_sectors(table->devs[dmu_word_device(*word)].dm_dev->bdev);
		sector += dmu_word_shift(*word);
		if (unlikely(sector + count > size)) {
			if (*touch)
				return 0;
			if (sector < size)
				count = size - sector;
			else
				*word = dmu_word(DMU_WORD_ZERO, false, 0);
		}
	}
	dmu_stop(DMU_STOP_LOOKED);
	smp_rmb();	/* see dmu-core.h: the index before the cells */
	if (unlikely(atomic_read(&dev->busy))) {
		blocks = dmu_block_of(dev, bio->bi_iter.bi_sector + count - 1) - block + 1;
		free = blocks;
		if (dmu_may_wait(dev, block, blocks))
			free = dmu_free_run(dev, block, blocks);
		if (!free)
			return 0;
		if (free < blocks)
			count = ((block + free) << dev->block_shift) - bio->bi_iter.bi_sector;
	}
	if (unlikely(atomic_read(&dev->forcing)) && dmu_forced_may_meet(dev, bio))
		return 0;
	smp_rmb();	/* see dmu-core.h: the cells before the removals */
	if (unlikely(READ_ONCE(dev->removals) != removals))
		goto again;
	return count;
}

static int dmu_remap(struct dmu_table *table, struct bio *bio, unsigned long word,
		     struct dmu_epoch *epoch, bool force)
{
	struct dmu_io *io = dmu_io(bio);

	io->epoch = epoch;
	if (dmu_word_device(word) == DMU_WORD_ZERO) {
		/* A write comes here when its device has become smaller than its place. */
		if (op_is_write(bio_op(bio)))
			bio->bi_status = BLK_STS_IOERR;
		else
			zero_fill_bio(bio);
		bio_endio(bio);
		return DM_MAPIO_SUBMITTED;
	}
	if (force) {
		io->arrival = 0;
		dmu_force(table->dev, bio);
	}
	dmu_failed_note(bio);
	bio_set_dev(bio, table->devs[dmu_word_device(word)].dm_dev->bdev);
	bio->bi_iter.bi_sector += dmu_word_shift(word);
	return DM_MAPIO_REMAPPED;
}

/*
 * The sectors from the bio's first to the end of what may wait as one: a block, or of a larger
 * one as much as the bytes of one answer serve.
 */
static unsigned int dmu_unit_rest(struct dmu_device *dev, struct bio *bio)
{
	unsigned int unit = dev->block_sectors;

	if (bio_op(bio) == REQ_OP_READ)
		unit = min_t(unsigned int, unit, DMU_MAX_DATA >> SECTOR_SHIFT);
	return unit - (bio->bi_iter.bi_sector & (unit - 1));
}

int dmu_map(struct dm_target *ti, struct bio *bio)
{
	struct dmu_table *table = ti->private;
	struct dmu_device *dev = table->dev;
	struct dmu_io *io = dmu_io(bio);
	struct dmu_epoch *epoch;
	unsigned int count, rest;
	unsigned long word;
	bool force, touch;
	int result;

	io->dev = dev;
	io->epoch = NULL;
	io->touched = NULL;
	io->forced = 0;
	io->written = false;
	io->passed = false;
	if (bio->bi_opf & REQ_PREFLUSH)
		return dmu_map_flush(table, bio);
	bio->bi_iter.bi_sector = dm_target_offset(ti, bio->bi_iter.bi_sector);
	if (unlikely(!list_empty(&dev->returned.notes))) {
		result = dmu_returned_again(dev, bio);
		if (result >= 0)
			return result;
	}
	switch (bio_op(bio)) {
	case REQ_OP_READ:
	case REQ_OP_WRITE:
		break;
	case REQ_OP_DISCARD:
	case REQ_OP_WRITE_ZEROES:
		return dmu_map_discard(dev, bio);
	default:
		return DM_MAPIO_KILL;
	}
	for (;;) {
		rcu_read_lock();
		epoch = dmu_epoch_enter_rcu(dev);
		count = dmu_lookup(table, bio, &word, &touch);
		rcu_read_unlock();
		if (likely(count) && likely(!dmu_requeueing(dev))) {
			force = unlikely(bio->bi_opf & REQ_FUA) &&
				(touch || dmu_has_uncommitted(dev) ||
				 READ_ONCE(dev->flush.failed));
			if (force)
				count = min(count, dmu_unit_rest(dev, bio));
			if (touch)
				dmu_stop(DMU_STOP_TOUCHING);
			if (!touch || dmu_touch_begin(dev, bio, count)) {
				if (count < bio_sectors(bio))
					dm_accept_partial_bio(bio, count);
				return dmu_remap(table, bio, word, epoch, force);
			}
			/* A cell has come, or no memory is there. */
			count = 0;
		}
		dmu_epoch_leave(epoch);
		rest = dmu_unit_rest(dev, bio);
		if (rest < bio_sectors(bio)) {
			/* Served, but for a suspend: it has no order, and need not be cut. */
			if (count)
				return DM_MAPIO_REQUEUE;
			dm_accept_partial_bio(bio, rest);
		}
		result = dmu_map_held(dev, bio);
		if (result >= 0)
			return result;
	}
}

/*
 * A backing device has failed under a request that was sent to it: whoever counts is told, and a
 * write may wait. True when it does. That a device had no place for a request that must not wait
 * is no failure of it.
 */
static bool dmu_io_failed(struct dmu_device *dev, struct bio *bio, blk_status_t *status)
{
	if (*status == BLK_STS_DM_REQUEUE || *status == BLK_STS_AGAIN)
		return false;
	dmu_device_error(dev, bio, op_is_write(bio_op(bio)), -blk_status_to_errno(*status));
	return dmu_failed_hold(dev, bio, status);
}

int dmu_end_io(struct dm_target *ti, struct bio *bio, blk_status_t *error)
{
	struct dmu_io *io = dmu_io(bio);
	bool issued = io->epoch;
	unsigned long flags;

	if (unlikely(io->touched))
		dmu_touch_end(io->dev, bio, !*error);
	if (issued) {
		dmu_epoch_leave(io->epoch);
		io->epoch = NULL;
	}
	if (unlikely(*error)) {
		if (io->passed && *error != BLK_STS_DM_REQUEUE)
			dmu_flush_failed(io->dev, blk_status_to_errno(*error));
		else if (issued && dmu_io_failed(io->dev, bio, error))
			return DM_ENDIO_INCOMPLETE;
		else if (io->written && *error == BLK_STS_DM_REQUEUE)
			dmu_returned_note(io->dev, bio);
	} else if (unlikely(io->forced && !io->written)) {
		io->written = true;
		dmu_flush_join(io->dev, bio);
		return DM_ENDIO_INCOMPLETE;
	}
	if (unlikely(io->forced)) {
		spin_lock_irqsave(&io->dev->lock, flags);
		dmu_forced_end(io->dev, bio);
		spin_unlock_irqrestore(&io->dev->lock, flags);
	}
	return DM_ENDIO_DONE;
}
