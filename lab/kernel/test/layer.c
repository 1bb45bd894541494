// SPDX-License-Identifier: Apache-2.0
/* Layers: blocks with one place each, first writes to them, and how the worker hears of those. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "lab.h"

#define BLOCK 16
#define BLOCKS 100
#define PLACE(block) (32 * BLOCK + (block) * BLOCK)
#define BIT(block) (1ULL << ((block) % 64))

static struct rig plain(void)
{
	return (struct rig){ .block = BLOCK, .sectors = BLOCKS * BLOCK };
}

static struct dmu_answer layer(uint64_t count)
{
	return (struct dmu_answer){ .type = DMU_LAYER, .count = count, .sector = PLACE(0) };
}

static struct dmu_answer bits(uint64_t block, uint64_t count, const uint64_t *words)
{
	return (struct dmu_answer){ .type = DMU_BITS, .block = block, .count = count,
				    .address = (uintptr_t)words };
}

static struct dmu_answer grant(void)
{
	return (struct dmu_answer){ .type = DMU_GRANT, .count = BLOCKS, .sector = PLACE(0),
				    .length = 100 };
}

/* Everything is read from the base, and has its place in the store. */
static void layered_up(struct rig *rig)
{
	rig_up(rig);
	CHECK(answer(rig->node, layer(BLOCKS)) == 0);
	CHECK(answer(rig->node, map(0, 0, BLOCKS, 1, 0, 0)) == 0);
	CHECK(answer(rig->node, grant()) == 0);
}

/* What the worker was told on its way to a message. */
struct told {
	uint64_t present[2];	/* bits */
	uint64_t placed[2];
	uint64_t mark;		/* of the bits, the last */
};

/* The next message of that type, which is not a flush that only time has caused. */
static struct dmu_message expect_after(struct rig *rig, uint32_t type, struct told *told)
{
	struct dmu_message m;

	memset(told, 0, sizeof(*told));
	for (;;) {
		CHECK(next_message(rig->node, &m, 20000), "no message of type %u", type);
		if (put_off(rig->node, &m, type))
			continue;
		if (m.type == type)
			return m;
		if (m.type == DMU_PLACED) {
			told->placed[m.block / 64] |= BIT(m.block);
			continue;
		}
		CHECK(m.type == DMU_PRESENT && m.block % 64 == 0 && m.count == 64 && !m.id &&
		      m.sector, "type %u", m.type);
		told->present[m.block / 64] |= m.sector;
		told->mark = m.mark;
	}
}

/* The question of a flush, before which is told what has become present, under its mark. */
static struct dmu_message expect_flush(struct rig *rig, struct guest *flush, uint64_t low,
				       uint64_t high)
{
	struct told told;
	struct dmu_message m = expect_after(rig, DMU_FLUSH, &told);

	CHECK(told.present[0] == low && told.present[1] == high && told.mark == m.mark,
	      "bits %llx %llx mark %llu of %llu", (unsigned long long)told.present[0],
	      (unsigned long long)told.present[1], (unsigned long long)told.mark,
	      (unsigned long long)m.mark);
	still_waits(flush);
	return m;
}

static void finish_flush(struct rig *rig, struct guest *flush, uint64_t low, uint64_t high)
{
	uint64_t id = expect_flush(rig, flush, low, high).id;

	CHECK(answer(rig->node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = id }) == 0);
	end(flush, 0);
}

static void fail_it(struct rig *rig, uint64_t id, int code)
{
	CHECK(answer(rig->node, (struct dmu_answer){
		.type = DMU_FAIL, .id = id, .code = code }) == 0);
}

static struct guest *read_blocks(struct rig *rig, uint64_t block, uint64_t count)
{
	struct guest *g = begin(rig, READ_IT, block * BLOCK, count * BLOCK, 0);

	end(g, 0);
	return g;
}

/* Whole blocks are written without a question, a copy or a placement; parts by a cell. */
static void layer_touch(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct told told;
	struct guest *g;

	layered_up(&rig);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GET_VERSION }) == 0);
	CHECK(expect(rig.node, DMU_VERSION_IS).flags & DMU_TAKES_LAYERS);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 9), 0);
	end(begin(&rig, WRITE_IT, 62 * BLOCK, 4 * BLOCK, 8), 0);
	CHECK(stat_of("faults") == 0 && stat_of("copies") == 0 && stat_of("granted") == 5 &&
	      stat_of("uncommitted") == 5 && stat_of("waiting") == 0);
	/* Both ends of it are parts of blocks. */
	end(begin(&rig, WRITE_IT, 10 * BLOCK + 4, 3 * BLOCK, 7), 0);
	CHECK(stat_of("faults") == 0 && stat_of("copies") == 2 && stat_of("granted") == 9 &&
	      stat_of("uncommitted") == 9);
	/* What is there is written as it comes, and is no news. */
	end(begin(&rig, WRITE_IT, 3 * BLOCK + 2, 2, 6), 0);
	CHECK(stat_of("granted") == 9 && stat_of("copies") == 2);
	g = read_blocks(&rig, 2, 3);
	check_bytes(g, 0, BLOCK * SECTOR, 0, 2 * BLOCK * SECTOR);
	check_fill(g, BLOCK * SECTOR, 2 * SECTOR, 9);
	check_fill(g, (BLOCK + 2) * SECTOR, 2 * SECTOR, 6);
	check_fill(g, (BLOCK + 4) * SECTOR, (BLOCK - 4) * SECTOR, 9);
	check_bytes(g, 2 * BLOCK * SECTOR, BLOCK * SECTOR, 0, 4 * BLOCK * SECTOR);
	g = read_blocks(&rig, 10, 4);
	check_bytes(g, 0, 4 * SECTOR, 0, 10 * BLOCK * SECTOR);
	check_fill(g, 4 * SECTOR, 3 * BLOCK * SECTOR, 7);
	check_bytes(g, (3 * BLOCK + 4) * SECTOR, (BLOCK - 4) * SECTOR, 0,
		    (13 * BLOCK + 4) * SECTOR);
	peek(rig.store, PLACE(62), 4 * BLOCK, g->data);
	check_fill(g, 0, 4 * BLOCK * SECTOR, 8);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect_after(&rig, DMU_FLUSH, &told);
	/* What comes while a cell stands in its MiB is a cell, too. */
	CHECK((told.placed[0] & (BIT(10) | BIT(13))) == (BIT(10) | BIT(13)) && !told.placed[1] &&
	      !(told.placed[0] & told.present[0]));
	CHECK((told.present[0] | told.placed[0]) ==
	      (BIT(3) | BIT(10) | BIT(11) | BIT(12) | BIT(13) | BIT(62) | BIT(63)));
	CHECK(told.present[1] == (BIT(64) | BIT(65)) && told.mark == m.mark);
	still_waits(g);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(g, 0);
	CHECK(stat_of("uncommitted") == 0);
	/* Nothing is left to commit; a forced write to what is fresh has. */
	end(begin(&rig, FLUSH_IT, 0, 1, 0), 0);
	end(begin(&rig, WRITE_SYNC, 3 * BLOCK, BLOCK, 5), 0);
	g = begin(&rig, WRITE_SYNC, 20 * BLOCK, BLOCK, 5);
	finish_flush(&rig, g, BIT(20), 0);
	end(begin(&rig, WRITE_IT, 21 * BLOCK, BLOCK, 5), 0);
	g = begin(&rig, WRITE_SYNC, 21 * BLOCK, 1, 4);
	finish_flush(&rig, g, BIT(21), 0);
	/* The last block, and one that is not granted. */
	end(begin(&rig, WRITE_IT, 99 * BLOCK, BLOCK, 5), 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GRANT }) == 0);
	g = begin(&rig, WRITE_IT, 98 * BLOCK, BLOCK, 5);
	fail_it(&rig, expect_after(&rig, DMU_FAULT, &told).id, EIO);
	end(g, EIO);
	end(begin(&rig, WRITE_IT, 99 * BLOCK, BLOCK, 4), 0);
	rig_down(&rig);
}

/* What is told to be there is read and written there; what was told to lie under it is not. */
static void layer_bits(void)
{
	const uint64_t words[2] = { BIT(5) | BIT(6) | BIT(63), BIT(64) | BIT(99) };
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;

	layered_up(&rig);
	CHECK(answer(rig.node, bits(0, BLOCKS, words)) == 0);
	g = read_blocks(&rig, 4, 4);
	check_bytes(g, 0, BLOCK * SECTOR, 0, 4 * BLOCK * SECTOR);
	check_bytes(g, BLOCK * SECTOR, 2 * BLOCK * SECTOR, 1, PLACE(5) * SECTOR);
	check_bytes(g, 3 * BLOCK * SECTOR, BLOCK * SECTOR, 0, 7 * BLOCK * SECTOR);
	g = read_blocks(&rig, 62, 4);
	check_bytes(g, BLOCK * SECTOR, 2 * BLOCK * SECTOR, 1, PLACE(63) * SECTOR);
	check_bytes(g, 3 * BLOCK * SECTOR, BLOCK * SECTOR, 0, 65 * BLOCK * SECTOR);
	g = read_blocks(&rig, 99, 1);
	check_bytes(g, 0, BLOCK * SECTOR, 1, PLACE(99) * SECTOR);
	end(begin(&rig, WRITE_IT, 5 * BLOCK + 1, 1, 9), 0);
	CHECK(stat_of("uncommitted") == 0 && stat_of("faults") == 0);
	/* Told again, with more, and what is under it. */
	CHECK(answer(rig.node, map(0, 0, BLOCKS, 1, 0, 0)) == 0);
	CHECK(answer(rig.node, bits(64, 36, (uint64_t[]){ BIT(70) })) == 0);
	CHECK(answer(rig.node, layer(BLOCKS)) == 0);
	g = read_blocks(&rig, 63, 8);
	check_bytes(g, 0, 2 * BLOCK * SECTOR, 1, PLACE(63) * SECTOR);
	check_bytes(g, 2 * BLOCK * SECTOR, 5 * BLOCK * SECTOR, 0, 65 * BLOCK * SECTOR);
	check_bytes(g, 7 * BLOCK * SECTOR, BLOCK * SECTOR, 1, PLACE(70) * SECTOR);
	/* By an answer, too. */
	CHECK(answer(rig.node, map(0, 20, 3, 0, PLACE(20), DMU_WRITABLE)) == 0);
	g = read_blocks(&rig, 19, 5);
	check_bytes(g, BLOCK * SECTOR, 3 * BLOCK * SECTOR, 1, PLACE(20) * SECTOR);
	/* A write of a part that is asked about. */
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GRANT }) == 0);
	g = begin(&rig, WRITE_IT, 30 * BLOCK + 1, 2, 9);
	m = expect(rig.node, DMU_FAULT);
	{
		struct dmu_answer a = map(m.id, 30, 1, 0, PLACE(30),
					  DMU_WRITABLE | DMU_COPY_FIRST | DMU_HOLD_FLUSH);

		a.from_device = 1;
		a.from_sector = 30 * BLOCK;
		a.mark = 1;
		CHECK(answer(rig.node, a) == 0);
	}
	end(g, 0);
	g = read_blocks(&rig, 30, 1);
	check_bytes(g, 0, SECTOR, 0, 30 * BLOCK * SECTOR);
	check_fill(g, SECTOR, 2 * SECTOR, 9);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect(rig.node, DMU_FLUSH);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(g, 0);
	rig_down(&rig);
}

/* A flush tells what had become present when it came, and the next one what was not committed. */
static void layer_rounds(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;

	layered_up(&rig);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 9), 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect_flush(&rig, g, BIT(3), 0);
	end(begin(&rig, WRITE_IT, 4 * BLOCK, BLOCK, 9), 0);
	expect_silence(rig.node);
	fail_it(&rig, m.id, ENOSPC);
	end(g, ENOSPC);
	CHECK(stat_of("uncommitted") == 2);
	end(begin(&rig, WRITE_IT, 5 * BLOCK, BLOCK, 9), 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect_flush(&rig, g, BIT(3) | BIT(4) | BIT(5), 0);
	end(begin(&rig, WRITE_IT, 70 * BLOCK, BLOCK, 9), 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(g, 0);
	CHECK(stat_of("uncommitted") == 1);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	finish_flush(&rig, g, 0, BIT(70));
	CHECK(stat_of("uncommitted") == 0);
	/* A suspend that gives the flush back, which comes again. */
	end(begin(&rig, WRITE_IT, 6 * BLOCK, BLOCK, 9), 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect_flush(&rig, g, BIT(6), 0);
	CHECK(run("dmsetup suspend --noflush lab && dmsetup resume lab") == 0, "%s", said());
	fail_it(&rig, m.id, EAGAIN);
	finish_flush(&rig, g, BIT(6), 0);
	rig_down(&rig);
}

/* A successor hears what is not committed, and nobody commits who does not. */
static void layer_takeover(void)
{
	struct rig rig = plain();
	uint64_t marks[2] = {};
	struct dmu_message m;
	struct guest *g, *h;

	layered_up(&rig);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 9), 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect_flush(&rig, g, BIT(3), 0);
	end(begin(&rig, WRITE_IT, 4 * BLOCK, BLOCK, 9), 0);
	end(begin(&rig, WRITE_IT, 40 * BLOCK + 1, 1, 9), 0);
	close(rig.node);
	/* What is there goes on; first writes wait. */
	end(begin(&rig, WRITE_IT, 4 * BLOCK, 1, 8), 0);
	h = begin(&rig, WRITE_IT, 5 * BLOCK, BLOCK, 9);
	still_waits(h);
	rig.node = open(NODE, O_RDWR | O_CLOEXEC);
	CHECK(rig.node >= 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_DUMP }) == -EPROTO);
	fail_it(&rig, expect(rig.node, DMU_FAULT).id, EIO);
	end(h, EIO);
	expect_silence(rig.node);
	still_waits(g);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_LAYER }) == 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_DUMP }) == 0);
	CHECK(expect(rig.node, DMU_UNCOMMITTED_IS).block == 40);
	/* The flush's own, and under a later mark what came after it; in either order. */
	for (;;) {
		struct dmu_message told;

		CHECK(next_message(rig.node, &told, 20000));
		if (told.type == DMU_DUMP_DONE)
			break;
		CHECK(told.type == DMU_PRESENT && told.block == 0 &&
		      (told.sector == BIT(3) || told.sector == BIT(4)));
		marks[told.sector == BIT(4)] = told.mark;
	}
	CHECK(marks[0] == m.mark && marks[1] > m.mark);
	finish_flush(&rig, g, BIT(3), 0);
	CHECK(answer(rig.node, layer(BLOCKS)) == 0);
	CHECK(answer(rig.node, map(0, 0, BLOCKS, 1, 0, 0)) == 0);
	CHECK(answer(rig.node, grant()) == 0);
	end(begin(&rig, WRITE_IT, 5 * BLOCK, BLOCK, 9), 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	finish_flush(&rig, g, BIT(4) | BIT(5), 0);
	CHECK(stat_of("uncommitted") == 0);
	g = read_blocks(&rig, 4, 1);
	check_fill(g, 0, SECTOR, 8);
	check_fill(g, SECTOR, (BLOCK - 1) * SECTOR, 9);
	rig_down(&rig);
}

/* Before a discard the worker hears which of its blocks are there. */
static void layer_zeroes(void)
{
	struct rig rig = plain();
	struct dmu_answer a;
	struct dmu_message m;
	struct told told;
	struct guest *g;

	layered_up(&rig);
	end(begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 9), 0);
	end(begin(&rig, WRITE_IT, 80 * BLOCK, BLOCK, 9), 0);
	g = begin(&rig, ZERO_IT, 3 * BLOCK, 2 * BLOCK, 0);
	m = expect_after(&rig, DMU_DISCARD, &told);
	CHECK(told.present[0] == BIT(3) && told.mark);
	CHECK(m.block == 3 && m.count == 2 && m.flags & DMU_ZEROING);
	/* That it is nowhere cannot be said of a block that is there. */
	CHECK(answer(rig.node, map(m.id, 3, 1, DMU_DEVICE_ZERO, 0, 0)) == -EEXIST);
	/* Nor that it has been placed now. */
	a = map(m.id, 3, 2, 0, PLACE(3), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 1000;
	CHECK(answer(rig.node, a) == -EEXIST);
	CHECK(answer(rig.node, map(m.id, 3, 1, 0, PLACE(3), DMU_WRITABLE)) == 0);
	m = expect_after(&rig, DMU_DISCARD, &told);
	CHECK(m.block == 4 && m.count == 1);
	a = map(m.id, 4, 1, 0, PLACE(4), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 1000;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	g = read_blocks(&rig, 2, 4);
	check_bytes(g, 0, BLOCK * SECTOR, 0, 2 * BLOCK * SECTOR);
	check_fill(g, BLOCK * SECTOR, 2 * BLOCK * SECTOR, 0);
	check_bytes(g, 3 * BLOCK * SECTOR, BLOCK * SECTOR, 0, 5 * BLOCK * SECTOR);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	finish_flush(&rig, g, BIT(3), BIT(80));
	rig_down(&rig);
}

/* From now on every request to the store fails, or none does. */
static void break_store(struct rig *rig, bool broken)
{
	char table[64];

	snprintf(table, sizeof(table), broken ? "error" : "linear %s 0", rig->store_loop);
	CHECK(run("dmsetup load store --table '0 %d %s' && dmsetup suspend store && "
		  "dmsetup resume store", (BLOCKS + 32) * BLOCK * 2, table) == 0, "%s", said());
}

/* A write that fails makes nothing present, whatever it has written. */
static void layer_failure(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g, *h;

	rig.store_table = "linear %s 0";
	layered_up(&rig);
	break_store(&rig, true);
	end(begin(&rig, WRITE_IT, 4 * BLOCK, 2 * BLOCK, 9), EIO);
	m = expect(rig.node, DMU_DEVICE_ERROR);
	CHECK(m.device == 0 && m.flags == DMU_WRITE && m.code == EIO);
	CHECK(stat_of("uncommitted") == 0 && stat_of("granted") == 0);
	g = read_blocks(&rig, 4, 2);
	check_bytes(g, 0, 2 * BLOCK * SECTOR, 0, 4 * BLOCK * SECTOR);
	/* A part of a block that could not be placed: it is where it was. */
	end(begin(&rig, WRITE_IT, 6 * BLOCK + 1, 1, 9), EIO);
	while (next_message(rig.node, &m, 200))
		CHECK(m.type == DMU_PLACED || m.type == DMU_DEVICE_ERROR ||
		      m.type == DMU_MAP_ERROR);
	g = read_blocks(&rig, 6, 1);
	check_bytes(g, 0, BLOCK * SECTOR, 0, 6 * BLOCK * SECTOR);
	CHECK(stat_of("uncommitted") == 0);
	/* They wait, and are sent again. */
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_HOLD_FAILED, .code = 1 }) == 0);
	g = begin(&rig, WRITE_IT, 7 * BLOCK, 3 * BLOCK, 9);
	h = begin(&rig, WRITE_IT, 20 * BLOCK, BLOCK, 8);
	do {
		CHECK(next_message(rig.node, &m, 20000));
	} while (m.type == DMU_DEVICE_ERROR);
	CHECK(m.type == DMU_WRITES_FAILED && m.code == EIO);
	still_waits(g);
	still_waits(h);
	break_store(&rig, false);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_RETRY, .id = m.id }) == 0);
	while (!g->done || !h->done) {
		if (next_message(rig.node, &m, 100) && m.type == DMU_WRITES_FAILED)
			CHECK(answer(rig.node, (struct dmu_answer){
				.type = DMU_RETRY, .id = m.id }) == 0);
	}
	end(g, 0);
	end(h, 0);
	CHECK(stat_of("uncommitted") == 4);
	g = read_blocks(&rig, 6, 5);
	check_bytes(g, 0, BLOCK * SECTOR, 0, 6 * BLOCK * SECTOR);
	check_fill(g, BLOCK * SECTOR, 3 * BLOCK * SECTOR, 9);
	check_bytes(g, 4 * BLOCK * SECTOR, BLOCK * SECTOR, 0, 10 * BLOCK * SECTOR);
	rig_down(&rig);
}

/* What is copied onto a place does not meet a write there: each waits for the other. */
static void layer_cells(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g, *h, *z;
	struct told told;

	rig.store_table = "delay %s 0 0 %1$s 0 1000";
	layered_up(&rig);
	/* A whole block is under way, then a part of it, then it is read. */
	g = begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 9);
	sleep_ms(50);
	h = begin(&rig, WRITE_IT, 3 * BLOCK + 4, 2, 8);
	sleep_ms(50);
	CHECK(!h->done);
	end(g, 0);
	end(h, 0);
	CHECK(stat_of("copies") == 0 && stat_of("granted") == 1);
	g = read_blocks(&rig, 3, 1);
	check_fill(g, 0, 4 * SECTOR, 9);
	check_fill(g, 4 * SECTOR, 2 * SECTOR, 8);
	check_fill(g, 6 * SECTOR, (BLOCK - 6) * SECTOR, 9);
	/* A part is under way, then the whole block. */
	g = begin(&rig, WRITE_IT, 5 * BLOCK + 4, 2, 8);
	sleep_ms(50);
	h = begin(&rig, WRITE_IT, 5 * BLOCK, BLOCK, 7);
	sleep_ms(50);
	end(g, 0);
	end(h, 0);
	g = read_blocks(&rig, 5, 1);
	check_fill(g, 0, BLOCK * SECTOR, 7);
	/* A whole block is under way, and the run that it is in is discarded. */
	g = begin(&rig, WRITE_IT, 40 * BLOCK, BLOCK, 9);
	sleep_ms(50);
	z = begin(&rig, DISCARD_IT, 39 * BLOCK, 3 * BLOCK, 0);
	sleep_ms(50);
	h = begin(&rig, WRITE_IT, 41 * BLOCK, BLOCK, 6);
	m = expect_after(&rig, DMU_DISCARD, &told);
	CHECK(told.placed[0] == BIT(5) && told.present[0] & BIT(40));
	CHECK(ended(g));
	end(g, 0);
	CHECK(m.block == 39 && m.count == 3);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_DONE, .id = m.id, .count = 1 }) == 0);
	m = expect_after(&rig, DMU_DISCARD, &told);
	CHECK(m.block == 40 && m.count == 2);
	CHECK(answer(rig.node, map(m.id, 40, 1, 0, PLACE(40), DMU_WRITABLE)) == 0);
	m = expect_after(&rig, DMU_DISCARD, &told);
	CHECK(m.block == 41 && m.count == 1);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_DONE, .id = m.id, .count = 1 }) == 0);
	end(z, 0);
	end(h, 0);
	g = read_blocks(&rig, 39, 3);
	check_bytes(g, 0, BLOCK * SECTOR, 0, 39 * BLOCK * SECTOR);
	check_fill(g, BLOCK * SECTOR, BLOCK * SECTOR, 0);
	check_fill(g, 2 * BLOCK * SECTOR, BLOCK * SECTOR, 6);
	rig_down(&rig);
}

static void layer_lies(void)
{
	const uint64_t words[2] = { BIT(5), BIT(64) };
	struct rig rig = plain();
	struct dmu_answer a;
	struct guest *g;

	rig_up(&rig);
	CHECK(answer(rig.node, bits(0, 64, words)) == -ENOENT);
	a = layer(BLOCKS);
	a.block = 1;
	CHECK(answer(rig.node, a) == -ERANGE);
	CHECK(answer(rig.node, layer(BLOCKS + 1)) == -ERANGE);
	a = layer(BLOCKS);
	a.device = 1;
	CHECK(answer(rig.node, a) == -EROFS);
	a.device = 2;
	CHECK(answer(rig.node, a) == -ENXIO);
	a.device = DMU_DEVICE_ZERO;
	CHECK(answer(rig.node, a) == -EROFS);
	a.device = 0;
	a.sector = ~0ULL;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.sector = (BLOCKS + 64) * BLOCK + 1;
	CHECK(answer(rig.node, a) == -ERANGE);
	a = layer(BLOCKS);
	a.flags = DMU_WRITABLE;
	CHECK(answer(rig.node, a) == -EINVAL);
	/* A block has another place already, or may get one. */
	CHECK(answer(rig.node, map(0, 7, 1, 0, 0, DMU_WRITABLE)) == 0);
	CHECK(answer(rig.node, layer(BLOCKS)) == -EEXIST);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_INVALIDATE, .block = 7, .count = 1 }) == 0);
	expect(rig.node, DMU_INVALIDATE_DONE);
	a = grant();
	a.sector = 0;
	CHECK(answer(rig.node, a) == 0);
	CHECK(answer(rig.node, layer(BLOCKS)) == -EEXIST);
	CHECK(answer(rig.node, grant()) == 0);
	/* One that has its own is welcome. */
	CHECK(answer(rig.node, map(0, 8, 1, 0, PLACE(8), DMU_WRITABLE)) == 0);
	CHECK(answer(rig.node, layer(90)) == 0);
	CHECK(answer(rig.node, layer(80)) == -EEXIST);
	a = layer(BLOCKS);
	a.sector = PLACE(1);
	CHECK(answer(rig.node, a) == -EEXIST);
	CHECK(answer(rig.node, layer(BLOCKS)) == 0);
	CHECK(answer(rig.node, bits(0, 0, words)) == -ERANGE);
	CHECK(answer(rig.node, bits(32, 32, words)) == -EINVAL);
	CHECK(answer(rig.node, bits(0, BLOCKS + 1, words)) == -ERANGE);
	CHECK(answer(rig.node, bits(128, 1, words)) == -ENOENT);
	CHECK(answer(rig.node, bits(0, 65, (uint64_t[]){ 0, 2 })) == -EINVAL);
	CHECK(answer(rig.node, bits(0, 64, NULL)) == -EFAULT);
	a = bits(0, 64, words);
	errno = 0;
	CHECK(write(rig.node, &a, sizeof(a)) == -1 && errno == EPERM);
	CHECK(answer(rig.node, map(0, 5, 1, 0, 0, DMU_WRITABLE)) == -EEXIST);
	CHECK(answer(rig.node, map(0, 90, 11, 1, 90 * BLOCK, 0)) == -ERANGE);
	a = grant();
	a.sector = 0;
	CHECK(answer(rig.node, a) == -EEXIST);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_INVALIDATE, .block = 7, .count = 1 }) == -EEXIST);
	/* None of them has changed anything. */
	CHECK(answer(rig.node, map(0, 0, 8, 1, 0, 0)) == 0);
	g = read_blocks(&rig, 5, 1);
	check_bytes(g, 0, BLOCK * SECTOR, 0, 5 * BLOCK * SECTOR);
	g = read_blocks(&rig, 8, 1);
	check_bytes(g, 0, BLOCK * SECTOR, 1, PLACE(8) * SECTOR);
	rig_down(&rig);
}

const struct scenario layer_scenarios[] = {
	{ "layer-touch", layer_touch },
	{ "layer-bits", layer_bits },
	{ "layer-rounds", layer_rounds },
	{ "layer-takeover", layer_takeover },
	{ "layer-zeroes", layer_zeroes },
	{ "layer-failure", layer_failure },
	{ "layer-cells", layer_cells },
	{ "layer-lies", layer_lies },
	{ 0 },
};
