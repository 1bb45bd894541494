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

/* A device of so many blocks of a sector over a file that is all holes; its node. */
static struct rig many_up(uint64_t blocks)
{
	struct rig rig = { .block = 1, .sectors = blocks };

	CHECK(run("truncate -s %llu /mnt/many.img && losetup --show -f /mnt/many.img",
		  (unsigned long long)blocks * 2 * SECTOR + SECTOR) == 0, "%s", said());
	snprintf(rig.store, sizeof(rig.store), "%.*s", (int)strcspn(said(), "\n"), said());
	CHECK(run("dmsetup create lab --table '0 %llu userspace lab 1 1 %s'",
		  (unsigned long long)blocks, rig.store) == 0, "%s", said());
	rig.node = open(NODE, O_RDWR | O_CLOEXEC);
	rig.disk = open(DISK, O_RDWR | O_DIRECT | O_CLOEXEC);
	CHECK(rig.node >= 0 && rig.disk >= 0);
	return rig;
}

static void many_down(struct rig *rig)
{
	close(rig->disk);
	close(rig->node);
	CHECK(run("dmsetup remove lab") == 0, "%s", said());
	CHECK(run("losetup -d %s && rm /mnt/many.img", rig->store) == 0, "%s", said());
}

/* The flush for every placement up to a mark. A slow machine asks by time for less before. */
static struct dmu_message asked_for(int node, uint64_t mark)
{
	for (;;) {
		struct dmu_message m = expect(node, DMU_FLUSH);

		if (m.mark >= mark)
			return m;
		CHECK(answer(node, (struct dmu_answer){ .type = DMU_FAIL, .id = m.id,
							.code = EAGAIN }) == 0);
	}
}

/* Placements that nobody flushes: a commit is asked for, no more than so many are kept. */
static void many_uncommitted(void)
{
	uint64_t blocks = ASKED + MOST + BATCH, from, start;
	struct rig rig = many_up(blocks);
	int node = rig.node;
	struct dmu_message m;

	for (from = 0; from < ASKED; from += BATCH)
		CHECK(place_many(node, from, BATCH) == BATCH);
	m = asked_for(node, ASKED);
	CHECK(m.mark == ASKED, "mark %llu", (unsigned long long)m.mark);
	CHECK(answer(node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	CHECK(stat_of("uncommitted") == 0);
	for (; from < ASKED + MOST; from += BATCH)
		CHECK(place_many(node, from, BATCH) == BATCH);
	CHECK(place_many(node, from, BATCH) == 0);
	m = asked_for(node, ASKED + MOST);
	/* In time that grows with their number, not with its square. */
	start = now_ms();
	CHECK(dump(node) == MOST);
	printf("# %d records dumped in %llu ms\n", MOST, (unsigned long long)(now_ms() - start));
	CHECK(now_ms() - start < 20000);
	CHECK(answer(node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	CHECK(place_many(node, from, BATCH) == BATCH);
	/* None of these extents continues another one. */
	CHECK(extents_of() == blocks);
	many_down(&rig);
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
		CHECK(extents_of() == found, "not %u but %llu", found,
		      (unsigned long long)extents_of());
	}
	rig_down(&rig);
}

#define LIMIT "/sys/module/dm_userspace/parameters/index_limit"

static void limit_back(void)
{
	run("echo 65536 >" LIMIT);
}

/* Takes count blocks of 1 sector from a block on, none of which continues the one before it. */
static void map_many(int node, uint64_t from, uint64_t count)
{
	static struct dmu_answer list[BATCH];
	uint64_t at;
	uint32_t i;

	for (at = from; at < from + count; at += BATCH) {
		for (i = 0; i < BATCH; i++)
			list[i] = map(0, at + i, 1, 0, 2 * (at + i), DMU_WRITABLE);
		CHECK(answers(node, list, BATCH) == 0);
	}
}

/*
 * What is committed takes no more memory than index_limit says, and gives it back when memory is
 * short: it is asked for again, and is where it was. What is not committed is not forgotten.
 */
static void forgotten(void)
{
	enum { BLOCKS = 64 * BATCH, SMALL = 512 << 10, TABLE = 528 };
	struct rig rig = many_up(BLOCKS);
	struct dmu_message m;
	uint64_t extents;
	struct guest *g;

	atexit(limit_back);
	CHECK(run("echo %d >" LIMIT, SMALL >> 10) == 0, "%s", said());
	CHECK(place_many(rig.node, 0, 64) == 64);
	map_many(rig.node, BATCH, BATCH);
	end(begin(&rig, WRITE_IT, BATCH + 7, 1, 0x5a), 0);
	map_many(rig.node, 2 * BATCH, BLOCKS - 2 * BATCH);
	extents = extents_of();
	printf("# %llu of %d extents are remembered\n", (unsigned long long)extents,
	       BLOCKS - BATCH + 64);
	CHECK(extents > SMALL / TABLE * 64 / 2 && extents < SMALL / TABLE * 64 + BATCH);
	/* Not even where nothing may be remembered, or when memory is short. */
	CHECK(run("echo 0 >" LIMIT) == 0);
	map_many(rig.node, 2 * BATCH, BATCH);
	CHECK(extents_of() <= BATCH + 64);
	make_forget(64);
	CHECK(extents_of() == 64 && stat_of("uncommitted") == 64);
	end(begin(&rig, WRITE_IT, 5, 1, 0x55), 0);
	while (next_message(rig.node, &m, 100))
		CHECK(put_off(rig.node, &m, 0), "a message of type %u", m.type);
	g = begin(&rig, READ_IT, BATCH + 7, 1, 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == BATCH + 7 && m.flags == DMU_READ);
	CHECK(answer(rig.node, map(m.id, m.block, 1, 0, 2 * m.block, DMU_WRITABLE)) == 0);
	end(g, 0);
	check_fill(g, 0, SECTOR, 0x5a);
	end(begin(&rig, WRITE_IT, BATCH + 7, 1, 0x5b), 0);
	/* Once committed it is as any other. */
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect(rig.node, DMU_FLUSH);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(g, 0);
	make_forget(0);
	limit_back();
	map_many(rig.node, BATCH, 8 * BATCH);
	CHECK(extents_of() == 8 * BATCH);
	many_down(&rig);
}

const struct scenario bound_scenarios[] = {
	{ "many-uncommitted", many_uncommitted },
	{ "extents", extents },
	{ "forgotten", forgotten },
	{ 0 },
};
