// SPDX-License-Identifier: Apache-2.0
/* Grants: first writes that the module places by itself, and how the worker hears of them. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "lab.h"

#define BLOCK 16

static struct rig plain(void)
{
	return (struct rig){ .block = BLOCK, .sectors = 64 * BLOCK };
}

/* Blocks of the disk live at the same place plus so many sectors in the store. */
#define PLACE(block) (32 * BLOCK + (block) * BLOCK)

static struct dmu_answer grant(uint64_t block, uint64_t count, uint32_t budget)
{
	return (struct dmu_answer){
		.type = DMU_GRANT, .block = block, .count = count, .sector = PLACE(block),
		.length = budget,
	};
}

static struct dmu_answer invalidation(uint64_t block, uint64_t count)
{
	return (struct dmu_answer){ .type = DMU_INVALIDATE, .block = block, .count = count };
}

/* Everything is read from the base, and blocks 0 to 31 may go to the store. */
static void granted_up(struct rig *rig, uint32_t budget)
{
	rig_up(rig);
	CHECK(answer(rig->node, map(0, 0, 64, 1, 0, 0)) == 0);
	CHECK(answer(rig->node, grant(0, 32, budget)) == 0);
}

static void finish_flush(struct rig *rig, struct guest *flush, uint64_t mark)
{
	struct dmu_message m = expect(rig->node, DMU_FLUSH);

	CHECK(m.mark == mark, "mark %llu", (unsigned long long)m.mark);
	still_waits(flush);
	CHECK(answer(rig->node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(flush, 0);
}

/* Placed without a question, whole around what was written; told before the flush. */
static void grant_places(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;
	unsigned int i;

	rig_up(&rig);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GET_VERSION }) == 0);
	CHECK(expect(rig.node, DMU_VERSION_IS).flags & DMU_TAKES_GRANTS);
	CHECK(answer(rig.node, map(0, 0, 30, 1, 0, 0)) == 0);
	CHECK(answer(rig.node, map(0, 30, 1, DMU_DEVICE_ZERO, 0, 0)) == 0);
	CHECK(answer(rig.node, map(0, 32, 32, 1, 32 * BLOCK, 0)) == 0);
	CHECK(answer(rig.node, grant(0, 32, 100)) == 0);
	end(begin(&rig, WRITE_IT, 3 * BLOCK + 5, 2, 9), 0);
	end(begin(&rig, WRITE_IT, 4 * BLOCK, BLOCK, 8), 0);
	end(begin(&rig, WRITE_IT, 30 * BLOCK + BLOCK - 1, 1, 7), 0);
	expect_silence(rig.node);
	CHECK(stat_of("faults") == 0);
	CHECK(stat_of("granted") == 3 && stat_of("copies") == 2 && stat_of("uncommitted") == 3);
	g = begin(&rig, READ_IT, 2 * BLOCK, 3 * BLOCK, 0);
	end(g, 0);
	check_bytes(g, 0, (BLOCK + 5) * SECTOR, 0, 2 * BLOCK * SECTOR);
	check_fill(g, (BLOCK + 5) * SECTOR, 2 * SECTOR, 9);
	check_bytes(g, (BLOCK + 7) * SECTOR, (BLOCK - 7) * SECTOR, 0, (3 * BLOCK + 7) * SECTOR);
	check_fill(g, 2 * BLOCK * SECTOR, BLOCK * SECTOR, 8);
	g = begin(&rig, READ_IT, 30 * BLOCK, BLOCK, 1);
	end(g, 0);
	check_fill(g, 0, (BLOCK - 1) * SECTOR, 0);
	check_fill(g, (BLOCK - 1) * SECTOR, SECTOR, 7);
	/* Where they went. */
	peek(rig.store, PLACE(4), BLOCK, g->data);
	check_fill(g, 0, BLOCK * SECTOR, 8);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	for (i = 0; i < 3; i++) {
		m = expect(rig.node, DMU_PLACED);
		CHECK(m.mark == i + 1 && m.count == 1 && m.device == 0 && !m.id &&
		      m.flags == DMU_WRITE && m.block == (i < 2 ? 3 + i : 30) &&
		      m.sector == PLACE(m.block));
	}
	finish_flush(&rig, g, 3);
	CHECK(stat_of("uncommitted") == 0);
	/* What is placed is so for good; what is not mapped, or not granted, is asked. */
	end(begin(&rig, WRITE_IT, 3 * BLOCK, 1, 6), 0);
	g = begin(&rig, WRITE_IT, 31 * BLOCK, 1, 6);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(g, EIO);
	g = begin(&rig, WRITE_IT, 32 * BLOCK, 1, 6);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(g, EIO);
	/* FUA is a write and a flush. */
	g = begin(&rig, WRITE_SYNC, 8 * BLOCK, 1, 6);
	CHECK(expect(rig.node, DMU_PLACED).block == 8);
	finish_flush(&rig, g, 4);
	rig_down(&rig);
}

/* Every question comes after the placements made before it; marks go on after them. */
static void grant_order(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g;

	granted_up(&rig, 100);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9), 0);
	g = begin(&rig, DISCARD_IT, 2 * BLOCK, 3 * BLOCK, 0);
	CHECK(expect(rig.node, DMU_PLACED).block == 3);
	m = expect(rig.node, DMU_DISCARD);
	CHECK(m.block == 2 && m.count == 3);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_DONE, .id = m.id, .count = 3 }) ==
	      0);
	end(g, 0);
	end(begin(&rig, WRITE_IT, 4 * BLOCK, 1, 9), 0);
	g = begin(&rig, WRITE_IT, 40 * BLOCK, BLOCK, 9);
	m = expect(rig.node, DMU_PLACED);
	CHECK(m.block == 4 && m.mark == 2);
	m = expect(rig.node, DMU_FAULT);
	/* One more, which the worker does not know of when it answers. */
	end(begin(&rig, WRITE_IT, 5 * BLOCK, 1, 9), 0);
	a = map(m.id, 40, 1, 0, PLACE(40), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 3;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.mark = 103;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	end(begin(&rig, WRITE_IT, 6 * BLOCK, 1, 9), 0);
	/* A run may not go over what was placed meanwhile. */
	CHECK(answer(rig.node, map(0, 0, 8, 1, 0, 0)) == -EEXIST);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect(rig.node, DMU_PLACED);
	CHECK(m.block == 5 && m.mark == 3);
	m = expect(rig.node, DMU_PLACED);
	CHECK(m.block == 6 && m.mark == 104);
	finish_flush(&rig, g, 104);
	rig_down(&rig);
}

/* So many may be untold; half of them are a message; then the worker is asked. */
static void grant_budget(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;
	unsigned int i;

	granted_up(&rig, 6);
	for (i = 0; i < 2; i++)
		end(begin(&rig, WRITE_IT, i * BLOCK, 1, 9), 0);
	expect_silence(rig.node);
	end(begin(&rig, WRITE_IT, 2 * BLOCK, 1, 9), 0);
	for (i = 0; i < 3; i++)
		CHECK(expect(rig.node, DMU_PLACED).block == i);
	expect_silence(rig.node);
	for (i = 3; i < 9; i++)
		end(begin(&rig, WRITE_IT, i * BLOCK, 1, 9), 0);
	g = begin(&rig, WRITE_IT, 9 * BLOCK, 1, 9);
	still_waits(g);
	for (i = 3; i < 9; i++)
		CHECK(expect(rig.node, DMU_PLACED).block == i);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 9);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(g, EIO);
	end(begin(&rig, WRITE_IT, 10 * BLOCK, 1, 9), 0);
	/* What is taken back is told at once, and the next is asked. */
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GRANT }) == 0);
	CHECK(expect(rig.node, DMU_PLACED).block == 10);
	g = begin(&rig, WRITE_IT, 11 * BLOCK, 1, 9);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(g, EIO);
	rig_down(&rig);
}

/* A worker's grant ends with it; its successor is told what was placed by the dump, once. */
static void grant_takeover(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;
	unsigned int i;

	granted_up(&rig, 4);
	for (i = 0; i < 3; i++)
		end(begin(&rig, WRITE_IT, i * BLOCK, 1, 9), 0);
	CHECK(expect(rig.node, DMU_PLACED).block == 0);
	close(rig.node);
	g = begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9);
	still_waits(g);
	end(begin(&rig, WRITE_IT, 2 * BLOCK, 1, 9), 0);
	rig.node = open(NODE, O_RDWR | O_CLOEXEC);
	CHECK(rig.node >= 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_DUMP }) == 0);
	for (i = 0; i < 3; i++) {
		m = expect(rig.node, DMU_UNCOMMITTED_IS);
		CHECK(m.block == i && m.mark == i + 1 && m.sector == PLACE(i));
	}
	CHECK(expect(rig.node, DMU_DUMP_DONE).mark == 3);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 3);
	CHECK(answer(rig.node, grant(0, 32, 4)) == 0);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(g, EIO);
	end(begin(&rig, WRITE_IT, 4 * BLOCK, 1, 9), 0);
	/* A dump tells what was not told yet, and then it is told. */
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_DUMP }) == 0);
	for (i = 0; i < 4; i++)
		CHECK(expect(rig.node, DMU_UNCOMMITTED_IS).mark == i + 1);
	expect(rig.node, DMU_DUMP_DONE);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	finish_flush(&rig, g, 4);
	rig_down(&rig);
}

static void grant_lies(void)
{
	struct rig rig = plain();
	struct dmu_answer a;

	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == 0);
	CHECK(answer(rig.node, grant(0, 65, 4)) == -ERANGE);
	CHECK(answer(rig.node, grant(64, 1, 4)) == -ERANGE);
	CHECK(answer(rig.node, grant(1, ~0ULL, 4)) == -ERANGE);
	CHECK(answer(rig.node, grant(0, 32, 0)) == -EINVAL);
	CHECK(answer(rig.node, grant(0, 32, DMU_MAX_BUDGET + 1)) == -EINVAL);
	a = grant(0, 32, 4);
	a.device = 2;
	CHECK(answer(rig.node, a) == -ENXIO);
	a.device = 1;
	CHECK(answer(rig.node, a) == -EROFS);
	a.device = DMU_DEVICE_ZERO;
	CHECK(answer(rig.node, a) == -EROFS);
	a.device = 0;
	a.sector = (64 + 32) * BLOCK * 2 - 32 * BLOCK + 1;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.sector = ~0ULL;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.sector = 0;
	a.flags = DMU_WRITABLE;
	CHECK(answer(rig.node, a) == -EINVAL);
	a.flags = 0;
	a.reserved[1] = 1;
	CHECK(answer(rig.node, a) == -EINVAL);
	/* None of them has granted anything. */
	{
		struct guest *g = begin(&rig, WRITE_IT, 0, 1, 9);
		struct dmu_message m = expect(rig.node, DMU_FAULT);

		CHECK(answer(rig.node, (struct dmu_answer){
			.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
		end(g, EIO);
	}
	rig_down(&rig);
}

/* A flush waits for what is under way, and so does an invalidation after a grant's end. */
static void grant_waits(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g, *h;

	rig.store_table = "delay %s 0 0 %1$s 0 1000";
	granted_up(&rig, 100);
	g = begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9);
	sleep_ms(50);
	h = begin(&rig, FLUSH_IT, 0, 1, 0);
	CHECK(!g->done);
	CHECK(expect(rig.node, DMU_PLACED).block == 3);
	CHECK(ended(g));
	end(g, 0);
	finish_flush(&rig, h, 1);
	g = begin(&rig, WRITE_IT, 4 * BLOCK, 1, 9);
	sleep_ms(50);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GRANT }) == 0);
	CHECK(answer(rig.node, invalidation(4, 1)) == 0);
	m = expect(rig.node, DMU_PLACED);
	CHECK(m.block == 4 && m.flags == (DMU_WRITE | DMU_IN_FLIGHT) && !g->done);
	expect(rig.node, DMU_INVALIDATE_DONE);
	CHECK(ended(g));
	end(g, 0);
	/* Requests to one block keep their order behind a placement. */
	CHECK(answer(rig.node, grant(0, 32, 100)) == 0);
	g = begin(&rig, WRITE_IT, 5 * BLOCK, 2, 1);
	sleep_ms(30);
	h = begin(&rig, WRITE_IT, 5 * BLOCK + 1, 2, 2);
	sleep_ms(30);
	still_waits(g);
	end(g, 0);
	end(h, 0);
	g = begin(&rig, READ_IT, 5 * BLOCK, BLOCK, 0);
	end(g, 0);
	check_fill(g, 0, SECTOR, 1);
	check_fill(g, SECTOR, 2 * SECTOR, 2);
	check_bytes(g, 3 * SECTOR, (BLOCK - 3) * SECTOR, 0, (5 * BLOCK + 3) * SECTOR);
	rig_down(&rig);
}

/* A placement that came to nothing fails its write, is told, and is not there for the flush. */
static void grant_failure(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;
	bool told = false;

	rig.store_table = "linear %s 0";
	granted_up(&rig, 100);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9), 0);
	CHECK(run("dmsetup load store --table '0 %d error' && dmsetup suspend store && "
		  "dmsetup resume store", (64 + 32) * BLOCK * 2) == 0, "%s", said());
	end(begin(&rig, WRITE_IT, 4 * BLOCK, 1, 9), EIO);
	while (next_message(rig.node, &m, 200)) {
		if (m.type == DMU_PLACED)
			CHECK(m.block == 3 || (m.block == 4 && m.mark == 2));
		else if (m.type == DMU_DEVICE_ERROR)
			CHECK(m.device == 0 && m.flags == DMU_WRITE && !told);
		else
			CHECK(m.type == DMU_MAP_ERROR && m.block == 4 && m.mark == 2 &&
			      m.code == EIO && !told);
		told |= m.type == DMU_MAP_ERROR;
	}
	CHECK(told && stat_of("uncommitted") == 1);
	CHECK(run("dmsetup load store --table '0 %d linear %s 0' && dmsetup suspend store && "
		  "dmsetup resume store", (64 + 32) * BLOCK * 2, rig.store_loop) == 0, "%s", said());
	/* Nothing is known of the block any more: it is asked. */
	g = begin(&rig, WRITE_IT, 4 * BLOCK, 1, 9);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(g, EIO);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	finish_flush(&rig, g, 2);
	rig_down(&rig);
}

/* A table without the place grants nothing; suspends lose nothing. */
static void grant_suspend(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;

	rig.store_table = "delay %s 0 0 %1$s 0 200";
	granted_up(&rig, 100);
	g = begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9);
	sleep_ms(50);
	CHECK(run("dmsetup suspend --noflush lab && dmsetup resume lab") == 0, "%s", said());
	end(g, 0);
	end(begin(&rig, WRITE_IT, 4 * BLOCK, 1, 9), 0);
	CHECK(stat_of("faults") == 0 && stat_of("granted") == 2);
	CHECK(run("dmsetup create small --table '0 512 zero' && "
		  "dmsetup load lab --table '0 %llu userspace lab %u 2 /dev/mapper/small ro:%s' && "
		  "dmsetup suspend lab && dmsetup resume lab", (unsigned long long)rig.sectors,
		  BLOCK, rig.base) == 0, "%s", said());
	g = begin(&rig, WRITE_IT, 5 * BLOCK, 1, 9);
	CHECK(expect(rig.node, DMU_PLACED).block == 3);
	CHECK(expect(rig.node, DMU_PLACED).block == 4);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(g, EIO);
	rig_down(&rig);
	CHECK(run("dmsetup remove small") == 0, "%s", said());
}

/*
 * Pools: first writes go to the next place there is, whichever block they are to.
 */

#define APART (2 * BLOCK)

static struct dmu_answer pool(uint64_t sector, uint32_t places)
{
	return (struct dmu_answer){
		.type = DMU_GRANT, .flags = DMU_POOL, .count = 32, .sector = sector,
		.from_sector = APART, .length = places,
	};
}

static void pooled_up(struct rig *rig, uint32_t places)
{
	rig_up(rig);
	CHECK(answer(rig->node, (struct dmu_answer){ .type = DMU_GET_VERSION }) == 0);
	CHECK(expect(rig->node, DMU_VERSION_IS).flags & DMU_TAKES_POOLS);
	CHECK(answer(rig->node, map(0, 0, 64, 1, 0, 0)) == 0);
	CHECK(answer(rig->node, pool(0, places)) == 0);
}

static void expect_placed(struct rig *rig, uint64_t block, uint64_t sector, uint64_t mark)
{
	struct dmu_message m = expect(rig->node, DMU_PLACED);

	CHECK(m.block == block && m.sector == sector && m.mark == mark && m.device == 0 &&
	      m.count == 1, "block %llu sector %llu mark %llu", (unsigned long long)m.block,
	      (unsigned long long)m.sector, (unsigned long long)m.mark);
}

static void refuse_fault(struct rig *rig, struct guest *guest, uint64_t block)
{
	struct dmu_message m = expect(rig->node, DMU_FAULT);

	CHECK(m.block == block);
	CHECK(answer(rig->node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(guest, EIO);
}

/* Places in their order; told when half are used; the next pool follows; without one it asks. */
static void pool_places(void)
{
	static const uint64_t blocks[] = { 9, 3, 30, 4 };
	struct rig rig = plain();
	struct guest *g;
	unsigned int i;

	pooled_up(&rig, 4);
	end(begin(&rig, WRITE_IT, 9 * BLOCK + 5, 2, 9), 0);
	expect_silence(rig.node);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 8), 0);
	/* Of four two are left. */
	expect_placed(&rig, 9, 0, 1);
	expect_placed(&rig, 3, APART, 2);
	CHECK(answer(rig.node, pool(8 * APART, 3)) == 0);
	CHECK(answer(rig.node, pool(16 * APART, 3)) == -ENOBUFS);
	for (i = 2; i < 4; i++)
		end(begin(&rig, WRITE_IT, blocks[i] * BLOCK, 1, 7), 0);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, 1, 6), 0);
	end(begin(&rig, WRITE_IT, 5 * BLOCK, 1, 5), 0);
	g = begin(&rig, READ_IT, 9 * BLOCK, BLOCK, 0);
	end(g, 0);
	check_bytes(g, 0, 5 * SECTOR, 0, 9 * BLOCK * SECTOR);
	check_fill(g, 5 * SECTOR, 2 * SECTOR, 9);
	check_bytes(g, 7 * SECTOR, (BLOCK - 7) * SECTOR, 0, (9 * BLOCK + 7) * SECTOR);
	peek(rig.store, APART, BLOCK, g->data);
	check_fill(g, 0, SECTOR, 6);
	check_fill(g, SECTOR, (BLOCK - 1) * SECTOR, 8);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	expect_placed(&rig, 30, 2 * APART, 3);
	expect_placed(&rig, 4, 3 * APART, 4);
	expect_placed(&rig, 5, 8 * APART, 5);
	finish_flush(&rig, g, 5);
	/* The second has begun, so a third may wait; both are used up, and the worker is asked. */
	CHECK(answer(rig.node, pool(16 * APART, 1)) == 0);
	for (i = 10; i < 13; i++)
		end(begin(&rig, WRITE_IT, i * BLOCK, 1, 9), 0);
	g = begin(&rig, WRITE_IT, 13 * BLOCK, 1, 9);
	expect_placed(&rig, 10, 9 * APART, 6);
	expect_placed(&rig, 11, 10 * APART, 7);
	expect_placed(&rig, 12, 16 * APART, 8);
	refuse_fault(&rig, g, 13);
	/* Outside the run, and past the end of it. */
	CHECK(answer(rig.node, pool(20 * APART, 1)) == 0);
	g = begin(&rig, WRITE_IT, 32 * BLOCK, 1, 9);
	refuse_fault(&rig, g, 32);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GRANT }) == 0);
	g = begin(&rig, WRITE_IT, 14 * BLOCK, 1, 9);
	refuse_fault(&rig, g, 14);
	rig_down(&rig);
}

/* An answer without a mark is given the one after the last, and is told which. */
static void marks_given(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g;

	pooled_up(&rig, 8);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9), 0);
	g = begin(&rig, WRITE_IT, 40 * BLOCK, BLOCK, 9);
	expect_placed(&rig, 3, 0, 1);
	m = expect(rig.node, DMU_FAULT);
	/* One more meanwhile, which the worker does not know of when it answers. */
	end(begin(&rig, WRITE_IT, 4 * BLOCK, 1, 9), 0);
	a = map(m.id, 40, 1, 0, PLACE(40), DMU_WRITABLE | DMU_HOLD_FLUSH);
	CHECK(write(rig.node, &a, sizeof(a)) < 0 && errno == ERANGE);
	CHECK(answers(rig.node, &a, 1) == 0 && a.mark == 3, "mark %llu",
	      (unsigned long long)a.mark);
	end(g, 0);
	/* So is one that nobody asked for; and who gives it himself has it as it is. */
	a = map(0, 50, 1, 0, PLACE(50), DMU_WRITABLE | DMU_HOLD_FLUSH);
	CHECK(answers(rig.node, &a, 1) == 0 && a.mark == 4);
	a = map(0, 51, 1, 0, PLACE(51), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 9;
	CHECK(answers(rig.node, &a, 1) == 0 && a.mark == 9);
	a = map(0, 51, 1, 0, PLACE(53), DMU_WRITABLE | DMU_HOLD_FLUSH);
	CHECK(answers(rig.node, &a, 1) == 1 && a.result == -EEXIST && a.mark == 0);
	/* A discard has one, too. */
	g = begin(&rig, ZERO_IT, 45 * BLOCK, BLOCK, 0);
	expect_placed(&rig, 4, APART, 2);
	m = expect(rig.node, DMU_DISCARD);
	a = map(m.id, 45, 1, 0, PLACE(45), DMU_WRITABLE | DMU_HOLD_FLUSH);
	CHECK(answers(rig.node, &a, 1) == 0 && a.mark == 10);
	end(g, 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	finish_flush(&rig, g, 10);
	rig_down(&rig);
}

static void pool_lies(void)
{
	uint64_t size = (64 + 32) * BLOCK * 2;	/* of the store */
	struct rig rig = plain();
	struct dmu_answer a;
	struct guest *g;

	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == 0);
	CHECK(answer(rig.node, pool(0, 0)) == -EINVAL);
	CHECK(answer(rig.node, pool(0, DMU_MAX_BUDGET + 1)) == -EINVAL);
	CHECK(answer(rig.node, pool(size - APART, 2)) == -ERANGE);
	CHECK(answer(rig.node, pool(~0ULL, 1)) == -ERANGE);
	CHECK(answer(rig.node, pool(~0ULL - APART + 1, 2)) == -ERANGE);
	a = pool(0, 2);
	a.from_sector = BLOCK - 1;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.from_sector = ~0ULL;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.from_sector = 1ULL << 57;
	CHECK(answer(rig.node, a) == -ERANGE);
	a = pool(0, 2);
	a.device = 1;
	CHECK(answer(rig.node, a) == -EROFS);
	a.device = DMU_DEVICE_ZERO;
	CHECK(answer(rig.node, a) == -EROFS);
	a = pool(0, 2);
	a.count = 65;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.count = 0;
	CHECK(answer(rig.node, a) == -EINVAL);
	/* It says nothing of a mapping. */
	a = map(0, 1, 1, 0, PLACE(1), DMU_WRITABLE | DMU_POOL);
	CHECK(answer(rig.node, a) == -EINVAL);
	g = begin(&rig, WRITE_IT, 0, 1, 9);
	refuse_fault(&rig, g, 0);
	/* The last place may be just as long as a block; a row takes the place of a pool. */
	CHECK(answer(rig.node, pool(size - APART - BLOCK, 2)) == 0);
	CHECK(answer(rig.node, grant(0, 32, 4)) == 0);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9), 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	expect_placed(&rig, 3, PLACE(3), 1);
	finish_flush(&rig, g, 1);
	rig_down(&rig);
}

/* A place that failed is not taken again; a table that lacks the places ends the pool. */
static void pool_failure(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;
	bool told = false;

	rig.store_table = "linear %s 0";
	pooled_up(&rig, 16);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9), 0);
	CHECK(run("dmsetup load store --table '0 %d error' && dmsetup suspend store && "
		  "dmsetup resume store", (64 + 32) * BLOCK * 2) == 0, "%s", said());
	end(begin(&rig, WRITE_IT, 4 * BLOCK, 1, 9), EIO);
	CHECK(run("dmsetup load store --table '0 %d linear %s 0' && dmsetup suspend store && "
		  "dmsetup resume store", (64 + 32) * BLOCK * 2, rig.store_loop) == 0, "%s", said());
	end(begin(&rig, WRITE_IT, 5 * BLOCK, 1, 9), 0);
	while (!told || stat_of("uncommitted") != 2) {
		CHECK(next_message(rig.node, &m, 2000));
		told |= m.type == DMU_MAP_ERROR && m.block == 4 && m.mark == 2;
		if (m.type == DMU_PLACED)
			CHECK(m.sector == (m.block - 3) * APART);
	}
	CHECK(run("dmsetup create small --table '0 32 linear %s 0' && "
		  "dmsetup load lab --table '0 %llu userspace lab %u 2 /dev/mapper/small ro:%s' && "
		  "dmsetup suspend lab && dmsetup resume lab", rig.store_loop,
		  (unsigned long long)rig.sectors, BLOCK, rig.base) == 0, "%s", said());
	g = begin(&rig, WRITE_IT, 6 * BLOCK, 1, 9);
	while (next_message(rig.node, &m, 2000) && m.type != DMU_FAULT)
		CHECK(m.type == DMU_PLACED || m.type == DMU_DEVICE_ERROR);
	CHECK(m.type == DMU_FAULT && m.block == 6);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(g, EIO);
	rig_down(&rig);
	CHECK(run("dmsetup remove small") == 0, "%s", said());
}

/* A pool ends with its worker; the next one hears of what went there. */
static void pool_takeover(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;

	pooled_up(&rig, 8);
	end(begin(&rig, WRITE_IT, 7 * BLOCK, 1, 9), 0);
	end(begin(&rig, WRITE_IT, 2 * BLOCK, 1, 9), 0);
	close(rig.node);
	g = begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9);
	still_waits(g);
	rig.node = open(NODE, O_RDWR | O_CLOEXEC);
	CHECK(rig.node >= 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_DUMP }) == 0);
	m = expect(rig.node, DMU_UNCOMMITTED_IS);
	CHECK(m.block == 7 && m.sector == 0 && m.mark == 1);
	m = expect(rig.node, DMU_UNCOMMITTED_IS);
	CHECK(m.block == 2 && m.sector == APART && m.mark == 2);
	CHECK(expect(rig.node, DMU_DUMP_DONE).mark == 2);
	refuse_fault(&rig, g, 3);
	CHECK(answer(rig.node, pool(4 * APART, 8)) == 0);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9), 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	expect_placed(&rig, 3, 4 * APART, 3);
	finish_flush(&rig, g, 3);
	rig_down(&rig);
}

const struct scenario grant_scenarios[] = {
	{ "grant-places", grant_places },
	{ "grant-order", grant_order },
	{ "grant-budget", grant_budget },
	{ "grant-takeover", grant_takeover },
	{ "grant-lies", grant_lies },
	{ "grant-waits", grant_waits },
	{ "grant-failure", grant_failure },
	{ "grant-suspend", grant_suspend },
	{ "pool-places", pool_places },
	{ "pool-marks", marks_given },
	{ "pool-lies", pool_lies },
	{ "pool-failure", pool_failure },
	{ "pool-takeover", pool_takeover },
	{ 0 },
};
