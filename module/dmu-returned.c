// SPDX-License-Identifier: GPL-2.0-only
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
 * Only order depends on a note. Whoever is taken for another one waits for others in vain at most,
 * and so does whoever waits for one that does not come, because the core has failed it: when no
 * note has gone for a while, all go. Without memory for a note its request has no order.
 */
#include <linux/hash.h>
#include <linux/list_sort.h>
#include <linux/slab.h>
#include "dmu-core.h"

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
