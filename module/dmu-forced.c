// SPDX-License-Identifier: GPL-2.0-only
/*
 * Forced writes (FUA) over a suspend without flush.
 *
 * With something uncommitted a forced write is a write, then a commit. A suspend that comes
 * between the two gives the request back, and the core brings it again after the resume. Its data
 * has been in its place since, where a later write may have changed it: all that is left to do
 * is the commit. So what was written is noted when it is given back.
 *
 * A request that waits in the core keeps its array of bio_vecs, which is nobody else's until it
 * ends: the array and the sectors say which request it is. No note may outlive its request,
 * or it could be taken for a later one's:
 *
 * - notes are made while dev->requeue stands. A suspend that is interrupted, after which the core
 *   may fail what was given back, takes it down together with all notes;
 * - after a whole suspend each request that was given back comes to dmu_map(), since a table that
 *   follows is not shorter, or the device goes; a table that has the target elsewhere takes
 *   all notes away, too.
 *
 * Without a note, should there be no memory for it, the request is written again.
 */
#include <linux/slab.h>
#include "dmu-core.h"

/* So many sectors from the sector on were written by the request with these vecs. */
struct dmu_forced {
	struct list_head list;
	const struct bio_vec *vecs;
	u64 sector;
	unsigned int count;
};

/* A commit has to follow the write, whose sector counts from the beginning of the target. */
void dmu_force(struct bio *bio)
{
	struct dmu_io *io = dmu_io(bio);

	bio->bi_opf &= ~REQ_FUA;
	io->forced = bio_sectors(bio);
	io->sector = bio->bi_iter.bi_sector;
}

/* The bio, which was written, goes back to the core. Any context. */
void dmu_forced_note(struct dmu_device *dev, struct bio *bio)
{
	struct dmu_io *io = dmu_io(bio);
	struct dmu_forced *note;
	unsigned long flags;

	/* Zeroes have no vecs; nobody in the kernel forces them. */
	if (bio_op(bio) != REQ_OP_WRITE)
		return;
	note = kmalloc(sizeof(*note), GFP_ATOMIC | __GFP_NOWARN);
	if (!note)
		return;
	note->vecs = bio->bi_io_vec;
	note->sector = io->sector;
	note->count = io->forced;
	spin_lock_irqsave(&dev->lock, flags);
	if (dev->requeue) {
		list_add_tail(&note->list, &dev->forced);
		note = NULL;
	}
	spin_unlock_irqrestore(&dev->lock, flags);
	kfree(note);
}

/* How many sectors of the bio, from its first on, are alike; *written says in what. */
static unsigned int dmu_forced_run(struct dmu_device *dev, struct bio *bio, bool *written)
{
	u64 first = bio->bi_iter.bi_sector, end = bio_end_sector(bio);
	struct dmu_forced *note;

	lockdep_assert_held(&dev->lock);
	*written = false;
	list_for_each_entry(note, &dev->forced, list) {
		u64 after = note->sector + note->count;

		if (note->vecs != bio->bi_io_vec || first >= after || end <= note->sector)
			continue;
		if (first < note->sector) {
			end = note->sector;
			continue;
		}
		*written = true;
		end = min(end, after);
		/* The core cuts from the front: no sector before these is still to come. */
		note->count = after - end;
		note->sector = end;
		if (!note->count) {
			list_del(&note->list);
			kfree(note);
		}
		break;
	}
	return end - first;
}

/*
 * Takes a forced write that was written before a suspend, or cuts it where that begins or ends.
 * False: what is left of the bio has to be written.
 */
bool dmu_forced_again(struct dmu_device *dev, struct bio *bio)
{
	unsigned int count;
	unsigned long flags;
	bool written;

	spin_lock_irqsave(&dev->lock, flags);
	count = dmu_forced_run(dev, bio, &written);
	spin_unlock_irqrestore(&dev->lock, flags);
	if (count < bio_sectors(bio))
		dm_accept_partial_bio(bio, count);
	if (!written)
		return false;
	dmu_force(bio);
	dmu_io(bio)->written = true;
	dmu_flush_join(dev, bio);
	return true;
}

void dmu_forced_drop(struct dmu_device *dev)
{
	struct dmu_forced *note, *next;

	lockdep_assert_held(&dev->lock);
	list_for_each_entry_safe(note, next, &dev->forced, list) {
		list_del(&note->list);
		kfree(note);
	}
}
