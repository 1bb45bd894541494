/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * dmu-cell.c: blocks in question, the requests that wait there, and what happens to many of them at
 * once. See dmu-map.h for what is said of each function.
 *
 * A bio that is given to one of these belongs to the cells from then on, unless it says that it
 * has not been taken. A cell in DMU_CLAIMED or DMU_PREPARING belongs to whoever brought it there;
 * any other one may go whenever the lock is dropped.
 */
#ifndef DMU_CELL_H
#define DMU_CELL_H

#include "dmu-core.h"

/* Any. The word that serves the bio, 0 when none does; it is decided by the index alone. */
unsigned long dmu_serving(struct dmu_device *dev, struct bio *bio);

/*
 * Any; takes lock. Takes a bio that the index did not serve. False: the index serves it now, or,
 * with *requeue, a suspend wants it back; the bio is the caller's still.
 */
bool dmu_hold(struct dmu_device *dev, struct bio *bio, bool *requeue);

/*
 * Any. Whether a request for the blocks may have to wait: true for some that need not. The caller
 * has read the index before, and looks at dev->removals afterwards.
 */
bool dmu_may_wait(struct dmu_device *dev, u64 block, unsigned int count);

/* Any; takes lock. How many of the blocks, from the first on, are in nobody's hands. */
unsigned int dmu_free_run(struct dmu_device *dev, u64 block, unsigned int count);

/* Any; lock held. */
struct dmu_cell *dmu_cell_by_id(struct dmu_device *dev, u64 id);

/* Any; lock held. Whether a block of the run is being prepared for a place other than word says. */
bool dmu_preparing_overlap(struct dmu_device *dev, u64 block, u64 count,
			   struct dmu_cell *except, unsigned long word);

/* Any; lock held. Ends a cell that has no bio, or whose bios the caller has taken. */
void dmu_cell_remove(struct dmu_cell *cell);

/* Process; lock held, and dropped. Gives a claimed cell's bios back to the core, and ends it. */
void dmu_return_cell(struct dmu_cell *cell) __releases(&cell->dev->lock);

/*
 * Process; takes lock. Serves the queue of a claimed cell as far as the index allows: it ends with
 * the cell gone, or asking for its first bio. The caller has the cell no more.
 */
void dmu_process(struct dmu_cell *cell);

/*
 * Process; lock held, and dropped. Takes up a cell that waited for touches, claimed: as
 * dmu_process(), but for a discard, whose question is raised.
 */
void dmu_take_up(struct dmu_cell *cell) __releases(&cell->dev->lock);

/* Any; lock held. Raises the question of a claimed cell's first bio, or where its block is read. */
void dmu_ask(struct dmu_cell *cell);

/* Process; takes lock. Asks where a block is that no request waits for. False: not now. */
bool dmu_ask_unasked(struct dmu_device *dev, u64 block);

/* Process; takes lock. A claimed discard, whose bio is active, has count blocks less to do. */
void dmu_advance(struct dmu_cell *cell, u64 count);

/* Process: the work of what is deferred. */
void dmu_deferred(struct work_struct *work);

/*
 * Process; answer_mutex held; takes lock. Takes the question that is answered: -ENOENT when nobody
 * asks it. The cell is the caller's, who ends it, or gives it back with dmu_unclaim() as it was.
 */
int dmu_claim(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell **claimed);
void dmu_unclaim(struct dmu_cell *cell);

/*
 * Process; takes lock. The read at the head of a claimed cell's queue, the caller's now, or NULL.
 */
struct bio *dmu_pop_read(struct dmu_cell *cell);

/* Process; takes lock. Ends every bio of a claimed cell, and the cell. */
void dmu_fail_cell(struct dmu_cell *cell, int error);

/* Process; takes lock. A suspend without flush: all that waits goes back to the core. */
void dmu_requeue_all(struct dmu_device *dev);

/* Process; takes lock. The administrator: all that waits fails. */
void dmu_fail_all(struct dmu_device *dev, int error);
void dmu_fail_work(struct work_struct *work);

/* Process; takes lock. Before the device goes: no bio is left. */
void dmu_free_cells(struct dmu_device *dev);

/* Any; lock held. For a new opener: what the last one was told is unanswered again. */
void dmu_reask_all(struct dmu_device *dev);

/* Any; lock held. Asks again what was parked, only that cell or all (NULL). Returns how many. */
unsigned int dmu_retry(struct dmu_device *dev, struct dmu_cell *only);

/* Process: the work that fails what has waited for longer than fault_timeout. */
void dmu_timeout(struct work_struct *work);

#endif
