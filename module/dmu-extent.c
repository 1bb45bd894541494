// SPDX-License-Identifier: GPL-2.0-only
/*
 * The remembered mapping: runs of blocks to words.
 *
 * A word is what a run's blocks have in common: bit 0 set (it marks a value of the maple
 * tree), bit 1 the right to write, bits 2 to 5 the backing device (15: zeroes), the rest
 * the distance from a sector of the device to its place, signed. Two runs that continue
 * each other have the same word, so merging is a comparison and splitting costs nothing.
 *
 * Readers walk under RCU. Changes are made under map_mutex. Requests read the index of
 * dmu-index.c, which is told every change, and come here when it cannot say.
 */
#include <linux/rcupdate_wait.h>
#include <linux/sched/mm.h>
#include "dmu-core.h"

unsigned long dmu_word(unsigned int device, bool writable, s64 shift)
{
	return ((unsigned long)shift << 6) | (device << 2) | (writable ? 2 : 0) | 1;
}

/*
 * The word of a block, 0 without one. Sets last to the last block of the run that shares
 * it; a gap is a run too. The caller holds the RCU read lock or map_mutex.
 */
unsigned long dmu_extent_find(struct dmu_device *dev, u64 block, u64 *last)
{
	MA_STATE(mas, &dev->extents, block, block);
	void *entry;

	rcu_read_lock();
	entry = mas_walk(&mas);
	if (last)
		*last = entry ? mas.last : block;
	rcu_read_unlock();
	return (unsigned long)entry;
}

static int dmu_extent_put(struct dmu_device *dev, u64 first, u64 last, void *entry)
{
	unsigned int noio = memalloc_noio_save();
	int error;

	might_sleep();
	error = mtree_store_range(&dev->extents, first, last, entry, GFP_NOIO | __GFP_NOWARN);
	memalloc_noio_restore(noio);
	return error;
}

/* Changes tree and index. */
static int dmu_extent_change(struct dmu_device *dev, u64 block, u64 count, u64 first, u64 last,
			     unsigned long word)
{
	int error = dmu_extent_put(dev, first, last, (void *)word);

	if (!error)
		dmu_index_set(dev, block, block + count - 1, word);
	return error;
}

/* Maps a run, taking in the neighbours that it continues. */
int dmu_extent_store(struct dmu_device *dev, u64 block, u64 count, unsigned long word)
{
	u64 first = block, last = block + count - 1;

	lockdep_assert_held(&dev->map_mutex);
	if (block) {
		MA_STATE(mas, &dev->extents, block - 1, block - 1);

		rcu_read_lock();
		if ((unsigned long)mas_walk(&mas) == word)
			first = mas.index;
		rcu_read_unlock();
	}
	if (last + 1 < dev->blocks) {
		MA_STATE(mas, &dev->extents, last + 1, last + 1);

		rcu_read_lock();
		if ((unsigned long)mas_walk(&mas) == word)
			last = mas.last;
		rcu_read_unlock();
	}
	return dmu_extent_change(dev, block, count, first, last, word);
}

int dmu_extent_erase(struct dmu_device *dev, u64 block, u64 count)
{
	lockdep_assert_held(&dev->map_mutex);
	return dmu_extent_change(dev, block, count, block, block + count - 1, 0);
}

/*
 * Whether mapping the run to word would move blocks under requests that may be writing
 * there: what is mapped writable keeps its place and its right until it is invalidated.
 */
bool dmu_extent_conflict(struct dmu_device *dev, u64 block, u64 count, unsigned long word)
{
	MA_STATE(mas, &dev->extents, block, block);
	bool conflict = false;
	void *entry;

	lockdep_assert_held(&dev->map_mutex);
	rcu_read_lock();
	mas_for_each(&mas, entry, block + count - 1) {
		if (dmu_word_writable((unsigned long)entry) && (unsigned long)entry != word) {
			conflict = true;
			break;
		}
	}
	rcu_read_unlock();
	return conflict;
}

u64 dmu_extent_count(struct dmu_device *dev)
{
	MA_STATE(mas, &dev->extents, 0, 0);
	u64 count = 0;
	void *entry;

	rcu_read_lock();
	mas_for_each(&mas, entry, ULONG_MAX) {
		if (!(++count & 1023)) {
			mas_pause(&mas);
			cond_resched_rcu();
		}
	}
	rcu_read_unlock();
	return count;
}
