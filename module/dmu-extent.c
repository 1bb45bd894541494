// SPDX-License-Identifier: GPL-2.0-only
/*
 * The remembered mapping: runs of blocks to words.
 *
 * A word is what a run's blocks have in common: bit 0 set (it marks a word in the index), bit
 * 1 the right to write, bits 2 to 5 the backing device (15: zeroes), the rest the distance
 * from a sector of the device to its place, signed. Two runs that continue each other
 * have the same word, so they are one extent, and splitting costs nothing.
 *
 * They are kept in dmu-index.c. Changes are made under map_mutex.
 */
#include <linux/sched.h>
#include "dmu-core.h"

unsigned long dmu_word(unsigned int device, bool writable, s64 shift)
{
	return ((unsigned long)shift << 6) | (device << 2) | (writable ? 2 : 0) | 1;
}

/* The word of a block and how many from it on share a slot: for walking over many. */
static unsigned long dmu_extent_step(struct dmu_device *dev, u64 block, u64 *run)
{
	unsigned long word;

	rcu_read_lock();
	word = dmu_index_lookup(dev, block, 1, run);
	rcu_read_unlock();
	if (!(block & 1023))
		cond_resched();
	return word;
}

/*
 * How many extents begin from the block on, up to and with the last one. Sets before to the word of
 * the block in front of it, after to that of the last. What they share is looked up once.
 */
static u64 dmu_extent_begins(struct dmu_device *dev, u64 block, u64 last, unsigned long *before,
			     unsigned long *after)
{
	u64 at = block ? block - 1 : 0, count = 0, run;
	unsigned int steps = 0;
	unsigned long word = 0;

	rcu_read_lock();
	*before = 0;
	for (; at <= last; at += run) {
		*after = dmu_index_lookup(dev, at, min_t(u64, last - at + 1, 1 << 20), &run);
		if (at < block)
			*before = *after;
		else if (*after && *after != word)
			count++;
		word = *after;
		if (unlikely(!(++steps % 1024))) {
			rcu_read_unlock();
			cond_resched();
			rcu_read_lock();
		}
	}
	rcu_read_unlock();
	return count;
}

/* Maps a run, for which dmu_index_ready() has been called. */
void dmu_extent_store(struct dmu_device *dev, u64 block, u64 count, unsigned long word)
{
	u64 end = block + count, last = min(end, dev->blocks - 1), extents;
	unsigned long before, after = 0;

	extents = dev->extents - dmu_extent_begins(dev, block, last, &before, &after);
	dmu_index_set(dev, block, count, word);
	/* What begins with the run, which is alike, and what begins behind it. */
	if (word && word != before)
		extents++;
	if (last == end && after && after != word)
		extents++;
	WRITE_ONCE(dev->extents, extents);
}

/* Forgets a run; -ENOMEM, and nothing has changed. */
int dmu_extent_erase(struct dmu_device *dev, u64 block, u64 count)
{
	int error = dmu_index_ready(dev, block, count, 0, GFP_NOIO);

	if (!error)
		dmu_extent_store(dev, block, count, 0);
	return error;
}

/*
 * Whether mapping the run to word would move blocks under requests that may be writing
 * there: what is mapped writable keeps its place and its right until it is invalidated.
 */
bool dmu_extent_conflict(struct dmu_device *dev, u64 block, u64 count, unsigned long word)
{
	u64 end = block + count, run;
	unsigned long is;

	lockdep_assert_held(&dev->map_mutex);
	for (; block < end; block += run) {
		is = dmu_extent_step(dev, block, &run);
		if (dmu_word_writable(is) && is != word)
			return true;
	}
	return false;
}
