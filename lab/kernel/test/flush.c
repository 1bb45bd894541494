// SPDX-License-Identifier: Apache-2.0
/* The rules of the contract that concern flushes, chains, invalidations, discards, short ends. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "lab.h"

#define BLOCK 16

static struct rig plain(void)
{
	return (struct rig){ .block = BLOCK, .sectors = 64 * BLOCK };
}

/* Blocks of the disk live at the same place plus so many sectors in the store. */
#define PLACE(block) (32 * BLOCK + (block) * BLOCK)

static void flush_commit(void)
{
	struct rig rig = plain();
	struct dmu_message m, f;
	struct dmu_answer a;
	struct guest *g, *h;

	rig_up(&rig);
	/* Nothing uncommitted: no message. */
	end(begin(&rig, FLUSH_IT, 0, 1, 0), 0);
	expect_silence(rig.node);
	g = begin(&rig, WRITE_IT, 3 * BLOCK, 2, 9);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 3, 1, 0, PLACE(3), DMU_WRITABLE | DMU_ZERO_FIRST | DMU_HOLD_FLUSH);
	a.mark = DMU_MAX_MARK + 1;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.mark = 5;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	f = expect(rig.node, DMU_FLUSH);
	CHECK(f.mark == 5 && f.id);
	still_waits(g);
	/* What comes now belongs to the next one. */
	h = begin(&rig, WRITE_IT, 4 * BLOCK, BLOCK, 8);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 4, 1, 0, PLACE(4), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 5;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.mark = 6;
	CHECK(answer(rig.node, a) == 0);
	end(h, 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = f.id + 77 }) ==
	      -ENOENT);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = f.id }) == 0);
	end(g, 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = f.id }) ==
	      -ENOENT);
	CHECK(stat_of("uncommitted") == 1);
	/* A write with FUA asks as a flush does. */
	h = begin(&rig, WRITE_SYNC, 4 * BLOCK, 1, 7);
	f = expect(rig.node, DMU_FLUSH);
	CHECK(f.mark == 6);
	still_waits(h);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = f.id }) == 0);
	end(h, 0);
	end(begin(&rig, WRITE_SYNC, 4 * BLOCK, 1, 6), 0);
	/* A refused commit fails the flush and stays uncommitted; the next flush asks again. */
	h = begin(&rig, WRITE_IT, 6 * BLOCK, BLOCK, 8);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 6, 1, 0, PLACE(6), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 9;
	CHECK(answer(rig.node, a) == 0);
	end(h, 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	f = expect(rig.node, DMU_FLUSH);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = f.id, .code = ENOSPC }) == 0);
	end(g, ENOSPC);
	CHECK(stat_of("uncommitted") == 1);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	f = expect(rig.node, DMU_FLUSH);
	/* With EIO what the worker wrote may be lost: that stands, as of a device. */
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = f.id, .code = EIO }) == 0);
	end(g, EIO);
	CHECK(stat_of("uncommitted") == 1);
	end(begin(&rig, FLUSH_IT, 0, 1, 0), EIO);
	CHECK(expect(rig.node, DMU_FLUSH_FAILED).code == EIO);
	expect_silence(rig.node);
	CHECK(run("dmsetup message lab 0 clear_error") == 0);
	CHECK(expect(rig.node, DMU_FLUSH_FAILED).code == 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	f = expect(rig.node, DMU_FLUSH);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = f.id }) == 0);
	end(g, 0);
	rig_down(&rig);
}

/* The flush waits for the data of what was answered before it. */
static void flush_waits_for_data(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g, *f;

	rig.store_table = "delay %s 0 0 %1$s 0 400";
	rig_up(&rig);
	g = begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 9);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 3, 1, 0, PLACE(3), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 1;
	CHECK(answer(rig.node, a) == 0);
	f = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect(rig.node, DMU_FLUSH);
	CHECK(g->done && m.mark == 1);
	end(g, 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(f, 0);
	rig_down(&rig);
}

/* Places a block by a write of it, with a mark that is not committed. */
static void place(struct rig *rig, unsigned int block, uint64_t mark)
{
	struct guest *g = begin(rig, WRITE_IT, block * BLOCK, BLOCK, 1);
	struct dmu_message m = expect(rig->node, DMU_FAULT);
	struct dmu_answer a = map(m.id, block, 1, 0, PLACE(block),
				  DMU_WRITABLE | DMU_HOLD_FLUSH);

	a.mark = mark;
	CHECK(m.block == block && answer(rig->node, a) == 0);
	end(g, 0);
}

static void check_sector(struct rig *rig, uint64_t sector, uint8_t fill)
{
	struct guest *g = begin(rig, READ_IT, sector, 1, 0);

	while (!g->done)
		sleep_ms(1);
	check_fill(g, 0, SECTOR, fill);
	end(g, 0);
}

/*
 * A suspend gives back a forced write that waits for its commit. It is written once more, but not
 * over what came upon it meanwhile, which has waited. It ends only with a commit. Of the second one,
 * which is cut in two, only the first half was written.
 */
static void forced_over_suspend(void)
{
	struct rig rig = plain();
	struct dmu_message m, f;
	struct dmu_answer a;
	struct guest *g, *h, *over_g, *over_h;
	int i;

	rig_up(&rig);
	place(&rig, 3, 1);
	place(&rig, 4, 2);
	g = begin(&rig, WRITE_SYNC, 3 * BLOCK + 4, 4, 7);
	f = expect(rig.node, DMU_FLUSH);
	h = begin(&rig, WRITE_SYNC, 5 * BLOCK - 2, 4, 8);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 5);
	sleep_ms(50);
	check_sector(&rig, 3 * BLOCK + 5, 7);
	end(begin(&rig, WRITE_IT, 3 * BLOCK + 8, 1, 10), 0);
	over_g = begin(&rig, WRITE_IT, 3 * BLOCK + 5, 1, 9);
	over_h = begin(&rig, WRITE_IT, 5 * BLOCK - 1, 1, 6);
	still_waits(g);
	still_waits(h);
	still_waits(over_g);
	still_waits(over_h);
	for (i = 0; i < 2; i++)
		CHECK(run("dmsetup suspend --noflush --nolockfs lab && dmsetup resume lab") == 0,
		      "%s", said());
	still_waits(g);
	still_waits(h);
	still_waits(over_g);
	still_waits(over_h);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = f.id }) == 0);
	end(g, 0);
	end(over_g, 0);
	end(over_h, 0);
	/* Who wanted the answer to the old question has left, and asks again. */
	a = map(m.id, 5, 1, 0, PLACE(5), DMU_WRITABLE | DMU_ZERO_FIRST | DMU_HOLD_FLUSH);
	a.mark = 3;
	CHECK(answer(rig.node, a) == 0);
	CHECK(expect(rig.node, DMU_MAP_ERROR).code == ECANCELED);
	a.id = expect(rig.node, DMU_FAULT).id;
	a.mark = 4;
	CHECK(answer(rig.node, a) == 0);
	f = expect(rig.node, DMU_FLUSH);
	CHECK(f.mark == 4);
	still_waits(h);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = f.id }) == 0);
	end(h, 0);
	check_sector(&rig, 3 * BLOCK + 4, 7);
	check_sector(&rig, 3 * BLOCK + 5, 9);
	check_sector(&rig, 3 * BLOCK + 6, 7);
	check_sector(&rig, 5 * BLOCK - 2, 8);
	check_sector(&rig, 5 * BLOCK - 1, 6);
	check_sector(&rig, 5 * BLOCK, 8);
	/* With nothing uncommitted it goes as it is. */
	g = begin(&rig, WRITE_SYNC, 3 * BLOCK + 4, 4, 5);
	end(g, 0);
	check_sector(&rig, 3 * BLOCK + 4, 5);
	rig_down(&rig);
}

static void sync_done(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g;

	rig_up(&rig);
	g = begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 3, 1, 0, PLACE(3),
		DMU_WRITABLE | DMU_ZERO_FIRST | DMU_SYNC | DMU_HOLD_FLUSH);
	a.mark = 3;
	CHECK(answer(rig.node, a) == 0);
	m = expect(rig.node, DMU_SYNC_DONE);
	CHECK(m.block == 3 && m.mark == 3);
	end(g, 0);
	rig_down(&rig);
}

static void linked(void)
{
	struct rig rig = plain();
	struct dmu_answer list[3];
	struct dmu_message m;
	struct guest *g;
	uint8_t *bytes, seen[2 * SECTOR];

	CHECK(posix_memalign((void **)&bytes, 4096, 4096) == 0);
	memset(bytes, 0xc7, 4096);
	rig_up(&rig);
	g = begin(&rig, WRITE_IT, 3 * BLOCK, 1, 9);
	m = expect(rig.node, DMU_FAULT);
	list[0] = map(m.id, 3, 1, 0, PLACE(3), DMU_WRITABLE | DMU_ZERO_FIRST | DMU_LINKED);
	list[1] = (struct dmu_answer){
		.type = DMU_DATA, .address = (uintptr_t)bytes, .length = 2 * SECTOR, .sector = 4,
	};
	list[2] = (struct dmu_answer){ .type = DMU_GET_VERSION };
	CHECK(answers(rig.node, list, 3) == 0, "%d %d", list[0].result, list[1].result);
	end(g, 0);
	peek(rig.store, 4, 2, seen);
	CHECK(!memcmp(seen, bytes, sizeof(seen)));
	m = expect(rig.node, DMU_VERSION_IS);
	CHECK(m.version == DMU_VERSION && m.block_sectors == BLOCK && m.device == 2 &&
	      m.count == rig.sectors);
	/* A member that is refused takes the chain with it, and the write. */
	g = begin(&rig, WRITE_IT, 4 * BLOCK, 1, 9);
	m = expect(rig.node, DMU_FAULT);
	list[0] = map(m.id, 4, 1, 0, PLACE(4), DMU_WRITABLE | DMU_ZERO_FIRST | DMU_LINKED);
	list[1].device = 7;
	list[1].flags = DMU_LINKED;
	CHECK(answers(rig.node, list, 3) == 2);
	CHECK(list[1].result == -ENXIO && list[2].result == -ECANCELED);
	end(g, EIO);
	m = expect(rig.node, DMU_MAP_ERROR);
	CHECK(m.block == 4);
	rig_down(&rig);
}

/* INVALIDATE_DONE comes when the slow write on the old place has ended, not before. */
static void invalidate(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;

	rig.store_table = "delay %s 0 0 %1$s 0 1000";
	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 64, 0, 0, DMU_WRITABLE)) == 0);
	g = begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 9);
	sleep_ms(50);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_INVALIDATE, .block = 2, .count = 3 }) == 0);
	m = expect(rig.node, DMU_INVALIDATE_DONE);
	CHECK(m.block == 2 && m.count == 3);
	CHECK(ended(g));
	end(g, 0);
	g = begin(&rig, READ_IT, BLOCK, 5 * BLOCK, 0);
	while (!g->done) {
		if (!next_message(rig.node, &m, 100))
			continue;
		CHECK(m.type == DMU_FAULT && m.block >= 2 && m.block <= 4);
		CHECK(answer(rig.node, map(m.id, m.block, 1, 1, m.block * BLOCK, 0)) == 0);
	}
	end(g, 0);
	check_bytes(g, BLOCK * SECTOR, 3 * BLOCK * SECTOR, 0, 2 * BLOCK * SECTOR);
	check_bytes(g, 0, BLOCK * SECTOR, 1, BLOCK * SECTOR);
	rig_down(&rig);
}

static void discards(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;

	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == 0);
	/* Parts of blocks are nobody's business; the whole ones are one run. */
	g = begin(&rig, DISCARD_IT, 2 * BLOCK + 4, 3 * BLOCK, 0);
	m = expect(rig.node, DMU_DISCARD);
	CHECK(m.block == 3 && m.count == 2 && !(m.flags & DMU_ZEROING));
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_DONE, .id = m.id, .count = 3 }) == -ERANGE);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_DONE, .id = m.id, .count = 1 }) == 0);
	m = expect(rig.node, DMU_DISCARD);
	CHECK(m.block == 4 && m.count == 1);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_DONE, .id = m.id, .count = 1 }) == 0);
	end(g, 0);
	/* Zeroes: whole blocks are placed and zeroed there. */
	g = begin(&rig, ZERO_IT, 8 * BLOCK, 4 * BLOCK, 0);
	m = expect(rig.node, DMU_DISCARD);
	CHECK(m.block == 8 && m.count == 4 && (m.flags & DMU_ZEROING));
	CHECK(answer(rig.node, map(m.id, 8, 4, 0, PLACE(8), DMU_WRITABLE)) == 0);
	end(g, 0);
	g = begin(&rig, READ_IT, 7 * BLOCK, 6 * BLOCK, 1);
	end(g, 0);
	check_bytes(g, 0, BLOCK * SECTOR, 0, 7 * BLOCK * SECTOR);
	check_fill(g, BLOCK * SECTOR, 4 * BLOCK * SECTOR, 0);
	check_bytes(g, 5 * BLOCK * SECTOR, BLOCK * SECTOR, 0, 12 * BLOCK * SECTOR);
	/* A part of a block is zeroed as it would be written. */
	g = begin(&rig, ZERO_IT, 20 * BLOCK + 3, 2, 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 20 && m.flags == DMU_WRITE);
	{
		struct dmu_answer a = map(m.id, 20, 1, 0, PLACE(20), DMU_WRITABLE | DMU_COPY_FIRST);

		a.from_device = 1;
		a.from_sector = 20 * BLOCK;
		CHECK(answer(rig.node, a) == 0);
	}
	end(g, 0);
	end(begin(&rig, ZERO_IT, 20 * BLOCK + 7, 2, 0), 0);
	g = begin(&rig, READ_IT, 20 * BLOCK, BLOCK, 1);
	end(g, 0);
	check_bytes(g, 0, 3 * SECTOR, 0, 20 * BLOCK * SECTOR);
	check_fill(g, 3 * SECTOR, 2 * SECTOR, 0);
	check_bytes(g, 5 * SECTOR, 2 * SECTOR, 0, (20 * BLOCK + 5) * SECTOR);
	check_fill(g, 7 * SECTOR, 2 * SECTOR, 0);
	expect_silence(rig.node);
	rig_down(&rig);
}

/* The base ends early, and so does the last block of the disk. */
static void short_ends(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g;

	rig.sectors = 10 * BLOCK + 5;
	rig.base_sectors = 8 * BLOCK + 3;
	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 11, 1, 0, 0)) == 0);
	CHECK(answer(rig.node, map(0, 0, 12, 1, 0, 0)) == -ERANGE);
	g = begin(&rig, READ_IT, 0, 10 * BLOCK + 5, 1);
	end(g, 0);
	check_bytes(g, 0, (8 * BLOCK + 3) * SECTOR, 0, 0);
	check_fill(g, (8 * BLOCK + 3) * SECTOR, (BLOCK + BLOCK - 3 + 5) * SECTOR, 0);
	g = begin(&rig, WRITE_IT, 8 * BLOCK + 1, 1, 4);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 8, 1, 0, PLACE(8), DMU_WRITABLE | DMU_COPY_FIRST);
	a.from_device = 1;
	a.from_sector = 8 * BLOCK;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	g = begin(&rig, WRITE_IT, 10 * BLOCK, 5, 4);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.flags == (DMU_WRITE | DMU_WHOLE));
	CHECK(answer(rig.node, map(m.id, 10, 1, 0, PLACE(10), DMU_WRITABLE)) == 0);
	end(g, 0);
	g = begin(&rig, READ_IT, 8 * BLOCK, 2 * BLOCK + 5, 1);
	end(g, 0);
	check_bytes(g, 0, SECTOR, 0, 8 * BLOCK * SECTOR);
	check_fill(g, SECTOR, SECTOR, 4);
	check_bytes(g, 2 * SECTOR, SECTOR, 0, (8 * BLOCK + 2) * SECTOR);
	check_fill(g, 3 * SECTOR, (2 * BLOCK - 3) * SECTOR, 0);
	check_fill(g, 2 * BLOCK * SECTOR, 5 * SECTOR, 4);
	/* A waiting read that crosses the end of the base. */
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_INVALIDATE, .block = 0, .count = 11 }) == 0);
	expect(rig.node, DMU_INVALIDATE_DONE);
	g = begin(&rig, READ_IT, 8 * BLOCK, BLOCK, 1);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, map(m.id, 8, 1, 1, 8 * BLOCK, 0)) == 0);
	end(g, 0);
	check_bytes(g, 0, 3 * SECTOR, 0, 8 * BLOCK * SECTOR);
	check_fill(g, 3 * SECTOR, (BLOCK - 3) * SECTOR, 0);
	rig_down(&rig);
}

/* What nobody flushes is committed after a while, and again when that has not succeeded. */
static void commit_in_time(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	uint64_t start;

	rig_up(&rig);
	a = map(0, 3, 1, 0, PLACE(3), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 3;
	start = now_ms();
	CHECK(answer(rig.node, a) == 0);
	expect_silence(rig.node);
	m = expect(rig.node, DMU_FLUSH);
	CHECK(m.mark == 3 && now_ms() - start >= 4000, "after %llu ms",
	      (unsigned long long)(now_ms() - start));
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = ENOSPC }) == 0);
	expect_silence(rig.node);
	m = expect(rig.node, DMU_FLUSH);
	CHECK(m.mark == 3);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	CHECK(stat_of("uncommitted") == 0);
	CHECK(!next_message(rig.node, &m, 8000), "a message of type %u", m.type);
	rig_down(&rig);
}

const struct scenario more_rule_scenarios[] = {
	{ "commit-in-time", commit_in_time },
	{ "flush-commit", flush_commit },
	{ "flush-waits-for-data", flush_waits_for_data },
	{ "forced-over-suspend", forced_over_suspend },
	{ "sync-done", sync_done },
	{ "linked", linked },
	{ "invalidate", invalidate },
	{ "discards", discards },
	{ "short-ends", short_ends },
	{ 0 },
};
