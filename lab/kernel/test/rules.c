// SPDX-License-Identifier: Apache-2.0
/* The rules of the contract that concern one mapping, one request. */
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

static void read_fault(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;

	rig_up(&rig);
	g = begin(&rig, READ_IT, 5 * BLOCK + 3, 4, 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.flags == DMU_READ && m.block == 5 && m.count == 1 && m.id);
	still_waits(g);
	CHECK(answer(rig.node, map(m.id, 5, 2, 1, 5 * BLOCK, 0)) == 0);
	end(g, 0);
	check_bytes(g, 0, 4 * SECTOR, 0, (5 * BLOCK + 3) * SECTOR);
	/* Remembered, both blocks of it. */
	g = begin(&rig, READ_IT, 5 * BLOCK, 2 * BLOCK, 0);
	end(g, 0);
	check_bytes(g, 0, 2 * BLOCK * SECTOR, 0, 5 * BLOCK * SECTOR);
	expect_silence(rig.node);
	rig_down(&rig);
}

static void prime_no_fault(void)
{
	struct rig rig = plain();
	struct guest *g;
	int i;

	rig_up(&rig);
	for (i = 0; i < 64; i++)
		CHECK(answer(rig.node, map(0, i, 1, 1, i * BLOCK, 0)) == 0);
	CHECK(run("dmsetup status lab") == 0);
	CHECK(strstr(said(), " worker 1 0 0 ok"), "%s", said());
	g = begin(&rig, READ_IT, 0, 64 * BLOCK, 0);
	end(g, 0);
	check_bytes(g, 0, 64 * BLOCK * SECTOR, 0, 0);
	expect_silence(rig.node);
	CHECK(stat_of("faults") == 0);
	rig_down(&rig);
}

static void write_read_only(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;

	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == 0);
	g = begin(&rig, WRITE_IT, 7 * BLOCK + 2, 1, 0xaa);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.flags == DMU_WRITE && m.block == 7);
	/* The base may not be written. */
	CHECK(answer(rig.node, map(m.id, 7, 1, 1, 7 * BLOCK, DMU_WRITABLE)) == -EROFS);
	still_waits(g);
	CHECK(answer(rig.node, map(m.id, 7, 1, 0, PLACE(7), DMU_WRITABLE)) == 0);
	end(g, 0);
	rig_down(&rig);
}

/* A first write carries the rest of its block along, and the copy does not touch the write. */
static void first_write(uint32_t flags, uint32_t from, uint32_t count)
{
	struct rig rig = plain();
	struct dmu_answer a;
	struct dmu_message m;
	struct guest *g, *r;

	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == 0);
	g = begin(&rig, WRITE_IT, 9 * BLOCK + from, count, 0x5a);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.flags == (DMU_WRITE | (count == BLOCK ? DMU_WHOLE : 0)));
	a = map(m.id, 9, 1, 0, PLACE(9), DMU_WRITABLE | flags);
	a.from_device = 1;
	a.from_sector = 9 * BLOCK;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	r = begin(&rig, READ_IT, 8 * BLOCK, 3 * BLOCK, 0);
	end(r, 0);
	check_bytes(r, 0, BLOCK * SECTOR, 0, 8 * BLOCK * SECTOR);
	check_fill(r, (BLOCK + from) * SECTOR, count * SECTOR, 0x5a);
	if (flags & DMU_COPY_FIRST) {
		check_bytes(r, BLOCK * SECTOR, from * SECTOR, 0, 9 * BLOCK * SECTOR);
		check_bytes(r, (BLOCK + from + count) * SECTOR, (BLOCK - from - count) * SECTOR, 0,
			    (9 * BLOCK + from + count) * SECTOR);
	} else if (flags & DMU_ZERO_FIRST) {
		check_fill(r, BLOCK * SECTOR, from * SECTOR, 0);
		check_fill(r, (BLOCK + from + count) * SECTOR, (BLOCK - from - count) * SECTOR, 0);
	}
	check_bytes(r, 2 * BLOCK * SECTOR, BLOCK * SECTOR, 0, 10 * BLOCK * SECTOR);
	CHECK(stat_of("copies") == (flags && count < BLOCK ? 1 : 0));
	/* The next write to the block costs no message. */
	end(begin(&rig, WRITE_IT, 9 * BLOCK, BLOCK, 0x33), 0);
	expect_silence(rig.node);
	rig_down(&rig);
}

static void copy_first(void)
{
	first_write(DMU_COPY_FIRST, 0, 1);
	first_write(DMU_COPY_FIRST, 5, 3);
	first_write(DMU_COPY_FIRST, BLOCK - 1, 1);
	first_write(DMU_COPY_FIRST, 0, BLOCK);
}

static void zero_first(void)
{
	first_write(DMU_ZERO_FIRST, 0, 4);
	first_write(DMU_ZERO_FIRST, 6, 2);
	first_write(DMU_ZERO_FIRST, 0, BLOCK);
}

static void temporary(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;
	int i;

	rig_up(&rig);
	for (i = 0; i < 2; i++) {
		g = begin(&rig, READ_IT, BLOCK, BLOCK, 0);
		m = expect(rig.node, DMU_FAULT);
		CHECK(answer(rig.node, map(m.id, 1, 1, 1, BLOCK, DMU_TEMPORARY)) == 0);
		end(g, 0);
		check_bytes(g, 0, BLOCK * SECTOR, 0, BLOCK * SECTOR);
		g = begin(&rig, WRITE_IT, BLOCK, 1, 1);
		m = expect(rig.node, DMU_FAULT);
		CHECK(answer(rig.node, map(m.id, 1, 1, 0, PLACE(1),
					   DMU_WRITABLE | DMU_TEMPORARY)) == 0);
		end(g, 0);
	}
	rig_down(&rig);
}

static void read_answers(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g;
	uint8_t *bytes = malloc(BLOCK * SECTOR);
	int i;

	for (i = 0; i < BLOCK * SECTOR; i++)
		bytes[i] = i * 13;
	rig_up(&rig);
	g = begin(&rig, READ_IT, 2 * BLOCK + 1, 5, 0xff);
	m = expect(rig.node, DMU_FAULT);
	a = (struct dmu_answer){
		.type = DMU_DATA, .id = m.id, .address = (uintptr_t)bytes,
		.length = BLOCK * SECTOR,
	};
	CHECK(write(rig.node, &a, sizeof(a)) == -1 && errno == EPERM);
	a.address = 4096;
	CHECK(answer(rig.node, a) == -EFAULT);
	a.address = (uintptr_t)bytes;
	a.length = SECTOR;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.length = BLOCK * SECTOR;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	CHECK(!memcmp(g->data, bytes + SECTOR, 5 * SECTOR));
	g = begin(&rig, READ_IT, 2 * BLOCK, 5, 0xff);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_ZERO, .id = m.id }) == 0);
	end(g, 0);
	check_fill(g, 0, 5 * SECTOR, 0);
	/* A remembered nowhere. */
	CHECK(answer(rig.node, map(0, 2, 3, DMU_DEVICE_ZERO, 0, 0)) == 0);
	g = begin(&rig, READ_IT, 3 * BLOCK, 2 * BLOCK, 0xff);
	end(g, 0);
	check_fill(g, 0, 2 * BLOCK * SECTOR, 0);
	g = begin(&rig, READ_IT, 20 * BLOCK, 1, 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(g, EIO);
	g = begin(&rig, WRITE_IT, 20 * BLOCK, 1, 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = ENOSPC }) == 0);
	end(g, ENOSPC);
	rig_down(&rig);
}

static void wait_retry(void)
{
	struct rig rig = plain();
	struct dmu_message m, n;
	struct guest *g;

	rig_up(&rig);
	g = begin(&rig, WRITE_IT, 0, BLOCK, 1);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_WAIT, .id = m.id }) == 0);
	expect_silence(rig.node);
	still_waits(g);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_RETRY }) == 0);
	n = expect(rig.node, DMU_FAULT);
	CHECK(n.block == 0 && n.flags == m.flags && n.id != m.id);
	CHECK(answer(rig.node, map(m.id, 0, 1, 0, PLACE(0), DMU_WRITABLE)) == -ENOENT);
	CHECK(answer(rig.node, map(n.id, 0, 1, 0, PLACE(0), DMU_WRITABLE)) == 0);
	end(g, 0);
	rig_down(&rig);
}

/* Requests to one block are served as they arrived. */
static void block_order(void)
{
	struct rig rig = plain();
	struct guest *g[8];
	struct dmu_message m;
	int i;

	rig_up(&rig);
	for (i = 0; i < 8; i++) {
		g[i] = begin(&rig, i % 2 ? READ_IT : WRITE_IT, BLOCK, 2, i + 1);
		sleep_ms(20);
	}
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.flags == DMU_WRITE);
	expect_silence(rig.node);
	CHECK(answer(rig.node, map(m.id, 1, 1, 0, PLACE(1), DMU_WRITABLE | DMU_ZERO_FIRST)) == 0);
	for (i = 0; i < 8; i++)
		end(g[i], 0);
	/* A loop device may work on several at once: the first read sees at least its write. */
	CHECK(g[1]->data[0] >= 1 && g[7]->data[0] <= 7);
	expect_silence(rig.node);
	rig_down(&rig);
}

const struct scenario rule_scenarios[] = {
	{ "read-fault", read_fault },
	{ "prime-no-fault", prime_no_fault },
	{ "write-read-only", write_read_only },
	{ "copy-first", copy_first },
	{ "zero-first", zero_first },
	{ "temporary", temporary },
	{ "read-answers", read_answers },
	{ "wait-retry", wait_retry },
	{ "block-order", block_order },
	{ 0 },
};
