/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * dmu-layer.c: blocks that have one place each, of which only has to be known whether they are
 * there: a bit. See dmu-map.h for what is said of each function.
 */
#ifndef DMU_LAYER_H
#define DMU_LAYER_H

#include "dmu-core.h"
#include "dmu-map.h"

#define DMU_PAGE_SHIFT	15	/* blocks of a page of bits, as a shift */
#define DMU_PAGE_BLOCKS	(1U << DMU_PAGE_SHIFT)
#define DMU_REGIONS	256

/* The bits of a row of blocks. Once it is there it stays until the device goes. */
struct dmu_layer_page {
	u64 first;			/* its first block */
	unsigned long *present;
	unsigned long *dirty[2];	/* both or none: what has become present in each round */
	unsigned int count[2];		/* and how many bits are set there */
	unsigned int users;		/* touches under way */
};

struct dmu_layer_pages {
	unsigned long count;
	struct dmu_layer_page *page[];
};

/* 1 MiB of the disk, or a block, and others that share a number with it. */
struct dmu_region {
	unsigned int touches;		/* under way; looked at without the lock */
	unsigned int cells;		/* that stand for blocks of it */
	struct list_head touching;	/* those touches */
};

struct dmu_layer {
	/* Set once, before the layer is found; but the count may grow. */
	u64 count;			/* of blocks, from the first of the device on */
	unsigned long word;		/* where its blocks are, writable */
	unsigned int region_shift;	/* blocks of a region, as a shift */
	struct dmu_layer_pages __rcu *pages;

	bool granted ____cacheline_aligned_in_smp;	/* touches may begin */
	unsigned int gen;		/* the round in which touches end now */
	spinlock_t lock ____cacheline_aligned_in_smp;	/* all below, and the changes of bits */
	unsigned int touches;		/* under way */
	unsigned int ranges;		/* cells of runs */
	unsigned int dirty[2];		/* blocks that have become present in each round */
	unsigned long *dirtied[2];	/* the pages that have such, a bit each */
	struct dmu_region regions[DMU_REGIONS];
};

/* Any. The layer that has the block, or NULL. */
static inline struct dmu_layer *dmu_layer_of(struct dmu_device *dev, u64 block)
{
	struct dmu_layer *layer = smp_load_acquire(&dev->layer);	/* who sees it sees it whole */

	return likely(!layer) || block >= READ_ONCE(layer->count) ? NULL : layer;
}

/* Any. Something is not committed: of a forced write that has ended a commit is due. */
static inline bool dmu_has_uncommitted(struct dmu_device *dev)
{
	return atomic_read(&dev->uncommitted) || atomic_read(&dev->touched);
}

/*
 * Any; the caller holds the RCU read lock. As dmu_index_lookup(), which it asks for a block that is
 * not present.
 */
unsigned long dmu_find_layered(struct dmu_device *dev, u64 block, u64 want, u64 *run);

static inline unsigned long dmu_find(struct dmu_device *dev, u64 block, u64 want, u64 *run)
{
	if (likely(!READ_ONCE(dev->layer)))
		return dmu_index_lookup(dev, block, want, run);
	return dmu_find_layered(dev, block, want, run);
}

/*
 * Any; the caller holds the RCU read lock. How many of the blocks of a write, from the first on, may
 * be sent to the layer's place as a touch, present or not; 0: none.
 */
unsigned int dmu_touch_run(struct dmu_device *dev, struct bio *bio, u64 block, unsigned int want);

/*
 * Any; the caller holds the RCU read lock; takes layer->lock where touches are near. A read of so
 * many blocks, none of which dmu_find() has found present. True when one may have to wait for a touch
 * that came before it, or has become present.
 */
bool dmu_touch_meets(struct dmu_device *dev, u64 block, u64 count);

/*
 * Any; takes layer->lock. A write of so many sectors, for which dmu_touch_run() was asked, is about
 * to be sent; dmu_touch_end() has to follow. False: not now, nothing has begun.
 */
bool dmu_touch_begin(struct dmu_device *dev, struct bio *bio, unsigned int sectors);

/* Any; takes layer->lock, then lock. The touch has ended; if written its blocks are present. */
void dmu_touch_end(struct dmu_device *dev, struct bio *bio, bool written);

/*
 * Any; lock held; takes layer->lock. A cell stands from now on: no touch begins in its region. True
 * when it has to wait for touches that are under way there, or one of its block is over by now;
 * dmu_standing_work() takes it up then.
 */
bool dmu_layer_stand(struct dmu_cell *cell);
bool dmu_layer_waits(struct dmu_cell *cell);

/* Any; lock held; takes layer->lock. A cell goes. */
void dmu_layer_leave(struct dmu_cell *cell);

/* Process; the work of cells that waited for touches. */
void dmu_standing_work(struct work_struct *work);

/*
 * Process; map_mutex held; takes layer->lock. As dmu_index_ready(), dmu_extent_store(),
 * dmu_extent_conflict(): what is mapped to the layer's place is a row of bits, all else the index's.
 */
int dmu_store_ready(struct dmu_device *dev, u64 block, u64 count, unsigned long word, gfp_t gfp);
void dmu_store(struct dmu_device *dev, u64 block, u64 count, unsigned long word);
bool dmu_store_conflict(struct dmu_device *dev, u64 block, u64 count, unsigned long word,
			bool placed);

/* Any. Whether the word says only what lies under the layer there. */
bool dmu_under_layer(struct dmu_device *dev, u64 block, u64 count, unsigned long word);

/* Any. Whether the run is a layer's, which has the word. */
bool dmu_layer_has(struct dmu_device *dev, u64 block, u64 count, unsigned long word);

/* Process; map_mutex held; takes layer->lock. A placement of the run has come to nothing. */
void dmu_layer_forget(struct dmu_device *dev, u64 block, u64 count);

/* Process; takes layer->lock. Before a round is closed: what the last one did not commit. */
void dmu_layer_merge(struct dmu_device *dev);

/* Any; lock held; takes layer->lock. Closes the round; true when it has made anything present. */
bool dmu_layer_close(struct dmu_device *dev);

/* Any; lock held. Whether the closed round has bits to commit. */
bool dmu_layer_closed(struct dmu_device *dev);

/* Process; takes layer->lock. What the closed round has made present is committed. */
void dmu_layer_committed(struct dmu_device *dev);

/*
 * Any; lock held; takes layer->lock. The next word of a round's bits, from *at on, counted in words:
 * false when there is none. *at is where to go on.
 */
bool dmu_layer_next(struct dmu_device *dev, unsigned int gen, u64 *at, struct dmu_message *message);

/*
 * Any; lock held; takes layer->lock. The next word of bits that the worker has to know of before the
 * question of a discard; dmu_layer_tell_from() begins that.
 */
bool dmu_layer_next_for(struct dmu_cell *cell, struct dmu_message *message);
void dmu_layer_tell_from(struct dmu_cell *cell);

/*
 * Any; lock held. The mark under which bits of a round are told: that of the flush which closed it,
 * or *mark, which is given when it is 0.
 */
u64 dmu_layer_mark(struct dmu_device *dev, unsigned int round, u64 *mark);

/* As dmu_layer_next(), of the round that is closed. */
bool dmu_layer_next_closed(struct dmu_device *dev, u64 *at, struct dmu_message *message);

/* Process; answer_mutex held. The answers LAYER and BITS; a refused one has changed nothing. */
int dmu_take_layer(struct dmu_device *dev, struct dmu_answer *a);
int dmu_take_bits(struct dmu_device *dev, struct dmu_answer *a);

/* Any; lock held; takes layer->lock. Touches may begin if the grant says what the layer does. */
void dmu_layer_grant(struct dmu_device *dev);

/* Process; nobody has the device any more, its node included. */
void dmu_layer_free(struct dmu_device *dev);

#endif
