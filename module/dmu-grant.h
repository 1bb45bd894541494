/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * dmu-grant.c: first writes that are placed without a question. See dmu-map.h for what is said of
 * each function.
 */
#ifndef DMU_GRANT_H
#define DMU_GRANT_H

#include "dmu-core.h"

/* Process; answer_mutex held. The answer GRANT; a refused one has changed nothing. */
int dmu_take_grant(struct dmu_device *dev, struct dmu_answer *a);

/*
 * Any; lock held. Takes the first bio of a claimed cell that is to ask, if it need not: then the
 * cell is dev->grant_work's.
 */
bool dmu_grant_offer(struct dmu_cell *cell);
void dmu_grant_work(struct work_struct *work);

/* Any; lock held. Nothing is granted any more; who comes next hears of what was by a dump. */
void dmu_grant_end(struct dmu_device *dev);

/* Any; lock held. The worker knows of the placement, or need not any more. */
void dmu_grant_told(struct dmu_device *dev, struct dmu_placement *placement);

/* Any; lock held. Another table has come: a place that it has not is granted no more. */
void dmu_grant_renew(struct dmu_device *dev);

#endif
