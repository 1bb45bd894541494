// SPDX-License-Identifier: GPL-2.0-only
/*
 * Layers: blocks that have one place each, all in a row. Of such a block has to be known only
 * whether it is there (present): a bit. If it is not, the index says where its contents are.
 *
 * A write of whole blocks that are granted and not present is a touch: it is sent to the place like any
 * mapped write, and when it has ended its bits are set. No cell, no work item, no placement. A read
 * that finds no bit is served from below, unless a touch that came before it is under way: then it
 * waits in a cell, so that requests are served in the order in which they came. It looks at the bits,
 * at the touches, and at the bits again: a touch sets them before it is gone.
 *
 * A cell that stands for a block of a layer (a write of a part of it, a discard) copies onto the
 * place, or zeroes it. No touch of the block may be under way then. So a cell is counted by its region,
 * which stops touches from beginning, and waits until those of its block are over; what comes
 * meanwhile queues behind it, or in cells of its own. Both are under layer->lock, so one always sees
 * the other. Of two touches that overlap, as of any two writes that are sent at the same
 * time, either may be the last.
 *
 * Order. The data is in its place, then a bit is dirty and dev->touched counts it, then it is
 * present, then the write ends. Who finds the bit present finds it uncommitted, too: a forced write
 * asks for that. A bit is set also where a cell's placement enters what is mapped, with the cell
 * standing, as a place enters the index (see dmu-core.h).
 *
 * Rounds. A touch that ends sets its bit in the round of that moment, layer->gen. A flush closes
 * that round by turning to the other, then flushes the devices, tells the bits (PRESENT, with a mark of
 * its own) and asks for a commit. With FLUSH_DONE they are no longer dirty. If the flush comes to
 * anything else the next one puts them to its own first; what has been told twice is no news.
 * No touch that ends after the turn is told with this flush: the devices need not have its data.
 */
#include <linux/bitmap.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include "dmu-cell.h"
#include "dmu-commit.h"
#include "dmu-core.h"
#include "dmu-io.h"
#include "dmu-layer.h"
#include "dmu-map.h"
#include "dmu-node.h"
#include "dmu-place.h"

#define DMU_PAGE_WORDS	(DMU_PAGE_BLOCKS / BITS_PER_LONG)
#define DMU_PAGE_BYTES	(DMU_PAGE_BLOCKS / 8)
#define DMU_REGION_SECTORS	2048

/* Bits. */

/* The page of a block, NULL without one: nothing of it is present. Under RCU, or layer->lock. */
static struct dmu_layer_page *dmu_page_of(struct dmu_layer *layer, u64 block)
{
	struct dmu_layer_pages *pages;

	pages = rcu_dereference_check(layer->pages, lockdep_is_held(&layer->lock));
	return smp_load_acquire(&pages->page[block >> DMU_PAGE_SHIFT]);	/* and its bits */
}

static unsigned int dmu_in_page(u64 block)
{
	return block & (DMU_PAGE_BLOCKS - 1);
}

/* How many bits from the first on, up to want, are as set says. */
static unsigned int dmu_bits_alike(const unsigned long *bits, unsigned int first, unsigned int want,
				   bool set)
{
	unsigned int at = first, end = min(first + want, DMU_PAGE_BLOCKS);
	unsigned long flip = set ? ~0UL : 0, differ;

	while (at < end) {
		/* Who sees a bit sees what was done before it was set. */
		differ = smp_load_acquire(&bits[at / BITS_PER_LONG]) ^ flip;
		differ >>= at % BITS_PER_LONG;
		if (differ) {
			at += __ffs(differ);
			break;
		}
		at = round_down(at, BITS_PER_LONG) + BITS_PER_LONG;
	}
	return min(at, end) - first;
}

/* Whether the block is present, and in run how many from it on are alike, up to want. */
static bool dmu_present(struct dmu_layer *layer, u64 block, u64 want, u64 *run)
{
	struct dmu_layer_page *page = dmu_page_of(layer, block);
	unsigned int first = dmu_in_page(block), most;
	bool set = false;

	want = min(want, READ_ONCE(layer->count) - block);
	most = min_t(u64, want, DMU_PAGE_BLOCKS - first);
	*run = most;
	if (page) {
		/* Who sees the bit sees what was done before it was set. */
		set = smp_load_acquire(&page->present[first / BITS_PER_LONG]) >>
		      (first % BITS_PER_LONG) & 1;
		if (most > 1)
			*run = max(1U, dmu_bits_alike(page->present, first, most, set));
	}
	return set;
}

unsigned long dmu_find_layered(struct dmu_device *dev, u64 block, u64 want, u64 *run)
{
	struct dmu_layer *layer = dmu_layer_of(dev, block);
	unsigned long word;
	u64 clear;

	if (!layer)
		return dmu_index_lookup(dev, block, want, run);
	if (dmu_present(layer, block, want, run))
		return layer->word;
	clear = *run;
	word = dmu_index_lookup(dev, block, clear, run);
	*run = min(*run, clear);
	return word;
}

/* The words that have the bits from at to end; last is the last bit in each, mask has them all. */
#define dmu_each_word(at, end, last, mask) \
	for (; (at) < (end) && (last = min((at) | (BITS_PER_LONG - 1), (end) - 1), \
				mask = GENMASK(last % BITS_PER_LONG, (at) % BITS_PER_LONG), true); \
	     at = last + 1)

/* Pages. */

static struct dmu_layer_page *dmu_page_alloc(u64 block, gfp_t gfp)
{
	struct dmu_layer_page *page;

	gfp |= __GFP_ZERO | __GFP_NOWARN | __GFP_ACCOUNT;
	page = kmalloc(sizeof(*page), gfp);
	if (!page)
		return NULL;
	page->first = round_down(block, DMU_PAGE_BLOCKS);
	page->present = kmalloc(DMU_PAGE_BYTES, gfp);
	if (page->present)
		return page;
	kfree(page);
	return NULL;
}

static void dmu_page_free(struct dmu_layer_page *page)
{
	if (!page)
		return;
	kfree(page->present);
	kfree(page->dirty[0]);
	kfree(page->dirty[1]);
	kfree(page);
}

/* Puts a page where there is none; it is the caller's still if there is one. */
static bool dmu_page_install(struct dmu_layer *layer, struct dmu_layer_page *page)
{
	struct dmu_layer_pages *pages;
	struct dmu_layer_page **slot;

	lockdep_assert_held(&layer->lock);
	pages = rcu_dereference_protected(layer->pages, lockdep_is_held(&layer->lock));
	slot = &pages->page[page->first >> DMU_PAGE_SHIFT];
	if (*slot)
		return false;
	smp_store_release(slot, page);	/* who sees it sees its bits */
	return true;
}

/* The page of a block for a touch, with memory for what it will make dirty. */
static struct dmu_layer_page *dmu_page_for_touch(struct dmu_layer *layer, u64 block)
{
	gfp_t gfp = GFP_NOWAIT | __GFP_ZERO | __GFP_NOWARN | __GFP_ACCOUNT;
	struct dmu_layer_page *page = dmu_page_of(layer, block);
	unsigned int i;

	lockdep_assert_held(&layer->lock);
	if (!page) {
		page = dmu_page_alloc(block, GFP_NOWAIT);
		if (!page)
			return NULL;
		dmu_page_install(layer, page);
	}
	for (i = 0; i < 2; i++) {
		if (!page->dirty[i])
			page->dirty[i] = kmalloc(DMU_PAGE_BYTES, gfp);
		if (!page->dirty[i])
			return NULL;
	}
	return page;
}

/* Sees to it that the blocks of a run have pages. */
static int dmu_pages_make(struct dmu_layer *layer, u64 block, u64 count, gfp_t gfp)
{
	u64 at, end = block + count;

	for (at = block; at < end; at = round_down(at, DMU_PAGE_BLOCKS) + DMU_PAGE_BLOCKS) {
		struct dmu_layer_page *page, *is;

		rcu_read_lock();
		is = dmu_page_of(layer, at);
		rcu_read_unlock();
		if (is)
			continue;
		page = dmu_page_alloc(at, gfp);
		if (!page)
			return -ENOMEM;
		spin_lock_irq(&layer->lock);
		if (dmu_page_install(layer, page))
			page = NULL;
		spin_unlock_irq(&layer->lock);
		dmu_page_free(page);
	}
	return 0;
}

/* Makes bits present that are committed, or listed as a placement. */
static void dmu_page_set(struct dmu_layer_page *page, unsigned int at, unsigned int end)
{
	unsigned long mask, *word;
	unsigned int last;

	dmu_each_word(at, end, last, mask) {
		word = &page->present[at / BITS_PER_LONG];
		/* See dmu-core.h: the cell that stands, then the place that enters. */
		smp_store_release(word, *word | mask);
	}
}

static void dmu_page_clear(struct dmu_layer_page *page, unsigned int at, unsigned int end)
{
	unsigned long mask, *word;
	unsigned int last;

	dmu_each_word(at, end, last, mask) {
		word = &page->present[at / BITS_PER_LONG];
		WRITE_ONCE(*word, *word & ~mask);
	}
}

/* How many blocks of a run are in the page of the first. */
static unsigned int dmu_page_part(u64 block, u64 end)
{
	return min_t(u64, end - block, DMU_PAGE_BLOCKS - dmu_in_page(block));
}

/* Touches. */

static struct dmu_region *dmu_region_of(struct dmu_layer *layer, u64 block)
{
	return &layer->regions[(block >> layer->region_shift) % DMU_REGIONS];
}

unsigned int dmu_touch_run(struct dmu_device *dev, struct bio *bio, u64 block, unsigned int want)
{
	struct dmu_layer *layer = dmu_layer_of(dev, block);
	unsigned int mask = dev->block_sectors - 1;
	u64 end = bio_end_sector(bio), run, most;

	if (!layer || !READ_ONCE(layer->granted) || bio_op(bio) != REQ_OP_WRITE ||
	    bio->bi_iter.bi_sector & mask)
		return 0;
	most = READ_ONCE(layer->count) - block;
	most = min(most, (1ULL << layer->region_shift) -
			 (block & ((1ULL << layer->region_shift) - 1)));
	most = min_t(u64, most, DMU_PAGE_BLOCKS - dmu_in_page(block));
	/* A last block that it has a part of goes along only where it is present. */
	if (most >= want && end & mask && end != dev->sectors) {
		most = want;
		if (!dmu_present(layer, block + want - 1, 1, &run))
			most--;
	}
	return min_t(u64, most, want);
}

/* A touch under way that has some of the blocks, all of one region. */
static bool dmu_touching(struct dmu_region *region, u64 block, u64 count)
{
	struct dmu_io *io;

	list_for_each_entry(io, &region->touching, touching)
		if (io->touch_block < block + count && block < io->touch_block + io->touch_count)
			return true;
	return false;
}

bool dmu_touch_meets(struct dmu_device *dev, u64 block, u64 count)
{
	struct dmu_layer *layer = dmu_layer_of(dev, block);
	u64 at, next, end = block + count, run;
	bool meets = false;
	struct dmu_region *region;
	unsigned long flags;

	if (!layer)
		return false;
	for (at = block; at < end && !meets; at = next) {
		next = min(end, ((at >> layer->region_shift) + 1) << layer->region_shift);
		region = dmu_region_of(layer, at);
		/* Who does not see a touch that has gone sees its bits. */
		if (likely(!smp_load_acquire(&region->touches)))
			continue;
		spin_lock_irqsave(&layer->lock, flags);
		meets = dmu_touching(region, at, next - at);
		spin_unlock_irqrestore(&layer->lock, flags);
	}
	dmu_stop(DMU_STOP_MISSED);
	if (meets)
		return true;
	for (at = block; at < end; at += run)
		if (dmu_present(layer, at, end - at, &run))
			return true;
	return false;
}

bool dmu_touch_begin(struct dmu_device *dev, struct bio *bio, unsigned int sectors)
{
	u64 block = dmu_block_of(dev, bio->bi_iter.bi_sector);
	struct dmu_layer *layer = dmu_layer_of(dev, block);
	struct dmu_io *io = dmu_io(bio);
	struct dmu_layer_page *page = NULL;
	struct dmu_region *region;
	unsigned long flags;

	if (!layer)
		return false;
	spin_lock_irqsave(&layer->lock, flags);
	region = dmu_region_of(layer, block);
	if (layer->granted && !layer->ranges && !region->cells)
		page = dmu_page_for_touch(layer, block);
	if (page) {
		page->users++;
		WRITE_ONCE(region->touches, region->touches + 1);
		list_add(&io->touching, &region->touching);
		layer->touches++;
		io->touched = page;
		io->touch_block = block;
		io->touch_count = dmu_block_of(dev, bio->bi_iter.bi_sector + sectors - 1) - block + 1;
	}
	spin_unlock_irqrestore(&layer->lock, flags);
	return page;
}

/* Makes bits of a page present, in the round of now; says how many were not. */
static unsigned int dmu_touch_set(struct dmu_device *dev, struct dmu_layer *layer,
				  struct dmu_layer_page *page, unsigned int at, unsigned int end)
{
	unsigned int gen = layer->gen, added = 0, last, more;
	unsigned long mask, *word, new;

	lockdep_assert_held(&layer->lock);
	dmu_each_word(at, end, last, mask) {
		word = &page->present[at / BITS_PER_LONG];
		new = mask & ~*word;
		if (!new)
			continue;
		more = hweight_long(new);
		added += more;
		page->dirty[gen][at / BITS_PER_LONG] |= new;
		atomic_add(more, &dev->touched);
		/* Who finds it present finds it uncommitted. */
		smp_store_release(word, *word | new);
	}
	page->count[gen] += added;
	layer->dirty[gen] += added;
	if (added)
		__set_bit(page->first >> DMU_PAGE_SHIFT, layer->dirtied[gen]);
	return added;
}

/* Something has become uncommitted, or much has. */
static void dmu_touch_commit(struct dmu_device *dev, bool first)
{
	unsigned long flags;

	spin_lock_irqsave(&dev->lock, flags);
	if (first) {
		if (!atomic_read(&dev->uncommitted))
			dev->flush.uncommitted = jiffies;
		queue_delayed_work(dev->wq, &dev->flush.late, DMU_ASK_AFTER);
	} else {
		dev->flush.wanted = true;
		queue_work(dev->wq, &dev->flush.work);
	}
	spin_unlock_irqrestore(&dev->lock, flags);
}

void dmu_touch_end(struct dmu_device *dev, struct bio *bio, bool written)
{
	struct dmu_layer *layer = READ_ONCE(dev->layer);
	struct dmu_io *io = dmu_io(bio);
	struct dmu_layer_page *page = io->touched;
	unsigned int first = dmu_in_page(io->touch_block), added = 0, before, total;
	struct dmu_region *region;
	unsigned long flags;
	bool kick;

	dmu_stop(DMU_STOP_TOUCHED);
	io->touched = NULL;
	spin_lock_irqsave(&layer->lock, flags);
	before = layer->dirty[layer->gen];
	if (written)
		added = dmu_touch_set(dev, layer, page, first, first + io->touch_count);
	total = layer->dirty[layer->gen];
	region = dmu_region_of(layer, io->touch_block);
	page->users--;
	list_del(&io->touching);
	/* See dmu_touch_meets(): the bits, then the touch that is gone. */
	smp_store_release(&region->touches, region->touches - 1);
	layer->touches--;
	kick = region->cells || (!layer->touches && layer->ranges);
	spin_unlock_irqrestore(&layer->lock, flags);
	if (kick)
		queue_work(dev->wq, &dev->standing_work);
	if (!added)
		return;
	atomic64_add(added, &dev->stats[DMU_STAT_GRANTED]);
	if (!before)
		dmu_touch_commit(dev, true);
	if (before / DMU_ASK_COMMIT != total / DMU_ASK_COMMIT)
		dmu_touch_commit(dev, false);
}

/* Cells. */

static bool dmu_layer_busy(struct dmu_layer *layer, struct dmu_cell *cell)
{
	lockdep_assert_held(&layer->lock);
	if (cell->type == DMU_DISCARD)
		return layer->touches;
	return dmu_touching(dmu_region_of(layer, cell->block), cell->block, 1);
}

bool dmu_layer_stand(struct dmu_cell *cell)
{
	struct dmu_layer *layer = dmu_layer_of(cell->dev, cell->block);
	unsigned long flags;
	bool waits;
	u64 run;

	lockdep_assert_held(&cell->dev->lock);
	if (!layer || cell->stands)
		return false;
	spin_lock_irqsave(&layer->lock, flags);
	cell->stands = true;
	if (cell->type == DMU_DISCARD)
		layer->ranges++;
	else
		dmu_region_of(layer, cell->block)->cells++;
	waits = dmu_layer_busy(layer, cell) ||
		(cell->type == DMU_FAULT && dmu_present(layer, cell->block, 1, &run));
	spin_unlock_irqrestore(&layer->lock, flags);
	return waits;
}

bool dmu_layer_waits(struct dmu_cell *cell)
{
	struct dmu_layer *layer = cell->dev->layer;
	unsigned long flags;
	bool waits;

	if (!cell->stands)
		return false;
	spin_lock_irqsave(&layer->lock, flags);
	waits = dmu_layer_busy(layer, cell);
	spin_unlock_irqrestore(&layer->lock, flags);
	return waits;
}

void dmu_layer_leave(struct dmu_cell *cell)
{
	struct dmu_layer *layer = cell->dev->layer;
	unsigned long flags;

	lockdep_assert_held(&cell->dev->lock);
	if (!cell->stands)
		return;
	cell->stands = false;
	spin_lock_irqsave(&layer->lock, flags);
	if (cell->type == DMU_DISCARD)
		layer->ranges--;
	else
		dmu_region_of(layer, cell->block)->cells--;
	spin_unlock_irqrestore(&layer->lock, flags);
}

/* A cell of which no touch is in the way any more, or NULL. The caller holds dev->lock. */
static struct dmu_cell *dmu_standing_next(struct dmu_device *dev)
{
	struct dmu_cell *cell;

	lockdep_assert_held(&dev->lock);
	list_for_each_entry(cell, &dev->standing, unsent) {
		if (dmu_layer_waits(cell))
			continue;
		list_del_init(&cell->unsent);
		return cell;
	}
	return NULL;
}

void dmu_standing_work(struct work_struct *work)
{
	struct dmu_device *dev = container_of(work, struct dmu_device, standing_work);
	unsigned int flags = memalloc_noio_save();	/* for what is sent to a device */
	struct dmu_cell *cell;

	for (;;) {
		spin_lock_irq(&dev->lock);
		cell = dmu_standing_next(dev);
		if (!cell)
			break;
		dmu_take_up(cell);
	}
	spin_unlock_irq(&dev->lock);
	memalloc_noio_restore(flags);
}

/* What is mapped. */

static bool dmu_in_layer(struct dmu_layer *layer, u64 block, u64 count)
{
	return count <= layer->count - block;
}

/* The layer whose place the word is, for the run. */
static struct dmu_layer *dmu_layer_for(struct dmu_device *dev, u64 block, u64 count,
				       unsigned long word)
{
	struct dmu_layer *layer = dmu_layer_of(dev, block);

	return layer && layer->word == word && dmu_in_layer(layer, block, count) ? layer : NULL;
}

bool dmu_under_layer(struct dmu_device *dev, u64 block, u64 count, unsigned long word)
{
	struct dmu_layer *layer = dmu_layer_of(dev, block);

	return layer && dmu_in_layer(layer, block, count) && !dmu_word_writable(word);
}

int dmu_store_ready(struct dmu_device *dev, u64 block, u64 count, unsigned long word, gfp_t gfp)
{
	struct dmu_layer *layer = dmu_layer_for(dev, block, count, word);

	lockdep_assert_held(&dev->map_mutex);
	if (!layer)
		return dmu_index_ready(dev, block, count, word, gfp);
	return dmu_pages_make(layer, block, count, gfp);
}

void dmu_store(struct dmu_device *dev, u64 block, u64 count, unsigned long word)
{
	struct dmu_layer *layer = dmu_layer_for(dev, block, count, word);
	u64 end = block + count;
	unsigned int part;

	lockdep_assert_held(&dev->map_mutex);
	if (!layer) {
		dmu_extent_store(dev, block, count, word);
		dmu_index_bound(dev, block, count);
		return;
	}
	for (; block < end; block += part) {
		part = dmu_page_part(block, end);
		spin_lock_irq(&layer->lock);
		dmu_page_set(dmu_page_of(layer, block), dmu_in_page(block),
			     dmu_in_page(block) + part);
		spin_unlock_irq(&layer->lock);
		cond_resched();
	}
}

/* Whether any of the blocks is present. */
static bool dmu_any_present(struct dmu_device *dev, struct dmu_layer *layer, u64 block, u64 count)
{
	u64 end = block + count, run;
	bool present = false;

	for (; block < end && !present; block += run) {
		rcu_read_lock();
		present = dmu_present(layer, block, end - block, &run);
		rcu_read_unlock();
		cond_resched();
	}
	return present;
}

bool dmu_store_conflict(struct dmu_device *dev, u64 block, u64 count, unsigned long word,
			bool placed)
{
	struct dmu_layer *layer = dmu_layer_of(dev, block);

	lockdep_assert_held(&dev->map_mutex);
	if (!layer)
		return dmu_extent_conflict(dev, block, count, word);
	/* Of a run over its end nothing is said. */
	if (!dmu_in_layer(layer, block, count))
		return true;
	if (word == layer->word)
		return placed && dmu_any_present(dev, layer, block, count);
	/* There is no other place to write to. */
	return dmu_word_writable(word) || placed || dmu_extent_conflict(dev, block, count, word);
}

bool dmu_layer_has(struct dmu_device *dev, u64 block, u64 count, unsigned long word)
{
	return dmu_layer_for(dev, block, count, word);
}

void dmu_layer_forget(struct dmu_device *dev, u64 block, u64 count)
{
	struct dmu_layer *layer = dev->layer;
	u64 end = block + count;
	unsigned int part;

	lockdep_assert_held(&dev->map_mutex);
	for (; block < end; block += part) {
		part = dmu_page_part(block, end);
		spin_lock_irq(&layer->lock);
		dmu_page_clear(dmu_page_of(layer, block), dmu_in_page(block),
			       dmu_in_page(block) + part);
		spin_unlock_irq(&layer->lock);
		cond_resched();
	}
}

/* Rounds. */

bool dmu_layer_closed(struct dmu_device *dev)
{
	struct dmu_layer *layer = dev->layer;

	return layer && READ_ONCE(layer->dirty[!layer->gen]);
}

bool dmu_layer_close(struct dmu_device *dev)
{
	struct dmu_layer *layer = dev->layer;
	bool any;

	lockdep_assert_held(&dev->lock);
	if (!layer)
		return false;
	spin_lock(&layer->lock);
	any = layer->dirty[layer->gen];
	if (any)
		layer->gen = !layer->gen;
	spin_unlock(&layer->lock);
	return any;
}

/* The page of the next bit of a round's pages, or NULL. */
static struct dmu_layer_page *dmu_dirty_next(struct dmu_layer *layer, unsigned int gen,
					     unsigned long from)
{
	struct dmu_layer_pages *pages;
	unsigned long at;

	lockdep_assert_held(&layer->lock);
	pages = rcu_dereference_protected(layer->pages, lockdep_is_held(&layer->lock));
	at = find_next_bit(layer->dirtied[gen], pages->count, from);
	return at < pages->count ? pages->page[at] : NULL;
}

/* Ends a round for a page: its bits are no longer dirty there. */
static unsigned int dmu_dirty_drop(struct dmu_layer *layer, struct dmu_layer_page *page,
				   unsigned int gen)
{
	unsigned int count = page->count[gen];

	lockdep_assert_held(&layer->lock);
	page->count[gen] = 0;
	layer->dirty[gen] -= count;
	__clear_bit(page->first >> DMU_PAGE_SHIFT, layer->dirtied[gen]);
	if (page->users || page->count[!gen]) {
		memset(page->dirty[gen], 0, DMU_PAGE_BYTES);
	} else {
		kfree(page->dirty[0]);
		kfree(page->dirty[1]);
		page->dirty[0] = NULL;
		page->dirty[1] = NULL;
	}
	return count;
}

void dmu_layer_merge(struct dmu_device *dev)
{
	struct dmu_layer *layer = dev->layer;
	struct dmu_layer_page *page;
	unsigned int gen, i;

	if (!layer)
		return;
	for (;;) {
		spin_lock_irq(&layer->lock);
		gen = layer->gen;
		page = dmu_dirty_next(layer, !gen, 0);
		if (page) {
			/* No bit is in both. */
			for (i = 0; i < DMU_PAGE_WORDS; i++)
				page->dirty[gen][i] |= page->dirty[!gen][i];
			page->count[gen] += page->count[!gen];
			layer->dirty[gen] += page->count[!gen];
			__set_bit(page->first >> DMU_PAGE_SHIFT, layer->dirtied[gen]);
			dmu_dirty_drop(layer, page, !gen);
		}
		spin_unlock_irq(&layer->lock);
		if (!page)
			return;
		cond_resched();
	}
}

void dmu_layer_committed(struct dmu_device *dev)
{
	struct dmu_layer *layer = dev->layer;
	struct dmu_layer_page *page;

	if (!layer)
		return;
	for (;;) {
		spin_lock_irq(&layer->lock);
		page = dmu_dirty_next(layer, !layer->gen, 0);
		if (page)
			atomic_sub(dmu_dirty_drop(layer, page, !layer->gen), &dev->touched);
		spin_unlock_irq(&layer->lock);
		if (!page)
			return;
		cond_resched();
	}
}

bool dmu_layer_next(struct dmu_device *dev, unsigned int gen, u64 *at, struct dmu_message *message)
{
	struct dmu_layer *layer = dev->layer;
	struct dmu_layer_page *page;
	unsigned long from, i;
	bool found = false;

	lockdep_assert_held(&dev->lock);
	if (!layer)
		return false;
	spin_lock(&layer->lock);
	from = *at / DMU_PAGE_WORDS;
	i = *at % DMU_PAGE_WORDS;
	while ((page = dmu_dirty_next(layer, gen, from))) {
		if (page->first >> DMU_PAGE_SHIFT != from)
			i = 0;
		from = page->first >> DMU_PAGE_SHIFT;
		while (i < DMU_PAGE_WORDS && !page->dirty[gen][i])
			i++;
		found = i < DMU_PAGE_WORDS;
		if (found)
			break;
		from++;
		i = 0;
	}
	if (found) {
		message->type = DMU_PRESENT;
		message->block = page->first + i * BITS_PER_LONG;
		message->count = BITS_PER_LONG;
		message->sector = page->dirty[gen][i];
		*at = from * DMU_PAGE_WORDS + i + 1;
	}
	spin_unlock(&layer->lock);
	return found;
}

/*
 * With a later mark than its flush's they would not be committed by it; the others with an earlier one
 * would be, and their data need not be on the devices.
 */
u64 dmu_layer_mark(struct dmu_device *dev, unsigned int round, u64 *mark)
{
	lockdep_assert_held(&dev->lock);
	if (dev->flush.state != DMU_FLUSH_IDLE && round != dev->layer->gen)
		return dev->flush.upto;
	if (!*mark) {
		*mark = dev->last_mark + 1;
		WRITE_ONCE(dev->last_mark, *mark);
	}
	return *mark;
}

void dmu_layer_tell_from(struct dmu_cell *cell)
{
	lockdep_assert_held(&cell->dev->lock);
	cell->tell_round = 0;
	cell->tell = cell->block / BITS_PER_LONG;
	cell->tell_mark = 0;
}

/*
 * While the cell stands none of its blocks becomes present. The worker, which knows of touches only
 * what it was told, must not take one that is present for one that is not.
 */
bool dmu_layer_next_for(struct dmu_cell *cell, struct dmu_message *message)
{
	u64 end = cell->block + cell->count;
	struct dmu_device *dev = cell->dev;

	lockdep_assert_held(&dev->lock);
	if (cell->type != DMU_DISCARD || !cell->stands || !dev->knows_layers)
		return false;
	for (; cell->tell_round < 2; cell->tell_round++, cell->tell = cell->block / BITS_PER_LONG) {
		if (!dmu_layer_next(dev, cell->tell_round, &cell->tell, message) ||
		    message->block >= end)
			continue;
		message->mark = dmu_layer_mark(dev, cell->tell_round, &cell->tell_mark);
		return true;
	}
	memset(message, 0, sizeof(*message));
	return false;
}

bool dmu_layer_next_closed(struct dmu_device *dev, u64 *at, struct dmu_message *message)
{
	return dev->layer && dmu_layer_next(dev, !dev->layer->gen, at, message);
}

/* What the worker says. */

/* Memory for the bits of so many blocks, as far as there are none yet. */
static int dmu_layer_reach(struct dmu_layer *layer, u64 blocks)
{
	unsigned long count = ((blocks - 1) >> DMU_PAGE_SHIFT) + 1;
	struct dmu_layer_pages *pages, *old;
	unsigned long *dirtied[2], i;

	old = rcu_dereference_protected(layer->pages, true);
	if (old && old->count >= count)
		return 0;
	pages = kvzalloc(struct_size(pages, page, count), GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	for (i = 0; i < 2; i++)
		dirtied[i] = kvcalloc(BITS_TO_LONGS(count), sizeof(long),
				      GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	if (!pages || !dirtied[0] || !dirtied[1]) {
		kvfree(pages);
		kvfree(dirtied[0]);
		kvfree(dirtied[1]);
		return -ENOMEM;
	}
	pages->count = count;
	spin_lock_irq(&layer->lock);
	for (i = 0; old && i < old->count; i++)
		pages->page[i] = old->page[i];
	for (i = 0; i < 2; i++) {
		if (old)
			bitmap_copy(dirtied[i], layer->dirtied[i], old->count);
		swap(dirtied[i], layer->dirtied[i]);
	}
	rcu_assign_pointer(layer->pages, pages);
	spin_unlock_irq(&layer->lock);
	if (old)
		synchronize_rcu();
	kvfree(old);
	kvfree(dirtied[0]);
	kvfree(dirtied[1]);
	return 0;
}

static void dmu_layer_drop(struct dmu_layer *layer)
{
	struct dmu_layer_pages *pages = rcu_dereference_protected(layer->pages, true);
	unsigned long i;

	for (i = 0; pages && i < pages->count; i++) {
		dmu_page_free(pages->page[i]);
		cond_resched();
	}
	kvfree(pages);
	kvfree(layer->dirtied[0]);
	kvfree(layer->dirtied[1]);
	kfree(layer);
}

static struct dmu_layer *dmu_layer_make(struct dmu_device *dev, struct dmu_answer *a,
					unsigned long word)
{
	struct dmu_layer *layer = kzalloc(sizeof(*layer), GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	unsigned int shift = ilog2(DMU_REGION_SECTORS), i;

	if (!layer)
		return NULL;
	spin_lock_init(&layer->lock);
	for (i = 0; i < DMU_REGIONS; i++)
		INIT_LIST_HEAD(&layer->regions[i].touching);
	layer->count = a->count;
	layer->word = word;
	layer->region_shift = max(shift, dev->block_shift) - dev->block_shift;
	if (dmu_layer_reach(layer, a->count)) {
		dmu_layer_drop(layer);
		return NULL;
	}
	return layer;
}

/* Whether some of the blocks have another place, or are about to get one. */
static bool dmu_layer_conflict(struct dmu_device *dev, u64 count, unsigned long word)
{
	bool other;

	lockdep_assert_held(&dev->map_mutex);
	spin_lock_irq(&dev->lock);
	other = dmu_preparing_overlap(dev, 0, count, NULL, word) ||
		(dev->grant.count && dev->grant.word != word);
	spin_unlock_irq(&dev->lock);
	return other || dmu_extent_conflict(dev, 0, count, word);
}

/* The layer is found from now on, and cells that stand already stand in it. */
static void dmu_layer_begin(struct dmu_device *dev, struct dmu_layer *layer, u64 count)
{
	struct dmu_cell *cell;

	spin_lock_irq(&dev->lock);
	WRITE_ONCE(layer->count, count);
	smp_store_release(&dev->layer, layer);	/* who sees it sees it whole */
	/* None of them waits: touches have to be granted first. */
	list_for_each_entry(cell, &dev->cells, all)
		dmu_layer_stand(cell);
	spin_unlock_irq(&dev->lock);
}

int dmu_take_layer(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_layer *layer = dev->layer;
	unsigned long word;
	int error;

	if (a->count) {
		if (a->block || dmu_bad_run(dev, 0, a->count))
			return -ERANGE;
		error = dmu_check_place(dev, a->device, a->sector,
					dmu_run_sectors(dev, 0, a->count), true);
		if (error)
			return error;
		word = dmu_word(a->device, true, a->sector);
		if (layer && (layer->word != word || layer->count > a->count))
			return -EEXIST;
		if (layer && dmu_layer_reach(layer, a->count))
			return -ENOMEM;
		if (!layer)
			layer = dmu_layer_make(dev, a, word);
		if (!layer)
			return -ENOMEM;
		mutex_lock(&dev->map_mutex);
		if (dmu_layer_conflict(dev, a->count, word))
			error = -EEXIST;
		else
			dmu_layer_begin(dev, layer, a->count);
		mutex_unlock(&dev->map_mutex);
		if (error) {
			if (!dev->layer)
				dmu_layer_drop(layer);
			return error;
		}
	}
	spin_lock_irq(&dev->lock);
	dev->knows_layers = true;
	wake_up(&dev->wait);
	spin_unlock_irq(&dev->lock);
	return 0;
}

/* Takes bits in that are all in the caller's memory already. */
static void dmu_bits_in(struct dmu_layer *layer, u64 block, u64 count, const unsigned long *bits)
{
	u64 end = block + count;
	unsigned long *word;

	for (; block < end; block += BITS_PER_LONG, bits++) {
		if (!*bits)
			continue;
		spin_lock_irq(&layer->lock);
		word = &dmu_page_of(layer, block)->present[dmu_in_page(block) / BITS_PER_LONG];
		smp_store_release(word, *word | *bits);	/* the data is there already */
		spin_unlock_irq(&layer->lock);
		cond_resched();
	}
}

/* Makes the pages that have any of the bits. */
static int dmu_bits_ready(struct dmu_layer *layer, u64 block, u64 count, const unsigned long *bits)
{
	u64 end = block + count, next;
	int error = 0;

	for (; block < end && !error; block = next) {
		next = min(end, round_down(block, DMU_PAGE_BLOCKS) + DMU_PAGE_BLOCKS);
		if (memchr_inv(bits, 0, DIV_ROUND_UP(next - block, 8)))
			error = dmu_pages_make(layer, block, 1, GFP_KERNEL);
		bits += DIV_ROUND_UP(next - block, BITS_PER_LONG);
	}
	return error;
}

int dmu_take_bits(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_layer *layer = dmu_layer_of(dev, a->block);
	unsigned int rest = a->count % BITS_PER_LONG;
	unsigned long *bits;
	size_t size;
	int error;

	if (!layer)
		return -ENOENT;
	if (dmu_bad_run(dev, a->block, a->count) || !dmu_in_layer(layer, a->block, a->count))
		return -ERANGE;
	if (a->block % BITS_PER_LONG || a->count > DMU_MAX_BITS)
		return -EINVAL;
	size = BITS_TO_LONGS(a->count) * sizeof(long);
	bits = kvmalloc(size, GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	if (!bits)
		return -ENOMEM;
	error = copy_from_user(bits, u64_to_user_ptr(a->address), size) ? -EFAULT : 0;
	if (!error && rest && bits[a->count / BITS_PER_LONG] & ~(BIT(rest) - 1))
		error = -EINVAL;
	if (!error)
		error = dmu_bits_ready(layer, a->block, a->count, bits);
	if (!error)
		dmu_bits_in(layer, a->block, a->count, bits);
	kvfree(bits);
	return error;
}

void dmu_layer_grant(struct dmu_device *dev)
{
	struct dmu_grant *grant = &dev->grant;
	struct dmu_layer *layer = dev->layer;
	bool granted;

	lockdep_assert_held(&dev->lock);
	if (!layer)
		return;
	granted = grant->count && dev->knows_layers && grant->word == layer->word &&
		  !grant->block && grant->count >= layer->count;
	spin_lock(&layer->lock);
	WRITE_ONCE(layer->granted, granted);
	spin_unlock(&layer->lock);
}

void dmu_layer_free(struct dmu_device *dev)
{
	if (dev->layer)
		dmu_layer_drop(dev->layer);
}
