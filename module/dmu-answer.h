/* SPDX-License-Identifier: GPL-2.0-only */
/* What the files that take answers share. All of it runs under answer_mutex. */
#ifndef DMU_ANSWER_H
#define DMU_ANSWER_H

#include "dmu-core.h"

struct dmu_chain {
	bool linked;			/* the next answer belongs to the last one */
	int error;			/* of an earlier member */
	struct dmu_cell *held;
	struct completion prepared;
};

int dmu_claim(struct dmu_device *dev, struct dmu_answer *a, struct dmu_cell **claimed);
void dmu_unclaim(struct dmu_cell *cell);
struct bio *dmu_pop_read(struct dmu_cell *cell);
bool dmu_bad_run(struct dmu_device *dev, u64 block, u64 count);
int dmu_check_place(struct dmu_device *dev, unsigned int device, u64 sector, u64 count,
		    bool written);
int dmu_take_map(struct dmu_device *dev, struct dmu_answer *a, struct dmu_chain *chain);
int dmu_take_data(struct dmu_device *dev, struct dmu_answer *a);
int dmu_take_grant(struct dmu_device *dev, struct dmu_answer *a);

#endif
