/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * dmu-place.c: how a block gets to a new place: MAP, the preparation, and what is not committed. See dmu-map.h for what is said of each function.
 */
#ifndef DMU_PLACE_H
#define DMU_PLACE_H

#include "dmu-core.h"

/* Answers that follow each other, each but the last LINKED. */
struct dmu_chain {
	bool linked;			/* the next answer belongs to the last one */
	int error;			/* of an earlier member */
	struct dmu_cell *held;		/* its write completes with the chain's end */
	struct completion prepared;
};

/* Any. Whether it is no run of blocks of the device. */
bool dmu_bad_run(struct dmu_device *dev, u64 block, u64 count);

/*
 * Any; the table stays, by answer_mutex or lock. Checks a place for so many sectors; where nothing
 * is written it may end early.
 */
int dmu_check_place(struct dmu_device *dev, unsigned int device, u64 sector, u64 count,
		    bool written);

/*
 * Process; answer_mutex held. The answer MAP; a refused one has changed nothing. Where a has no mark
 * and is to be uncommitted it gets one, unless it comes to nothing at once.
 */
int dmu_take_map(struct dmu_device *dev, struct dmu_answer *a, struct dmu_chain *chain);

/* Process. Starts the preparation that the answer of a cell asks for: it is the cell's owner then. */
void dmu_prepare(struct dmu_cell *cell);

/* Process: the work that ends a preparation, and goes on with the queue behind it. */
void dmu_place_work(struct work_struct *work);

/* Process. Writes zeroes where word says; the bio leaves the epoch when it ends. */
void dmu_zero_bio(struct dmu_device *dev, struct bio *bio, unsigned long word,
		  struct dmu_epoch *epoch);

/*
 * Any; lock held. Whether an uncommitted placement lies in the run, other than, where that is
 * allowed, one that says the same as word.
 */
bool dmu_placed_overlap(struct dmu_device *dev, u64 block, u64 count, unsigned long word,
			bool same_allowed);

/*
 * Any; lock held. Lists a placement, whose owner the lists are then; it overlaps no other, and its
 * mark is the highest.
 */
void dmu_placed_add(struct dmu_device *dev, struct dmu_placement *placement);

/* Any; lock held. Takes a placement out of all lists, and frees it. */
void dmu_placed_drop(struct dmu_device *dev, struct dmu_placement *placement);

#endif
