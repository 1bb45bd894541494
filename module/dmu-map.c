// SPDX-License-Identifier: GPL-2.0-only
/*
 * The remembered mapping: runs of blocks to words, in an index.
 *
 * A word is what a run's blocks have in common: bit 0 set (it marks a word in the index), bit
 * 1 the right to write, bits 2 to 5 the backing device (15: zeroes), the rest the distance
 * from a sector of the device to its place, signed. Two runs that continue each other
 * have the same word, so they are one extent, and splitting costs nothing.
 */
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include "dmu-core.h"
#include "dmu-io.h"
#include "dmu-map.h"
#include "dmu-place.h"

unsigned long dmu_word(unsigned int device, bool writable, s64 shift)
{
	return ((unsigned long)shift << 6) | (device << 2) | (writable ? 2 : 0) | 1;
}

/*
 * From a block to its word, in four steps at most, whether there is one extent or a million.
 *
 * Like a page table: a root, and tables of 64 slots down to leaves with a slot for each block. A
 * slot is 0 where nothing is mapped, a word (bit 0 set) that all blocks under it share, or
 * a table that tells them apart. A disk of few extents has hardly any tables; the most that
 * they can cost is a long for each block. A table whose slots have become alike goes.
 *
 * What is committed the worker knows, too: a request that finds it no more asks. So a hand goes
 * round over the blocks and forgets, a table of the second level at a time, where there are more
 * tables than index_limit allows, or memory is short. Requests under way to a place that is
 * forgotten are as good as before: an invalidation waits for them as ever. What is not committed
 * stays, and while writes that have failed are held, all does: dmu-io.c asks for what such a write
 * has lost.
 *
 * Readers hold the RCU read lock. Changes are made under map_mutex, in two parts: the cuts at both
 * ends of a run, which change nothing that a reader sees and may find no memory, and then
 * the run itself, which cannot fail.
 */

#define DMU_INDEX_BITS	6
#define DMU_INDEX_SLOTS	(1UL << DMU_INDEX_BITS)
#define DMU_INDEX_TOP	(3 * DMU_INDEX_BITS)	/* blocks under a slot of the root, as a shift */
#define DMU_INDEX_MOST	(1UL << 20)		/* slots of the root */
#define DMU_INDEX_PART	(2 * DMU_INDEX_BITS)	/* blocks that are forgotten together, as a shift */
#define DMU_INDEX_LOOKS	1024			/* parts that a shrinker looks at, at most */

static unsigned int dmu_index_limit = 64 << 10;
module_param_named(index_limit, dmu_index_limit, uint, 0644);
MODULE_PARM_DESC(index_limit,
		 "KiB of memory for the committed mapping of a device, more of which is forgotten");

static struct kmem_cache *dmu_index_cache;
static atomic_long_t dmu_index_tables;	/* of all devices */

struct dmu_index_table {
	unsigned long slot[DMU_INDEX_SLOTS];
	struct rcu_head rcu;
};

struct dmu_index {
	unsigned long slots;
	unsigned long slot[];
};

static bool dmu_index_is_table(unsigned long slot)
{
	return slot && !(slot & 1);
}

static struct dmu_index_table *dmu_index_table(unsigned long slot)
{
	return (struct dmu_index_table *)slot;
}

/* The root, for who changes it. */
static struct dmu_index *dmu_index_root(struct dmu_device *dev)
{
	return rcu_dereference_protected(dev->index, lockdep_is_held(&dev->map_mutex));
}

/* As dmu_index_lookup(), but sees no further than one slot, or one leaf. */
static unsigned long dmu_index_find(struct dmu_index *index, u64 block, u64 want, u64 *run)
{
	unsigned int shift = DMU_INDEX_TOP;
	unsigned long *slot = &index->slot[block >> DMU_INDEX_TOP];
	unsigned long word = READ_ONCE(*slot), limit;

	while (dmu_index_is_table(word)) {
		shift -= DMU_INDEX_BITS;
		slot = &dmu_index_table(word)->slot[(block >> shift) & (DMU_INDEX_SLOTS - 1)];
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

/*
 * The word of a block, 0 without one. Sets run to how many blocks from it on share the word,
 * as far as want asks. The caller holds the RCU read lock.
 */
unsigned long dmu_index_lookup(struct dmu_device *dev, u64 block, u64 want, u64 *run)
{
	struct dmu_index *index = rcu_dereference(dev->index);
	u64 end = (u64)index->slots << DMU_INDEX_TOP, more;
	unsigned long word;

	word = dmu_index_find(index, block, want, run);
	while (unlikely(*run < want) && block + *run < end) {
		if (dmu_index_find(index, block + *run, want - *run, &more) != word)
			break;
		*run += more;
	}
	return word;
}

/* Makes a table of a slot that all blocks under it share. */
static int dmu_index_split(struct dmu_device *dev, unsigned long *slot, gfp_t gfp)
{
	struct dmu_index_table *table;
	unsigned int i;

	table = kmem_cache_alloc(dmu_index_cache, gfp | __GFP_NOWARN);
	if (!table)
		return -ENOMEM;
	for (i = 0; i < DMU_INDEX_SLOTS; i++)
		table->slot[i] = *slot;
	dev->index_tables++;
	atomic_long_inc(&dmu_index_tables);
	/* Who sees the table sees its slots. */
	smp_store_release(slot, (unsigned long)table);
	return 0;
}

/* Sees to it that no slot has both block and the one before, unless they may stay together. */
static int dmu_index_cut(struct dmu_device *dev, u64 block, unsigned long word, gfp_t gfp)
{
	struct dmu_index *index = dmu_index_root(dev);
	unsigned int shift = DMU_INDEX_TOP;
	unsigned long *slot;
	int error;

	if (block >> DMU_INDEX_TOP >= index->slots)
		return 0;
	slot = &index->slot[block >> DMU_INDEX_TOP];
	while (block & ((1UL << shift) - 1)) {
		if (!dmu_index_is_table(*slot)) {
			if (*slot == word)
				return 0;
			error = dmu_index_split(dev, slot, gfp);
			if (error)
				return error;
		}
		shift -= DMU_INDEX_BITS;
		slot = &dmu_index_table(*slot)->slot[(block >> shift) & (DMU_INDEX_SLOTS - 1)];
	}
	return 0;
}

static void dmu_index_free_rcu(struct rcu_head *rcu)
{
	kmem_cache_free(dmu_index_cache, container_of(rcu, struct dmu_index_table, rcu));
}

/* Frees what a slot of the root or of a table had, when readers are done with it. */
static void dmu_index_drop(struct dmu_device *dev, unsigned long slot)
{
	struct dmu_index_table *table = dmu_index_table(slot);
	unsigned int i;

	if (!dmu_index_is_table(slot))
		return;
	for (i = 0; i < DMU_INDEX_SLOTS; i++)
		dmu_index_drop(dev, table->slot[i]);
	dev->index_tables--;
	atomic_long_dec(&dmu_index_tables);
	call_rcu(&table->rcu, dmu_index_free_rcu);
}

static bool dmu_index_is_uniform(struct dmu_index_table *table, unsigned long word)
{
	unsigned int i;

	if (table->slot[DMU_INDEX_SLOTS - 1] != word)
		return false;
	for (i = 0; i < DMU_INDEX_SLOTS - 1; i++)
		if (table->slot[i] != word)
			return false;
	return true;
}

/* Sets first to last, counted from the first block under the slot. The cuts are made. */
static void dmu_index_put(struct dmu_device *dev, unsigned long *slot, unsigned int shift,
			  u64 first, u64 last, unsigned long word)
{
	u64 step = 1UL << shift >> DMU_INDEX_BITS, at;
	unsigned long old = *slot;
	bool whole = !first && last == (1UL << shift) - 1;

	if (!whole) {
		/* Only a run that has the word already was not cut. */
		if (!dmu_index_is_table(old))
			return;
		for (at = round_down(first, step); at <= last; at += step)
			dmu_index_put(dev, &dmu_index_table(old)->slot[at / step],
				      shift - DMU_INDEX_BITS, max(first, at) - at,
				      min(last - at, step - 1), word);
		whole = dmu_index_is_uniform(dmu_index_table(old), word);
	}
	if (whole) {
		/* See dmu-core.h: the cell that stands, then the place that enters. */
		smp_store_release(slot, word);
		dmu_index_drop(dev, old);
	}
}

/*
 * Makes the cuts that dmu_index_set() with the same needs, which stay as long as map_mutex is
 * held; -ENOMEM, and no mapping has changed.
 */
int dmu_index_ready(struct dmu_device *dev, u64 block, u64 count, unsigned long word,
		    gfp_t gfp)
{
	int error;

	lockdep_assert_held(&dev->map_mutex);
	error = dmu_index_cut(dev, block, word, gfp);
	if (!error)
		error = dmu_index_cut(dev, block + count, word, gfp);
	return error;
}

/* Gives count blocks the word, for which dmu_index_ready() has been called. */
static void dmu_index_set(struct dmu_device *dev, u64 block, u64 count, unsigned long word)
{
	u64 last = block + count - 1, at, start;
	struct dmu_index *index = dmu_index_root(dev);

	lockdep_assert_held(&dev->map_mutex);
	might_sleep();
	for (at = block >> DMU_INDEX_TOP; at <= last >> DMU_INDEX_TOP; at++) {
		start = at << DMU_INDEX_TOP;
		dmu_index_put(dev, &index->slot[at], DMU_INDEX_TOP, max(block, start) - start,
			      min(last - start, (1ULL << DMU_INDEX_TOP) - 1), word);
		cond_resched();
	}
}

/* Makes the root reach over so many blocks. The new ones are mapped nowhere. */
int dmu_index_reach(struct dmu_device *dev, u64 blocks)
{
	u64 slots = ((blocks - 1) >> DMU_INDEX_TOP) + 1;
	struct dmu_index *index, *old;
	unsigned int noio;

	if (slots > DMU_INDEX_MOST)
		return -EFBIG;
	mutex_lock(&dev->map_mutex);
	old = dmu_index_root(dev);
	if (old && old->slots >= slots) {
		mutex_unlock(&dev->map_mutex);
		return 0;
	}
	noio = memalloc_noio_save();
	index = kvzalloc(struct_size(index, slot, slots), GFP_KERNEL | __GFP_NOWARN);
	memalloc_noio_restore(noio);
	if (index) {
		index->slots = slots;
		if (old)
			memcpy(index->slot, old->slot, old->slots * sizeof(*old->slot));
		rcu_assign_pointer(dev->index, index);
	}
	mutex_unlock(&dev->map_mutex);
	if (!index)
		return -ENOMEM;
	if (old) {
		synchronize_rcu();
		kvfree(old);
	}
	return 0;
}

/* Extents, which are runs of blocks that share a word. */

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

/*
 * Maps a block whose neighbours have slots beside its own, as most blocks have that are mapped one
 * at a time. False: nothing is done. A table in which a neighbour has another word is not uniform.
 */
static bool dmu_extent_store_one(struct dmu_device *dev, u64 block, unsigned long word)
{
	unsigned long slot = dmu_index_root(dev)->slot[block >> DMU_INDEX_TOP];
	unsigned int at = block & (DMU_INDEX_SLOTS - 1), shift = DMU_INDEX_TOP;
	unsigned long *own, is, before, after;

	if (!word || !at || at == DMU_INDEX_SLOTS - 1 || block + 1 >= dev->blocks)
		return false;
	for (; shift; slot = *own) {
		if (!dmu_index_is_table(slot))
			return false;
		shift -= DMU_INDEX_BITS;
		own = &dmu_index_table(slot)->slot[(block >> shift) & (DMU_INDEX_SLOTS - 1)];
	}
	is = slot;
	before = own[-1];
	after = own[1];
	if (before == word)
		return false;
	WRITE_ONCE(dev->extents, dev->extents + 1 - (is && is != before) +
				 (after && after != word) - (after && after != is));
	/* See dmu-core.h: the cell that stands, then the place that enters. */
	smp_store_release(own, word);
	return true;
}

/* Maps a run, for which dmu_index_ready() has been called. */
void dmu_extent_store(struct dmu_device *dev, u64 block, u64 count, unsigned long word)
{
	u64 end = block + count, last = min(end, dev->blocks - 1), extents;
	unsigned long before, after = 0;

	lockdep_assert_held(&dev->map_mutex);
	if (count == 1 && dmu_extent_store_one(dev, block, word))
		return;
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

/* Forgetting. */

/* Whether all that is mapped in the run is committed, and nobody counts on finding it. */
static bool dmu_index_may_forget(struct dmu_device *dev, u64 block, u64 count)
{
	bool may;

	spin_lock_irq(&dev->lock);
	may = !dmu_failed_waits(dev) && !dmu_placed_overlap(dev, block, count, 0, false);
	spin_unlock_irq(&dev->lock);
	return may;
}

/* The table of the part that begins with the block, or 0; *parts says how many parts share it. */
static unsigned long dmu_index_part(struct dmu_index *index, u64 block, u64 *parts)
{
	unsigned long slot = index->slot[block >> DMU_INDEX_TOP];
	u64 at = block >> DMU_INDEX_PART;

	*parts = DMU_INDEX_SLOTS - at % DMU_INDEX_SLOTS;
	if (!dmu_index_is_table(slot))
		return 0;
	*parts = 1;
	slot = dmu_index_table(slot)->slot[at % DMU_INDEX_SLOTS];
	return dmu_index_is_table(slot) ? slot : 0;
}

/*
 * Forgets parts until no more than so many tables are left, or so many parts have been looked at,
 * or all have. Those of the run stay.
 */
static void dmu_index_forget(struct dmu_device *dev, unsigned long tables, u64 looks, u64 block,
			     u64 count)
{
	struct dmu_index *index = dmu_index_root(dev);
	u64 size = 1UL << DMU_INDEX_PART, end = (u64)index->slots << DMU_INDEX_TOP;
	u64 turn = end >> DMU_INDEX_PART, at, parts, seen = 0;

	lockdep_assert_held(&dev->map_mutex);
	for (; dev->index_tables > tables && looks-- && seen < turn; seen += parts) {
		at = dev->index_hand < end ? dev->index_hand : 0;
		if (dmu_index_part(index, at, &parts) &&
		    (at >= block + count || block >= at + size) &&
		    dmu_index_may_forget(dev, at, size))
			dmu_extent_store(dev, at, size, 0);
		dev->index_hand = at + parts * size;
		cond_resched();
	}
}

/* Something has been mapped, and stays: see that there are not too many tables. */
void dmu_index_bound(struct dmu_device *dev, u64 block, u64 count)
{
	unsigned long most = ((u64)READ_ONCE(dmu_index_limit) << 10) / sizeof(struct dmu_index_table);

	lockdep_assert_held(&dev->map_mutex);
	/* Where most of them have to stay it is not looked each time. */
	if (likely(dev->index_tables <= max(most, READ_ONCE(dev->index_looked))))
		return;
	dmu_index_forget(dev, most - most / 8, U64_MAX, block, count);
	WRITE_ONCE(dev->index_looked, dev->index_tables + most / 8);
}

/* Memory is short: forgets so many tables, if that can be done at once; says how many it has. */
unsigned long dmu_index_shrink(struct dmu_device *dev, unsigned long count)
{
	unsigned long before;

	if (!mutex_trylock(&dev->map_mutex))
		return 0;
	before = dev->index_tables;
	dmu_index_forget(dev, before - min(before, count), DMU_INDEX_LOOKS, 0, 0);
	count = before - dev->index_tables;
	mutex_unlock(&dev->map_mutex);
	return count;
}

unsigned long dmu_index_count(void)
{
	return atomic_long_read(&dmu_index_tables);
}

/* No reader is left. */
void dmu_index_free(struct dmu_device *dev)
{
	struct dmu_index *index = rcu_dereference_protected(dev->index, true);
	unsigned long i;

	for (i = 0; index && i < index->slots; i++) {
		dmu_index_drop(dev, index->slot[i]);
		cond_resched();
	}
	kvfree(index);
}

/* What a worker can make the kernel keep counts as its cgroup's. */
int dmu_index_init(void)
{
	dmu_index_cache = KMEM_CACHE(dmu_index_table, SLAB_ACCOUNT);
	return dmu_index_cache ? 0 : -ENOMEM;
}

void dmu_index_exit(void)
{
	/* What was given up may still be on its way. */
	rcu_barrier();
	kmem_cache_destroy(dmu_index_cache);
}
