// SPDX-License-Identifier: GPL-2.0-only
/*
 * The mapping once more, for looking up: from a block to its word in three steps at most,
 * whether there is one extent or a million.
 *
 * Like a page table: a root, pages of 512 slots, leaves of 512 slots. A slot is 0 where
 * nothing is mapped, a word (bit 0 set) that all blocks under it share, or a page that tells
 * them apart. A disk of few extents has no pages; the most that it can cost is a long for
 * each block.
 *
 * The tree of dmu-extent.c is the truth and this follows it, under map_mutex, after the tree
 * has taken a change. Where there is no memory for a page, or the root does not reach, a
 * lookup asks the tree. Pages stay until the device goes, so readers hold none of them; the
 * root is replaced when a table makes the device longer, and is read under RCU.
 */
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include "dmu-core.h"

#define DMU_INDEX_BITS	9
#define DMU_INDEX_SLOTS	(1UL << DMU_INDEX_BITS)
#define DMU_INDEX_TOP	(2 * DMU_INDEX_BITS)	/* blocks under a slot of the root, as a shift */
#define DMU_INDEX_ASK	2UL			/* a slot that does not know: ask the tree */
#define DMU_INDEX_MOST	(1UL << 20)		/* slots of the root */

struct dmu_index {
	unsigned long slots;
	unsigned long slot[];
};

static bool dmu_index_is_page(unsigned long slot)
{
	return slot > DMU_INDEX_ASK && !(slot & 1);
}

/*
 * The word of a block, 0 without one, DMU_INDEX_ASK where the tree has to be asked. Sets run
 * to how many blocks from this one on share it: no more than do, and want if so many do and
 * stand in one slot or leaf.
 */
static unsigned long dmu_index_find(struct dmu_index *index, u64 block, u64 want, u64 *run)
{
	unsigned int shift = DMU_INDEX_TOP;
	unsigned long *slot = &index->slot[block >> DMU_INDEX_TOP];
	unsigned long word = READ_ONCE(*slot), limit;

	while (shift && dmu_index_is_page(word)) {
		shift -= DMU_INDEX_BITS;
		slot = (unsigned long *)word + ((block >> shift) & (DMU_INDEX_SLOTS - 1));
		word = READ_ONCE(*slot);
	}
	*run = (1UL << shift) - (block & ((1UL << shift) - 1));
	if (shift || want == 1)
		return word;
	limit = min_t(u64, want, DMU_INDEX_SLOTS - (block & (DMU_INDEX_SLOTS - 1)));
	while (*run < limit && READ_ONCE(slot[*run]) == word)
		++*run;
	return word;
}

/* As dmu_index_find(), over as many leaves as want takes. */
static unsigned long dmu_index_run(struct dmu_index *index, u64 block, u64 want, u64 *run)
{
	u64 end = (u64)index->slots << DMU_INDEX_TOP, more;
	unsigned long word;

	if (unlikely(block >= end))
		return DMU_INDEX_ASK;
	word = dmu_index_find(index, block, want, run);
	while (unlikely(*run < want) && word > DMU_INDEX_ASK && block + *run < end) {
		if (dmu_index_find(index, block + *run, want - *run, &more) != word)
			break;
		*run += more;
	}
	return word;
}

/*
 * The word of a block, 0 without one. Sets run to how many blocks from it on share the word,
 * as far as want asks. The caller holds the RCU read lock.
 */
unsigned long dmu_index_lookup(struct dmu_device *dev, u64 block, u64 want, u64 *run)
{
	unsigned long word = dmu_index_run(rcu_dereference(dev->index), block, want, run);
	u64 last;

	if (likely(word != DMU_INDEX_ASK))
		return word;
	word = dmu_extent_find(dev, block, &last);
	*run = last - block + 1;
	return word;
}

/* Makes a page of a slot that all blocks under it shared. */
static bool dmu_index_split(unsigned long *slot)
{
	unsigned long *page, i;

	page = (unsigned long *)__get_free_page(GFP_NOIO | __GFP_NOWARN);
	if (!page) {
		/* Rather slow than wrong. */
		WRITE_ONCE(*slot, DMU_INDEX_ASK);
		return false;
	}
	for (i = 0; i < DMU_INDEX_SLOTS; i++)
		page[i] = *slot;
	/* Who sees the page sees its slots. */
	smp_store_release(slot, (unsigned long)page);
	return true;
}

/* Sets first to last, counted from the first block under the slot. */
static void dmu_index_put(unsigned long *slot, unsigned int shift, u64 first, u64 last,
			  unsigned long word)
{
	u64 under = 1UL << shift, step = under >> DMU_INDEX_BITS, at;
	unsigned long *page;

	if (!dmu_index_is_page(*slot)) {
		if (!first && last == under - 1) {
			/* See dmu-core.h: the cell that stands before the place that enters. */
			smp_store_release(slot, word);
			return;
		}
		if (*slot == word || *slot == DMU_INDEX_ASK || !dmu_index_split(slot))
			return;
	}
	page = (unsigned long *)*slot;
	for (at = round_down(first, step); at <= last; at += step)
		dmu_index_put(&page[at / step], shift - DMU_INDEX_BITS, max(first, at) - at,
			      min(last - at, step - 1), word);
}

/* Follows the tree: the blocks first to last have this word now. */
void dmu_index_set(struct dmu_device *dev, u64 first, u64 last, unsigned long word)
{
	struct dmu_index *index;
	u64 at, start;

	lockdep_assert_held(&dev->map_mutex);
	index = rcu_dereference_protected(dev->index, lockdep_is_held(&dev->map_mutex));
	if (first >> DMU_INDEX_TOP >= index->slots)
		return;
	last = min(last, ((u64)index->slots << DMU_INDEX_TOP) - 1);
	for (at = first >> DMU_INDEX_TOP; at <= last >> DMU_INDEX_TOP; at++) {
		start = at << DMU_INDEX_TOP;
		dmu_index_put(&index->slot[at], DMU_INDEX_TOP, max(first, start) - start,
			      min(last - start, (1ULL << DMU_INDEX_TOP) - 1), word);
		cond_resched();
	}
}

/*
 * Makes the root reach over so many blocks. What lies beyond the old one is not in the new
 * one either, and has never been mapped.
 */
int dmu_index_reach(struct dmu_device *dev, u64 blocks)
{
	u64 slots = min_t(u64, ((blocks - 1) >> DMU_INDEX_TOP) + 1, DMU_INDEX_MOST);
	struct dmu_index *index, *old;
	unsigned int noio;

	old = rcu_dereference_protected(dev->index, true);
	if (old && old->slots >= slots)
		return 0;
	noio = memalloc_noio_save();
	index = kvzalloc(struct_size(index, slot, slots), GFP_KERNEL | __GFP_NOWARN);
	memalloc_noio_restore(noio);
	if (!index)
		return -ENOMEM;
	index->slots = slots;
	mutex_lock(&dev->map_mutex);
	if (old)
		memcpy(index->slot, old->slot, old->slots * sizeof(*old->slot));
	rcu_assign_pointer(dev->index, index);
	mutex_unlock(&dev->map_mutex);
	if (old) {
		synchronize_rcu();
		kvfree(old);
	}
	return 0;
}

static void dmu_index_free_page(unsigned long slot, unsigned int shift)
{
	unsigned long *page = (unsigned long *)slot, i;

	if (!dmu_index_is_page(slot))
		return;
	for (i = 0; shift > DMU_INDEX_BITS && i < DMU_INDEX_SLOTS; i++)
		dmu_index_free_page(page[i], shift - DMU_INDEX_BITS);
	free_page(slot);
}

void dmu_index_free(struct dmu_device *dev)
{
	struct dmu_index *index = rcu_dereference_protected(dev->index, true);
	unsigned long i;

	for (i = 0; index && i < index->slots; i++) {
		dmu_index_free_page(index->slot[i], DMU_INDEX_TOP);
		cond_resched();
	}
	kvfree(index);
}
