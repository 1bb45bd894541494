// SPDX-License-Identifier: Apache-2.0
/* Writes that fail on their device and wait, errors that are told, and nothing that waits. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "lab.h"

#define BLOCK 16
#define PLACE(block) (32 * BLOCK + (block) * BLOCK)
#define STORE ((64 + 32) * 2 * BLOCK)

/* A store that can be made to fail, mapped writable; a worker that wants to be asked. */
static struct rig held(void)
{
	struct rig rig = { .block = BLOCK, .sectors = 64 * BLOCK };

	rig.store_table = "linear %s 0";
	rig.base_table = "linear %s 0";
	rig_up(&rig);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_HOLD_FAILED, .code = 2 }) ==
	      -EINVAL);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_HOLD_FAILED, .code = 1 }) == 0);
	CHECK(answer(rig.node, map(0, 0, 32, 0, PLACE(0), DMU_WRITABLE)) == 0);
	CHECK(answer(rig.node, map(0, 32, 32, 1, 32 * BLOCK, 0)) == 0);
	return rig;
}

static void sick(const char *device, int sectors)
{
	CHECK(run("dmsetup load %s --table '0 %d error' && dmsetup suspend %s && "
		  "dmsetup resume %s", device, sectors, device, device) == 0, "%s", said());
}

static void well(const char *device, int sectors, const char *loop)
{
	CHECK(run("dmsetup load %s --table '0 %d linear %s 0' && dmsetup suspend %s && "
		  "dmsetup resume %s", device, sectors, loop, device, device) == 0, "%s", said());
}

static void store_sick(void) { sick("store", STORE); }
static void store_well(struct rig *rig) { well("store", STORE, rig->store_loop); }

static int retry(struct rig *rig, uint64_t id)
{
	return answer(rig->node, (struct dmu_answer){ .type = DMU_RETRY, .id = id });
}

/* The question after what counts the error on the store. */
static struct dmu_message failure(struct rig *rig)
{
	struct dmu_message m = expect(rig->node, DMU_DEVICE_ERROR);

	CHECK(m.device == 0 && m.flags == DMU_WRITE && m.code == EIO);
	m = expect(rig->node, DMU_WRITES_FAILED);
	CHECK(m.code == EIO && m.id);
	return m;
}

static void check_place(struct rig *rig, int block, int count, uint8_t fill)
{
	uint8_t seen[8 * BLOCK * SECTOR];
	int i;

	peek(rig->store, PLACE(block), count * BLOCK, seen);
	for (i = 0; i < count * BLOCK * SECTOR; i++)
		CHECK(seen[i] == fill, "byte %d is %u", i, seen[i]);
}

/* A mapped write waits, is tried again, fails again, and ends when its device is well. */
static void held_write(void)
{
	struct rig rig = held();
	struct dmu_message m;
	struct guest *g, *h, *r;
	uint64_t id;
	int errors;

	store_sick();
	g = begin(&rig, WRITE_IT, 2 * BLOCK, BLOCK, 7);
	m = failure(&rig);
	still_waits(g);
	/* Of several blocks, too; there is one question at a time. */
	h = begin(&rig, WRITE_IT, 4 * BLOCK, 4 * BLOCK, 8);
	CHECK(expect(rig.node, DMU_DEVICE_ERROR).flags == DMU_WRITE);
	expect_silence(rig.node);
	still_waits(h);
	/* Who reads elsewhere is not held up. */
	r = begin(&rig, READ_IT, 40 * BLOCK, BLOCK, 0);
	end(r, 0);
	CHECK(retry(&rig, m.id + 1) == -ENOENT);
	CHECK(retry(&rig, m.id) == 0);
	CHECK(retry(&rig, m.id) == -ENOENT);
	/* Both fail again, in any order with the question. */
	for (errors = 0, id = 0; errors < 2 || !id;) {
		CHECK(next_message(rig.node, &m, 5000));
		errors += m.type == DMU_DEVICE_ERROR;
		if (m.type == DMU_WRITES_FAILED)
			id = m.id;
	}
	store_well(&rig);
	CHECK(retry(&rig, id) == 0);
	end(g, 0);
	end(h, 0);
	check_place(&rig, 2, 1, 7);
	check_place(&rig, 4, 4, 8);
	expect_silence(rig.node);
	/* FAIL ends them. */
	store_sick();
	g = begin(&rig, WRITE_IT, 2 * BLOCK, 1, 9);
	m = failure(&rig);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = ENOSPC }) == 0);
	end(g, ENOSPC);
	/* A read fails at once, and is told. */
	end(begin(&rig, READ_IT, 2 * BLOCK, 1, 0), EIO);
	m = expect(rig.node, DMU_DEVICE_ERROR);
	CHECK(m.device == 0 && m.flags == DMU_READ && m.code == EIO);
	/* Without the wish writes fail, too. */
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_HOLD_FAILED }) == 0);
	end(begin(&rig, WRITE_IT, 2 * BLOCK, 1, 9), EIO);
	CHECK(expect(rig.node, DMU_DEVICE_ERROR).flags == DMU_WRITE);
	store_well(&rig);
	rig_down(&rig);
}

/* A first write whose place cannot be written: the place is void, the write is asked anew. */
static void held_placement(void)
{
	struct rig rig = held();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g;

	store_sick();
	g = begin(&rig, WRITE_IT, 33 * BLOCK + 3, 2, 7);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 33 && m.flags == DMU_WRITE);
	a = map(m.id, 33, 1, 0, PLACE(33), DMU_WRITABLE | DMU_COPY_FIRST | DMU_HOLD_FLUSH);
	a.from_device = 1;
	a.from_sector = 33 * BLOCK;
	a.mark = 1;
	CHECK(answer(rig.node, a) == 0);
	m = expect(rig.node, DMU_DEVICE_ERROR);
	CHECK(m.device == 0 && m.flags == DMU_WRITE);
	m = expect(rig.node, DMU_MAP_ERROR);
	CHECK(m.block == 33 && m.mark == 1);
	m = expect(rig.node, DMU_WRITES_FAILED);
	still_waits(g);
	CHECK(stat_of("uncommitted") == 0);
	store_well(&rig);
	CHECK(retry(&rig, m.id) == 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 33 && m.flags == DMU_WRITE);
	a.id = m.id;
	a.mark = 2;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	CHECK(stat_of("uncommitted") == 1);
	g = begin(&rig, READ_IT, 33 * BLOCK, BLOCK, 0);
	end(g, 0);
	check_bytes(g, 0, 3 * SECTOR, 0, 33 * BLOCK * SECTOR);
	check_fill(g, 3 * SECTOR, 2 * SECTOR, 7);
	rig_down(&rig);
}

/* What waits outlives the worker, and goes back to the core in a suspend. */
static void held_over_others(void)
{
	struct rig rig = held();
	struct dmu_message m, n;
	struct guest *g;

	store_sick();
	g = begin(&rig, WRITE_IT, 2 * BLOCK, 2 * BLOCK, 7);
	m = failure(&rig);
	close(rig.node);
	sleep_ms(50);
	still_waits(g);
	rig.node = open(NODE, O_RDWR);
	CHECK(rig.node >= 0);
	n = expect(rig.node, DMU_WRITES_FAILED);
	CHECK(n.id == m.id && n.flags == DMU_AGAIN);
	CHECK(run("dmsetup suspend --noflush --nolockfs lab") == 0, "%s", said());
	still_waits(g);
	CHECK(retry(&rig, m.id) == -ENOENT);
	store_well(&rig);
	CHECK(run("dmsetup resume lab") == 0, "%s", said());
	end(g, 0);
	check_place(&rig, 2, 2, 7);
	/* One that comes while nobody is there waits for whoever comes. */
	close(rig.node);
	store_sick();
	g = begin(&rig, WRITE_IT, 5 * BLOCK, BLOCK, 9);
	sleep_ms(50);
	still_waits(g);
	rig.node = open(NODE, O_RDWR);
	m = expect(rig.node, DMU_WRITES_FAILED);
	store_well(&rig);
	CHECK(retry(&rig, m.id) == 0);
	end(g, 0);
	check_place(&rig, 5, 1, 9);
	rig_down(&rig);
}

/* Writes that fail while a suspend waits for them wait as well: in the core, until the resume. */
static void held_in_suspend(void)
{
	struct rig rig = held();
	uint64_t until = now_ms() + 20000;
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g, *f;
	int errors;

	CHECK(run("dmsetup suspend --noflush store") == 0, "%s", said());
	g = begin(&rig, WRITE_IT, 2 * BLOCK, 2 * BLOCK, 7);
	f = begin(&rig, WRITE_IT, 33 * BLOCK, BLOCK, 8);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 33, 1, 0, PLACE(33), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 1;
	CHECK(answer(rig.node, a) == 0);
	still_waits(g);
	CHECK(run("dmsetup suspend --noflush --nolockfs lab >/dev/null 2>&1 &") == 0);
	sleep_ms(300);
	CHECK(run("dmsetup load store --table '0 %d error' && dmsetup resume store", STORE) == 0,
	      "%s", said());
	while (run("dmsetup info -c --noheadings -o suspended lab | grep -q Suspended"))
		CHECK(now_ms() < until, "the suspend does not end");
	still_waits(g);
	still_waits(f);
	/* All that is told is told already. */
	for (errors = 0; errors < 3; errors++) {
		CHECK(next_message(rig.node, &m, 5000));
		CHECK(m.type == DMU_DEVICE_ERROR || (m.type == DMU_MAP_ERROR && m.mark == 1),
		      "message %d", m.type);
	}
	expect_silence(rig.node);
	store_well(&rig);
	CHECK(run("dmsetup resume lab") == 0, "%s", said());
	end(g, 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 33 && m.flags & DMU_WRITE);
	a.id = m.id;
	a.mark = 2;
	CHECK(answer(rig.node, a) == 0);
	end(f, 0);
	check_place(&rig, 2, 2, 7);
	rig_down(&rig);
}

/* A forced write is written again, and then committed. */
static void held_forced(void)
{
	struct rig rig = held();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g;

	g = begin(&rig, WRITE_IT, 34 * BLOCK, BLOCK, 1);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 34, 1, 0, PLACE(34), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 1;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	store_sick();
	g = begin(&rig, WRITE_SYNC, 34 * BLOCK, 1, 2);
	m = failure(&rig);
	store_well(&rig);
	CHECK(retry(&rig, m.id) == 0);
	m = expect(rig.node, DMU_FLUSH);
	CHECK(m.mark == 1);
	still_waits(g);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(g, 0);
	rig_down(&rig);
}

/* A write of several blocks that is under way while its mapping is forgotten, and fails then. */
static struct guest *forgotten_write(struct rig *rig, uint8_t fill)
{
	struct guest *g;

	CHECK(run("dmsetup suspend --noflush store") == 0, "%s", said());
	g = begin(rig, WRITE_IT, 4 * BLOCK, 4 * BLOCK, fill);
	still_waits(g);
	make_forget(0);
	CHECK(run("dmsetup load store --table '0 %d error' && dmsetup resume store", STORE) == 0,
	      "%s", said());
	return g;
}

/* Such a write asks where its blocks are before it is tried again, even of two workers. */
static void held_forgotten(void)
{
	struct rig rig = held();
	struct dmu_message m, n;
	struct guest *g;

	g = forgotten_write(&rig, 8);
	m = failure(&rig);
	store_well(&rig);
	CHECK(retry(&rig, m.id) == 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 4 && m.flags == DMU_READ);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_WAIT, .id = m.id }) == 0);
	CHECK(retry(&rig, m.id) == 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 4 && m.flags == DMU_READ);
	close(rig.node);
	sleep_ms(50);
	still_waits(g);
	rig.node = open(NODE, O_RDWR);
	n = expect(rig.node, DMU_FAULT);
	CHECK(n.id == m.id && n.flags == (DMU_READ | DMU_AGAIN));
	/* Half of it is known, and is not forgotten while the write waits. */
	CHECK(answer(rig.node, map(n.id, 4, 2, 0, PLACE(4), DMU_WRITABLE)) == 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 6 && m.flags == DMU_READ);
	CHECK(run("echo 2 >/proc/sys/vm/drop_caches") == 0, "%s", said());
	still_waits(g);
	CHECK(answer(rig.node, map(m.id, 6, 2, 0, PLACE(6), DMU_WRITABLE)) == 0);
	end(g, 0);
	check_place(&rig, 4, 4, 8);
	expect_silence(rig.node);
	/* A worker that does not say where they are is asked once. */
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_HOLD_FAILED, .code = 1 }) == 0);
	g = forgotten_write(&rig, 9);
	m = failure(&rig);
	store_well(&rig);
	CHECK(retry(&rig, m.id) == 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = EIO }) == 0);
	end(g, EIO);
	expect_silence(rig.node);
	check_place(&rig, 4, 4, 8);
	rig_down(&rig);
}

/*
 * That a device has no place for a request that must not wait is no failure of it. A request that has
 * waited already waits there as well.
 */
static void not_to_wait(void)
{
	struct rig rig = held();
	struct dmu_message m;
	struct guest *g;

	CHECK(run("dmsetup suspend --noflush store") == 0, "%s", said());
	end(begin(&rig, WRITE_NOWAIT, 2 * BLOCK, BLOCK, 7), EAGAIN);
	expect_silence(rig.node);
	g = begin(&rig, WRITE_NOWAIT, 34 * BLOCK, BLOCK, 7);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, map(m.id, 34, 1, 0, PLACE(34), DMU_WRITABLE)) == 0);
	still_waits(g);
	expect_silence(rig.node);
	CHECK(run("dmsetup resume store") == 0, "%s", said());
	end(g, 0);
	check_place(&rig, 34, 1, 7);
	rig_down(&rig);
}

/* fail_faults without a worker: what waits fails, and so does what comes later, until one comes. */
static void fail_later(void)
{
	struct rig rig = held();
	struct dmu_message m;
	struct guest *g, *f;

	store_sick();
	g = begin(&rig, WRITE_IT, 2 * BLOCK, BLOCK, 7);
	m = failure(&rig);
	f = begin(&rig, WRITE_IT, 35 * BLOCK, 1, 3);
	CHECK(expect(rig.node, DMU_FAULT).block == 35);
	close(rig.node);
	CHECK(run("dmsetup message lab 0 fail_faults") == 0, "%s", said());
	end(g, EIO);
	end(f, EIO);
	end(begin(&rig, WRITE_IT, 36 * BLOCK, 1, 3), EIO);
	end(begin(&rig, WRITE_IT, 2 * BLOCK, 1, 3), EIO);
	end(begin(&rig, DISCARD_IT, 40 * BLOCK, 4 * BLOCK, 0), EIO);
	end(begin(&rig, READ_IT, 40 * BLOCK, 1, 0), 0);
	rig.node = open(NODE, O_RDWR);
	CHECK(rig.node >= 0);
	store_well(&rig);
	g = begin(&rig, WRITE_IT, 36 * BLOCK, 1, 3);
	do {
		CHECK(next_message(rig.node, &m, 5000));
	} while (m.type != DMU_FAULT || m.block != 36);
	still_waits(g);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = ENOSPC }) == 0);
	end(g, ENOSPC);
	rig_down(&rig);
}

const struct scenario failed_scenarios[] = {
	{ "held-write", held_write },
	{ "held-placement", held_placement },
	{ "held-over-others", held_over_others },
	{ "held-in-suspend", held_in_suspend },
	{ "held-forced", held_forced },
	{ "held-forgotten", held_forgotten },
	{ "not-to-wait", not_to_wait },
	{ "fail-later", fail_later },
	{ 0 },
};
