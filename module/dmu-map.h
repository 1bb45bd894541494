/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * dmu-map.c: from a block to the word that says where it is. It knows of cells and placements only
 * what must not be forgotten.
 *
 * In these headers a function says in which context it may be called, what its caller holds, what
 * it takes itself, and who owns what it is given or gives. "Process" may sleep; "any" may not, and
 * leaves interrupts as they are.
 */
#ifndef DMU_MAP_H
#define DMU_MAP_H

#include "dmu-core.h"

#define DMU_WORD_ZERO 15

/* Any. A word; 0 is nowhere. shift is the distance from a sector of the device to its place. */
unsigned long dmu_word(unsigned int device, bool writable, s64 shift);

static inline bool dmu_word_writable(unsigned long word)
{
	return word & 2;
}

static inline unsigned int dmu_word_device(unsigned long word)
{
	return (word >> 2) & 15;
}

static inline s64 dmu_word_shift(unsigned long word)
{
	return (s64)word >> 6;
}

/* Process, once, at load and at unload. */
int dmu_index_init(void);
void dmu_index_exit(void);

/*
 * Any; the caller holds the RCU read lock. The word of a block, 0 without one, and in run how many
 * blocks from it on share the word, as far as want asks. The place may be used as long as the
 * caller stays in the epoch that it entered before.
 */
unsigned long dmu_index_lookup(struct dmu_device *dev, u64 block, u64 want, u64 *run);

/*
 * Process; map_mutex held, until dmu_extent_store() is done. Takes the memory, by gfp, that mapping
 * the run to word needs; -ENOMEM, and no mapping has changed.
 */
int dmu_index_ready(struct dmu_device *dev, u64 block, u64 count, unsigned long word,
		    gfp_t gfp);

/* Process; map_mutex held. Maps a run for which dmu_index_ready() was called. Cannot fail. */
void dmu_extent_store(struct dmu_device *dev, u64 block, u64 count, unsigned long word);

/* Process; map_mutex held. Maps a run nowhere; -ENOMEM, and nothing has changed. */
int dmu_extent_erase(struct dmu_device *dev, u64 block, u64 count);

/*
 * Process; map_mutex held. Whether mapping the run to word would move blocks under requests that
 * may be writing there: what is mapped writable keeps its place and its right until it is
 * invalidated.
 */
bool dmu_extent_conflict(struct dmu_device *dev, u64 block, u64 count, unsigned long word);

/* Process; takes map_mutex. Makes the root reach over so many blocks, the new ones nowhere. */
int dmu_index_reach(struct dmu_device *dev, u64 blocks);

/*
 * Process; map_mutex held; takes lock. The run has been mapped, and stays: forgets others if there
 * are too many tables.
 */
void dmu_index_bound(struct dmu_device *dev, u64 block, u64 count);

/*
 * Process, also where memory is reclaimed: tries map_mutex; takes lock. Forgets so many tables, if
 * that can be done at once; says how many it has.
 */
unsigned long dmu_index_shrink(struct dmu_device *dev, unsigned long count);

/* Any. The tables of all devices. */
unsigned long dmu_index_count(void);

/* Process; no reader is left, nobody else has the device. */
void dmu_index_free(struct dmu_device *dev);

#endif
