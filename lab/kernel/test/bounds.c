// SPDX-License-Identifier: Apache-2.0
/* What a worker can make the module keep, and what it costs to ask for it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "lab.h"

#define MOST 262144		/* uncommitted placements of a device */
#define ASKED 65536		/* so many are committed unasked */
#define BATCH 4096

/* As many placements as are taken; one after the other so many. */
static uint32_t place_many(int node, uint64_t from, uint32_t count)
{
	static struct dmu_answer list[BATCH];
	uint32_t i, refused;

	for (i = 0; i < count; i++) {
		/* None continues the one before it. */
		list[i] = map(0, from + i, 1, 0, 2 * (from + i), DMU_WRITABLE | DMU_HOLD_FLUSH);
		list[i].mark = from + i + 1;
	}
	refused = answers(node, list, count);
	for (i = 0; i < count; i++)
		CHECK(list[i].result == (i < count - refused ? 0 : -ENOBUFS), "%d",
		      list[i].result);
	return count - refused;
}

static uint64_t dump(int node)
{
	static struct dmu_message list[1024];
	uint64_t count = 0, mark = 0;
	ssize_t size, i;

	CHECK(answer(node, (struct dmu_answer){ .type = DMU_DUMP }) == 0);
	for (;;) {
		size = read(node, list, sizeof(list));
		CHECK(size > 0, "errno %d", errno);
		for (i = 0; i < size / (ssize_t)sizeof(*list); i++) {
			if (list[i].type == DMU_DUMP_DONE)
				return count;
			CHECK(list[i].type == DMU_UNCOMMITTED_IS && list[i].mark > mark);
			mark = list[i].mark;
			count++;
		}
	}
}

/* Placements that nobody flushes: a commit is asked for, no more than so many are kept. */
static void many_uncommitted(void)
{
	uint64_t blocks = ASKED + MOST + BATCH, from, start;
	struct dmu_message m;
	char loop[32], status[64];
	int node;

	CHECK(run("truncate -s %llu /mnt/many.img && losetup --show -f /mnt/many.img",
		  (unsigned long long)blocks * 2 * SECTOR + SECTOR) == 0, "%s", said());
	snprintf(loop, sizeof(loop), "%.*s", (int)strcspn(said(), "\n"), said());
	CHECK(run("dmsetup create lab --table '0 %llu userspace lab 1 1 %s'",
		  (unsigned long long)blocks, loop) == 0, "%s", said());
	node = open(NODE, O_RDWR | O_CLOEXEC);
	CHECK(node >= 0);
	for (from = 0; from < ASKED; from += BATCH)
		CHECK(place_many(node, from, BATCH) == BATCH);
	m = expect(node, DMU_FLUSH);
	CHECK(m.mark == ASKED, "mark %llu", (unsigned long long)m.mark);
	CHECK(answer(node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	CHECK(stat_of("uncommitted") == 0);
	for (; from < ASKED + MOST; from += BATCH)
		CHECK(place_many(node, from, BATCH) == BATCH);
	CHECK(place_many(node, from, BATCH) == 0);
	m = expect(node, DMU_FLUSH);
	/* In time that grows with their number, not with its square. */
	start = now_ms();
	CHECK(dump(node) == MOST);
	printf("# %d records dumped in %llu ms\n", MOST, (unsigned long long)(now_ms() - start));
	CHECK(now_ms() - start < 20000);
	CHECK(answer(node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	CHECK(place_many(node, from, BATCH) == BATCH);
	/* None of these extents continues another one. */
	CHECK(run("dmsetup status lab") == 0);
	snprintf(status, sizeof(status), " worker %llu ", (unsigned long long)blocks);
	CHECK(strstr(said(), status), "%s", said());
	close(node);
	CHECK(run("dmsetup remove lab") == 0, "%s", said());
	CHECK(run("losetup -D && rm /mnt/many.img") == 0);
}

/* The extents that status tells, against a walk over a model, with runs of all kinds. */
static void extents(void)
{
	enum { BLOCK = 8, BLOCKS = 700 };
	struct rig rig = { .block = BLOCK, .sectors = BLOCKS * BLOCK };
	static uint64_t model[BLOCKS];		/* where, 0: nowhere */
	unsigned int state = getenv("DMU_SEED") ? atoi(getenv("DMU_SEED")) : 1, i, round;

	rig_up(&rig);
	for (round = 0; round < 400; round++) {
		unsigned int block = rand_r(&state) % BLOCKS, what = rand_r(&state) % 4;
		unsigned int count = 1 + rand_r(&state) % (rand_r(&state) % 4 ? 3 : BLOCKS / 2);
		unsigned int distance = what * 4 * BLOCK, found = 0;
		char status[64];

		if (count > BLOCKS - block)
			count = BLOCKS - block;
		/* Read only, so that everything may move. */
		if (what)
			CHECK(answer(rig.node, map(0, block, count, 0, block * BLOCK + distance,
						   0)) == 0);
		else
			CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_INVALIDATE,
				     .block = block, .count = count }) == 0);
		for (i = block; i < block + count; i++)
			model[i] = distance;
		if (round % 8)
			continue;
		for (i = 0; i < BLOCKS; i++)
			found += model[i] && (!i || model[i] != model[i - 1]);
		CHECK(run("dmsetup status lab") == 0);
		snprintf(status, sizeof(status), " worker %u ", found);
		CHECK(strstr(said(), status), "not%s: %s", status, said());
	}
	rig_down(&rig);
}

const struct scenario bound_scenarios[] = {
	{ "many-uncommitted", many_uncommitted },
	{ "extents", extents },
	{ 0 },
};
